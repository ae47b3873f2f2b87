"""The accounts of a run's elastic groups in its store, and their sums.

    runs/<run>/goodput/<group>/group.json        by the controller: capacity, nodes, pauses (`GroupAccount`)
    runs/<run>/goodput/<group>/nodes/<node>.json by each node agent: its ranks' ledgers so far (`NodeAccount`)

Every object is replaced as a whole about once in `PERIOD_S` and at the end, and covers everything since the start, so a
lost write costs nothing and nothing grows with time. Missing data is named, never guessed: a node without an account
and a life without a recorded end count as unattributed.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from cluster.goodput.buckets import FORMAT, Goodput, Ledger, merge
from infra.errors import DataError
from infra.storage import Store

PERIOD_S = 10.0
"""Seconds between two writes of a node agent."""
NOTED_SHARE = 1e-3
"""Gaps below this share of the capacity are not worth a line."""


@dataclass(frozen=True)
class RankAccount:
    """One process from its birth to `until` (seconds since the epoch). `gone`: it ended there."""

    worker: str
    born: float
    until: float
    ledger: Ledger
    gone: bool = False


@dataclass(frozen=True)
class NodeAccount:
    """All ranks that have lived on one node of the group."""

    node: str
    ranks: tuple[RankAccount, ...]

    def to_json(self) -> dict[str, Any]:
        ranks = [
            {"worker": r.worker, "born": r.born, "until": r.until, "gone": r.gone, "ledger": r.ledger.to_json()}
            for r in self.ranks
        ]
        return {"format": FORMAT, "node": self.node, "ranks": ranks}

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> "NodeAccount":
        """Raises DataError for another format."""
        _check_format(tree)
        ranks = tuple(
            RankAccount(r["worker"], r["born"], r["until"], Ledger.from_json(r["ledger"]), r["gone"])
            for r in tree["ranks"]
        )
        return NodeAccount(tree["node"], ranks)


@dataclass(frozen=True)
class Pause:
    """Training stood still from `began` to `ended`, and resumed as `generation`. `key` governs the decision.

    `lost_steps`: committed steps that were undone.
    Example: Pause(101.2, 101.7, 4, "replace", "w3 died", "elastic.spares").
    """

    began: float
    ended: float
    generation: int
    action: str
    reason: str
    key: str
    ranks: int = 0
    lost_steps: int = 0
    rolled_back: bool = False
    """Undone on purpose (NaN, spike, corruption), not by an infrastructure fault."""


@dataclass(frozen=True)
class NodeLife:
    """A node as the controller knows it; `ranks`: the most ranks that it held at once."""

    since: float
    lost: float | None
    ranks: int


@dataclass(frozen=True)
class GroupAccount:
    """The controller's record of its group. Times in seconds since the epoch (in a simulation: since its start).

    `capacity`: (since, ranks asked for, spares included), in order; `spares`: their number in the last entry.
    `until`: when this was written.
    """

    group: str
    started: float
    until: float
    ended: bool
    capacity: tuple[tuple[float, int], ...]
    nodes: Mapping[str, NodeLife] = field(default_factory=dict)
    pauses: tuple[Pause, ...] = ()
    spares: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> "GroupAccount":
        """Raises DataError for another format."""
        _check_format(tree)
        return GroupAccount(
            tree["group"],
            tree["started"],
            tree["until"],
            tree["ended"],
            tuple((since, ranks) for since, ranks in tree["capacity"]),
            {node: NodeLife(**life) for node, life in tree["nodes"].items()},
            tuple(Pause(**pause) for pause in tree["pauses"]),
            tree.get("spares", 0),
        )


@dataclass(frozen=True)
class GroupReport:
    """A group's goodput, its pauses, and the gaps in its records. `lives`: the number of processes with a place in it;
    `worst_unattributed`: the largest share of such a life that no bucket claims."""

    group: str
    ended: bool
    goodput: Goodput
    pauses: tuple[Pause, ...]
    missing: tuple[str, ...]
    lives: int = 0
    worst_unattributed: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "ended": self.ended,
            **self.goodput.to_json(),
            "lives": self.lives,
            "worst_unattributed": round(self.worst_unattributed, 6),
            "pauses": [asdict(pause) for pause in self.pauses],
            "missing": list(self.missing),
        }

    def to_text(self) -> str:
        """Shares, pauses, gaps: for people."""
        lines = [f"{self.group}: {self.goodput.to_text()}"]
        if self.lives:
            worst = f"of one at most {self.worst_unattributed:.3%} of its life"
            lines.append(f"ranks that lived: {self.lives}, unattributed {worst}")
        if self.pauses:
            seconds = sorted(pause.ended - pause.began for pause in self.pauses)
            middle, lost = seconds[len(seconds) // 2], sum(p.lost_steps for p in self.pauses if not p.rolled_back)
            text = f"pauses: {len(seconds)}, median {middle:.2f} s, longest {seconds[-1]:.2f} s"
            lines.append(f"{text}, steps lost to faults: {lost}")
            lines += [f"  {_pause_line(pause)}" for pause in self.pauses]
        return "\n".join([*lines, *(f"missing: {gap}" for gap in self.missing)])


def account(group: GroupAccount, nodes: Sequence[NodeAccount]) -> GroupReport:
    """Add up a group's records."""
    known = _each_once(nodes)
    end = group.until
    if not group.ended:
        end = max([end, *(rank.until for node in nodes for rank in node.ranks)])
    wall = end - group.started
    asked = _capacity_s(group.capacity, group.started, end)
    ledgers: list[Ledger] = []
    missing = (
        [] if group.ended else ["the group has not ended, or its controller died: the account is of what is written"]
    )
    for node, life in group.nodes.items():
        last = end if life.lost is None else life.lost
        if node not in known:
            unknown = Ledger(life.ranks * max(0.0, last - life.since))
            ledgers.append(unknown)
            missing.append(f"{node}: no account; {unknown.lived_s:.1f} rank-seconds are unattributed")
            continue
        unwritten = 0.0
        if (strangers := life.ranks - len(known[node].ranks)) > 0 and last > life.since:
            unknown = Ledger(strangers * (last - life.since))
            ledgers.append(unknown)
            missing.append(f"{node}: no account of {strangers}; {unknown.lived_s:.1f} rank-seconds are unattributed")
        for rank in known[node].ranks:
            tail = 0.0 if rank.gone else max(0.0, last - rank.until)
            unwritten += tail
            ledgers.append(Ledger(rank.ledger.lived_s + tail, rank.ledger.seconds))
        if unwritten > NOTED_SHARE * asked:
            missing.append(f"{node}: its account ends early; {unwritten:.1f} rank-seconds are unattributed")
    for node in sorted(known.keys() - group.nodes.keys()):
        ledgers += [rank.ledger for rank in known[node].ranks]
        missing.append(f"{node}: has an account, and the controller's record does not know it")
    capacity = asked / wall if wall else float(group.capacity[-1][1])
    goodput = Goodput(merge(ledgers), capacity, wall, group.spares)
    shares = [abs(one.unattributed_s) / one.lived_s for one in ledgers if one.lived_s]
    lives = sum(len(node.ranks) for node in known.values())
    return GroupReport(group.group, group.ended, goodput, group.pauses, tuple(missing), lives, max(shares, default=0.0))


