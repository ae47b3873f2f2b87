"""One Ray actor per node: a RankWatch that the controller can call, and the node's part of the accounts.

Who waits for whom: the controller keeps one `listen` open per agent; an agent never waits. Without a controller the
ranks train on, and the agent keeps the outcomes of their steps for the next controller. It asks whether the run still
runs: if it has ended (cancelled, failed), or no controller listened for `orphan_s`, it ends the workers of its node and
itself. Of two controllers the later one is served, and the other gets an error.
"""

import contextlib
import logging
import os
import select
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from ray.util import get_node_ip_address

from cluster.config import HealthSettings
from cluster.core.history import Superseded
from cluster.goodput.accounts import PERIOD_S, RankAccount, read_node, write_node
from cluster.node import host_memory
from cluster.node.exporter import Exporter, export_account
from cluster.node.health_watch import HealthWatch
from cluster.node.host_memory import AskStanding, Standing
from cluster.node.rank_watch import Beat, RankWatch
from cluster.node.wire_speed import Sink
from infra.errors import DataError, StoreError
from infra.notices import NoticeSettings, NoticeWatch, sources
from infra.processes import this_machine
from infra.storage import open_store
from infra.telemetry import hide_secrets_in_logs

log = logging.getLogger(__name__)

GOING_S = 2.0
"""How long workers may take to end before they are killed."""
KEEP_S = 0.5
"""Seconds between an agent's own chores."""
UNLED_S = 2.0
"""A controller that has not listened for this long may be gone: the agent then asks about the run."""


@dataclass(frozen=True)
class AgentSettings:
    """Settings that all agents of a group share."""

    orphan_s: float = 300.0
    """Seconds that agents and workers live without a controller."""
    accounts: tuple[str, str, str] | None = None
    """(store URL, run id, group) for the goodput records and the stacks of killed ranks."""
    notices: NoticeSettings = field(default_factory=NoticeSettings)
    health: HealthSettings = field(default_factory=HealthSettings)
    journal: Path | None = None
    """The group's journal file: its memory is needed while that exists; see cluster.node.host_memory.Owner."""
    leader: int = 0
    """Number of the controller that started the agent; later ones have higher numbers."""
    ask_standing: AskStanding | None = None
    """Tells whether the run of `accounts` still runs; None: only `orphan_s` counts."""


@dataclass(frozen=True)
class AgentPlace:
    """The arguments of an agent's start."""

    group: str
    node: str
    folder: Path
    settings: AgentSettings = field(default_factory=AgentSettings)
    living: tuple[str, ...] = ()
    """Nodes of the cluster: the agent takes over the group's memory on this machine under other nodes' names."""
    end_actors: Callable[[str], None] = lambda group: None
    """Ends the group's actors that have no beacon yet."""


