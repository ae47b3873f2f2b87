"""The controller's part of the ledger, read from its state machine; for real and simulated groups."""

import logging
import time
from collections.abc import Iterable
from dataclasses import replace

from cluster.core import messages as m
from cluster.core.state_machine import ENDED, StateMachine
from cluster.goodput.accounts import GroupAccount, NodeLife, Pause, read_group
from cluster.policies.decision import Decision
from infra.errors import DataError, StoreError
from infra.storage import open_store

log = logging.getLogger(__name__)


class GroupWatch:
    """Call `saw` after every `handle` of the core; `account` returns the record to write.

    Args:
        group: its name in the store, e.g. "pretrain".
        before: an earlier controller's account, which this one continues. If the group had ended, it asked for nothing
            until now; its nodes count as lost until they report.
    """

    def __init__(self, group: str, core: StateMachine, now: float, before: GroupAccount | None = None) -> None:
        asked = core.settings.max_workers + core.settings.spares
        self._core = core
        self._group, self._started = group, now if before is None else before.started
        self.capacity = [(now, asked)] if before is None else list(before.capacity)
        self.nodes = {} if before is None else {node: _lost(life, before.until) for node, life in before.nodes.items()}
        self.pauses = [] if before is None else list(before.pauses)
        if before is not None and before.ended:
            self.capacity.append((before.until, 0))
        if self.capacity[-1][1] != asked:
            self.capacity.append((now, asked))
        self._step = core.step
        self._since: float | None = None if core.phase == "adopting" else now
        self._why = Decision("start", core.reason, "elastic.start_timeout_s")
        self._lost = 0
        self._rolled_back = False

    def saw(self, event: m.Event, commands: Iterable[m.Command], now: float) -> Pause | None:
        """Returns the pause that has just ended, if one has."""
        core = self._core
        self._note_nodes(event, now)
        if isinstance(event, m.RollBack):
            self._rolled_back = event.generation == core.generation
        for command in commands:
            if isinstance(command, m.Report):
                self._why = command.decision
            elif isinstance(command, m.Join):
                self._lost += max(0, self._step - command.restore.step)
                self._step = command.restore.step
        self._step = max(self._step, core.step)
        if core.phase in ("running", "stopping", *ENDED):  # stopping: the step under way is not lost
            return self._resumed(now) if self._since is not None else None
        if self._since is None:
            self._since = now
        return None

    def account(self, now: float) -> GroupAccount:
        """The account so far."""
        ended = self._core.phase in ENDED
        nodes, pauses = dict(self.nodes), tuple(self.pauses)
        spares = self._core.settings.spares
        return GroupAccount(self._group, self._started, now, ended, tuple(self.capacity), nodes, pauses, spares)

    def _note_nodes(self, event: m.Event, now: float) -> None:
        if isinstance(event, m.WorkersReady | m.Inventory):
            heard = event.nodes.values() if isinstance(event, m.WorkersReady) else [one.node for one in event.found]
            for node in set(heard):
                known = self.nodes.get(node)
                here = len(self._core.roster.on([node]))
                since, most = (now, 0) if known is None else (known.since, known.ranks)
                self.nodes[node] = NodeLife(since, None, max(most, here))
        elif isinstance(event, m.NodesLost):
            for node in event.nodes:
                if node in self.nodes:
                    known = self.nodes[node]
                    self.nodes[node] = NodeLife(known.since, now, known.ranks)

    def _resumed(self, now: float) -> Pause:
        assert self._since is not None
        why, ranks = self._why, len(self._core.roster.joined)
        generation = self._core.generation
        pause = Pause(
            self._since, now, generation, why.action, why.reason, why.key, ranks, self._lost, self._rolled_back
        )
        self.pauses.append(pause)
        self._since, self._lost, self._rolled_back = None, 0, False
        return pause


def watch_group(accounts: tuple[str, str, str] | None, core: StateMachine) -> GroupWatch:
    """The watch of a real group, which continues earlier records; `accounts` is (store URL, run id, group)."""
    now = time.time()
    if accounts is None:
        return GroupWatch("group", core, now)
    url, run, group = accounts
    try:
        before = read_group(open_store(url), run, group)
    except (StoreError, DataError) as error:
        log.warning("the goodput record so far is lost: %s", error)
        before = None
    return GroupWatch(group, core, now, before)


def _lost(life: NodeLife, at: float) -> NodeLife:
    return life if life.lost is not None else replace(life, lost=max(at, life.since))