def write_group(store: Store, run_id: str, group: GroupAccount) -> None:
    """Replace the controller's record; only the last one of a group is flushed to disk."""
    store.put(f"{_folder(run_id)}/{group.group}/group.json", _encode(group.to_json()), durable=group.ended)


def write_node(store: Store, run_id: str, group: str, node: NodeAccount, last: bool = False) -> None:
    """Replace a node's record."""
    store.put(f"{_folder(run_id)}/{group}/nodes/{node.node}.json", _encode(node.to_json()), durable=last)


def read_group(store: Store, run_id: str, group: str) -> GroupAccount | None:
    """A controller's record of its group. Raises DataError like `read_run`."""
    tree = _decode(store, f"{_folder(run_id)}/{group}/group.json")
    return None if tree is None else GroupAccount.from_json(tree)


def read_node(store: Store, run_id: str, group: str, node: str) -> NodeAccount | None:
    """An agent's record of its node. Raises DataError like `read_run`."""
    tree = _decode(store, f"{_folder(run_id)}/{group}/nodes/{node}.json")
    return None if tree is None else NodeAccount.from_json(tree)


def read_run(store: Store, run_id: str) -> list[GroupReport]:
    """The reports of a run's elastic groups; empty if it had none, or none wrote anything.

    Raises:
        DataError: a record is damaged, or of another format.
    """
    reports = []
    for name in store.folders(_folder(run_id)):
        folder = f"{_folder(run_id)}/{name}"
        tree = _decode(store, f"{folder}/group.json")
        nodes = [NodeAccount.from_json(_decode(store, key) or {}) for key in store.list(f"{folder}/nodes")]
        if tree is None:
            lives = [(r.born, r.until) for node in nodes for r in node.ranks]
            raise DataError(f"{folder}: {len(lives)} ranks have accounts, and their controller wrote no group.json")
        reports.append(account(GroupAccount.from_json(tree), nodes))
    return reports


def _each_once(nodes: Sequence[NodeAccount]) -> dict[str, NodeAccount]:
    """A rank whose beacon a later node of the machine took over is in both accounts: the longer one counts."""
    newest: dict[str, tuple[float, str]] = {}
    for node in nodes:
        for rank in node.ranks:
            newest[rank.worker] = max(newest.get(rank.worker, (rank.until, node.node)), (rank.until, node.node))
    kept = {n.node: tuple(rank for rank in n.ranks if newest[rank.worker][1] == n.node) for n in nodes}
    return {node: NodeAccount(node, ranks) for node, ranks in kept.items()}


def _pause_line(pause: Pause) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(pause.began))
    how = "rolled back" if pause.rolled_back else "lost"
    lost = f"  {pause.lost_steps} step{'s' * (pause.lost_steps != 1)} {how}" if pause.lost_steps else ""
    return f"{clock}  {pause.ended - pause.began:.2f} s{lost}  {pause.action}: {pause.reason} ({pause.key})"


def _folder(run_id: str) -> str:
    return f"runs/{run_id}/goodput"


def _capacity_s(capacity: Sequence[tuple[float, int]], started: float, end: float) -> float:
    """Rank-seconds asked for."""
    changes = [*capacity, (end, 0)]
    spans = pairwise(changes)
    return sum(ranks * (min(then, end) - max(since, started)) for (since, ranks), (then, _) in spans if since < end)


def _encode(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, separators=(",", ":")).encode()


def _decode(store: Store, key: str) -> dict[str, Any] | None:
    raw = store.get(key)
    if raw is None:
        return None
    try:
        tree = json.loads(raw)
        return dict(tree)
    except (ValueError, TypeError) as error:
        raise DataError(f"{store.url}/{key}: not a goodput record: {error}") from None


def _check_format(tree: Mapping[str, Any]) -> None:
    if tree.get("format") != FORMAT:
        raise DataError(f"goodput record: format {tree.get('format')!r}, this version reads {FORMAT}")