class NodeAgent:
    """A plain class; cluster.controller.fleet makes actors of it. Every method call runs in its own thread."""

    def __init__(self, place: AgentPlace) -> None:
        hide_secrets_in_logs()
        self.place = place
        self.settings = settings = place.settings
        inherit(place.folder, place.living, settings.leader)
        host_memory.claim(place.folder, place.group, settings.journal, settings.accounts, settings.leader)
        self._store = None if settings.accounts is None else open_store(settings.accounts[0])
        self._watch = RankWatch(place.node, place.folder, before=self._before())
        self._notices = NoticeWatch(sources(place.node, settings.notices))
        self._health = HealthWatch(settings.health)
        self._sink = Sink(get_node_ip_address())
        self._heard_at = time.monotonic()
        self._leader = settings.leader
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._exporter = Exporter("" if settings.accounts is None else settings.accounts[1], place.group)
        threading.Thread(target=self._keep, name="keeper", daemon=True).start()

    def listen(self, after: int, timeout_s: float, first_row: int = 0, row_floor: int = 0, leader: int = 0) -> Beat:
        """See RankWatch.wait.

        Raises:
            Superseded: a controller with a higher number than `leader` has listened.
        """
        self._follow(leader)
        if self._failure is not None:
            raise self._failure
        self._heard_at = time.monotonic()
        beat = self._watch.wait(after, timeout_s, first_row, row_floor)
        return replace(beat, notice=self._notices.earliest(), health=self._health.latest(), sink=self._sink.address)

    def kill(self, workers: Collection[str], reason: str, leader: int = 0) -> dict[str, str]:
        """SIGKILL workers after taking their stacks; returns {worker: location of its stacks, or the stacks}.

        Raises:
            Superseded: a later controller leads.
        """
        self._follow(leader)
        stacks = self._watch.kill(workers)
        if self._store is None or self.settings.accounts is None:
            return stacks
        places = {}
        for worker, text in stacks.items():
            key = f"runs/{self.settings.accounts[1]}/stacks/{self.place.group}-{worker}.txt"
            try:
                self._store.put(key, f"{worker} was killed: {reason}\n\n{text}\n".encode())
                places[worker] = key
            except StoreError as error:
                places[worker] = f"{error}\n{text}"
        return places

    def discard(self, workers: Collection[str], leader: int = 0) -> None:
        """Forget dead workers that the controller knows of.

        Raises:
            Superseded: a later controller leads.
        """
        self._follow(leader)
        self._watch.discard(workers)

    def close(self, remove: bool, leader: int = 0) -> None:
        """The group has ended: end all workers, write the accounts, and free the memory if asked.

        Raises:
            Superseded: a later controller leads.
        """
        self._follow(leader)
        self._end(remove)

    def _follow(self, leader: int) -> None:
        if leader < self._leader:
            raise Superseded(f"group {self.place.group}: controller {self._leader} leads, this is number {leader}")
        self._leader = leader

    def _end(self, remove: bool) -> None:
        self._ended.set()
        self._notices.close()
        self._health.close()
        self._sink.close()
        if not self._await_deaths(GOING_S):
            self._watch.end(self._watch.workers())
            self._await_deaths(GOING_S)
        self._write(last=True)
        self._watch.close(remove)
        with contextlib.suppress(OSError):  # others may have files there
            self.place.folder.parent.rmdir()

    def _await_deaths(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self._watch.workers() and time.monotonic() < deadline:
            time.sleep(0.005)
        return not self._watch.workers()

    def _keep(self) -> None:
        """Remove what ended runs left on this machine, write the account at intervals, and notice a lost
        controller."""
        written_at, known = 0.0, 0
        try:
            shared = self.place.folder.parent.parent
            host_memory.free(host_memory.survey(self.settings.ask_standing, shared), shared)
            while not self._ended.wait(min(KEEP_S, self.settings.orphan_s / 4)):
                host_memory.touch(self.place.folder)
                now = time.monotonic()
                if now - written_at > PERIOD_S or self._watch.known != known:  # a node may be lost soon
                    written_at, known = now, self._watch.known
                    self._write()
                if now - self._heard_at > UNLED_S:
                    self._watch.keep_rows()
                    self._leave_if_over(now)
        except BaseException as error:  # raised again in listen(); without touches the workers end by themselves
            self._failure = error

    def _leave_if_over(self, now: float) -> None:
        standing = self._standing()
        if standing == "open" and now - self._heard_at <= self.settings.orphan_s:
            return
        with contextlib.suppress(Exception):  # the cluster may be shutting down; this agent ends the workers
            self.place.end_actors(self.place.group)
        self._watch.end(self._watch.workers())
        self._end(remove=standing == "over")
        os._exit(0)

    def _standing(self) -> Standing:
        if self.settings.ask_standing is None or self.settings.accounts is None:
            return "open"
        try:
            return self.settings.ask_standing(*self.settings.accounts[:2])
        except StoreError:
            return "open"

    def _before(self) -> tuple[RankAccount, ...]:
        if self._store is None or self.settings.accounts is None:
            return ()
        try:
            account = read_node(self._store, *self.settings.accounts[1:], self.place.node)
        except (StoreError, DataError) as error:
            log.warning("the account of this node so far is lost: %s", error)
            return ()
        return () if account is None else account.ranks

    def _write(self, last: bool = False) -> None:
        account = self._watch.account()
        export_account(self._exporter, account)
        if self._store is not None and self.settings.accounts is not None:
            _, run, group = self.settings.accounts
            try:
                write_node(self._store, run, group, account, last)
            except StoreError:
                return  # the next write has everything again


def inherit(folder: Path, living: Collection[str], leader: int = 0) -> None:
    """Take over the shards that earlier nodes left in this machine's memory (Ray was started again here).

    Folders of live nodes, and of live agents of this very controller, stay. Workers that still live in the others (of a
    cluster that lost its head) are killed: the present controller cannot reach them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {f"recua-node-{node[:16]}" for node in living}
    for other in folder.parent.parent.glob(f"recua-node-*/{folder.name}"):
        owner = host_memory.owner_of(other)
        if other == folder or other.parent.name in names:
            continue
        if owner is not None and owner.leader >= leader and host_memory.agent_lives(owner):
            continue  # of a node that has just started
        if owner is not None and owner.machine == this_machine():
            _kill(host_memory.living_workers(other))
        heirs = [*other.glob("*.shard")]
        for path in heirs:
            path.rename(folder / path.name)
        beacons = other / host_memory.BEACONS
        for path in beacons.glob("*.beacon"):
            (folder / host_memory.BEACONS).mkdir(exist_ok=True)
            path.rename(folder / host_memory.BEACONS / path.name)
        shutil.rmtree(other, ignore_errors=True)
        with contextlib.suppress(OSError):
            other.parent.rmdir()


def _kill(pids: Collection[int]) -> None:
    """SIGKILL processes, and wait until they are gone: they may be sealing a shard."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                select.select([descriptor], [], [], GOING_S)
            finally:
                os.close(descriptor)
