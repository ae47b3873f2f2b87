"""The source of the state after a fault: the newest snapshot with all shards alive, else storage.

`SnapshotBook` records which node holds which shard; `choose` is the policy. Only node agents hold snapshots (in shared
memory), so a dead process loses none; a dead node loses all of its own.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.policies.decision import Decision, key

KEPT = 2
"""Snapshots kept whole in host memory: k and k-1. As many verified ones (or due to be) stay for longer."""

MOST = 256
"""Most snapshots in the book, even if the outcomes of their steps never arrive."""


def place_replicas(nodes: Sequence[str], replicas: int) -> dict[str, set[int]]:
    """{node: shards to hold}: each rank's shard on its own node and on the next `replicas` other nodes.

    `nodes[r]` is the node of rank r; the ring of nodes is in the order of their first ranks, so that copies spread
    evenly. With fewer nodes than copies, every node holds one.
    """
    own: dict[str, set[int]] = {}
    for shard, node in enumerate(nodes):
        own.setdefault(node, set()).add(shard)
    ring = list(own)
    copies = min(replicas, len(ring) - 1)
    placed = {}
    for position, node in enumerate(ring):
        before = (ring[position - distance] for distance in range(copies + 1))
        placed[node] = set().union(*(own[holder] for holder in before))
    return placed


@dataclass
class Snapshot:
    """One snapshot's acknowledged copies; shards are the ranks of the group that took it."""

    step: int
    world_size: int
    generation: int
    on: dict[str, set[int]] = field(default_factory=dict)
    """Node -> shards whose checksummed copy it holds."""
    copies: Counter[int] = field(default_factory=Counter)
    """Shard -> living copies; 0 once the last one is gone."""
    lost: set[int] = field(default_factory=set)
    """Shards that were acknowledged but have no copy left."""

    @property
    def whole(self) -> bool:
        """Every shard was acknowledged, and each still has a copy."""
        return self.missing == 0

    @property
    def missing(self) -> int:
        return self.world_size - len(self.copies) + len(self.lost)

    def add(self, node: str, shards: Iterable[int]) -> None:
        mine = self.on.setdefault(node, set())
        new = set(shards).difference(mine)
        mine |= new
        self.copies.update(new)
        if self.lost:
            self.lost -= new

    def drop(self, node: str, shards: Iterable[int]) -> None:
        mine = self.on.get(node, set())
        for shard in mine.intersection(shards):
            mine.discard(shard)
            self.copies[shard] -= 1
            if self.copies[shard] == 0:
                self.lost.add(shard)


@dataclass(frozen=True)
class Restore:
    """Load step `step` from `source`: "memory", "storage", or "start" (fresh parameters, step 0).

    For "memory", `on` maps nodes to their shards, of `world_size` in all.
    """

    step: int
    source: str
    world_size: int = 0
    generation: int = 0
    """The generation that took it: node agents keep snapshots by (generation, step)."""
    on: Mapping[str, Iterable[int]] = field(default_factory=dict, compare=False, repr=False)


class SnapshotBook:
    """Snapshots of this run's present trajectory, by step.

    Args:
        stays: whether ranks keep the snapshot of a step for longer: the newest two, and the newest verified one.
    """

    def __init__(self, stays: Callable[[int], bool] = lambda step: False) -> None:
        self._stays = stays
        self.verified = 0
        """The last step with a verified state."""
        self.doubtful: float = math.inf
        """The first step that may have to be undone, or has no known outcome: the state before it stays."""
        self.snapshots: dict[int, Snapshot] = {}
        self.flushed: set[int] = set()
        """Steps whose state is whole in storage (manifest written)."""

    def held(self, step: int, world_size: int, generation: int, shards_on: Mapping[str, Iterable[int]]) -> None:
        """Node agents acknowledge checksummed copies: {node: shards}. Copies of the newer generation count."""
        snapshot = self.snapshots.get(step)
        if snapshot is None or snapshot.generation < generation:
            snapshot = self.snapshots[step] = Snapshot(step, world_size, generation)
        elif snapshot.generation > generation:
            return
        for node, shards in shards_on.items():
            snapshot.add(node, shards)
        whole = sorted(step for step, one in self.snapshots.items() if one.whole)
        if len(whole) >= KEPT:
            stay = [step for step in whole if self._stays(step)]
            kept = {*whole[-KEPT:], *stay[-KEPT:], *[step for step in stay if step <= self.verified][-1:]}
            needed = min(whole[-KEPT], *([step for step in whole if step <= self.doubtful][-KEPT:] or [0]))
            needed = max(needed, whole[-MOST:][0])
            for old in [step for step in self.snapshots if step < needed and step not in kept]:
                del self.snapshots[old]

    def drop_nodes(self, nodes: Iterable[str]) -> None:
        """Drop copies on nodes whose memory is gone."""
        for node in nodes:
            for snapshot in self.snapshots.values():
                snapshot.drop(node, snapshot.on.get(node, ()))
                snapshot.on.pop(node, None)

    def truncate(self, step: int) -> None:
        """Training goes back to `step`: newer snapshots belong to a discarded future."""
        self.snapshots = {one: snapshot for one, snapshot in self.snapshots.items() if one <= step}
        self.flushed = {one for one in self.flushed if one <= step}


def choose(book: SnapshotBook, newest_trusted: int | None = None) -> tuple[Restore | None, Decision]:
    """The newest restorable step, and why. None: no state is left although training had progressed.

    A snapshot counts if every shard was acknowledged by a node that still lives; shards without a living copy are
    allowed if storage has the same step. `newest_trusted` excludes later steps (a rollback).
    """
    why: list[str] = []
    best_stored = max((s for s in book.flushed if newest_trusted is None or s <= newest_trusted), default=None)
    for step in sorted(book.snapshots, reverse=True):
        snapshot = book.snapshots[step]
        if newest_trusted is not None and step > newest_trusted:
            continue
        if best_stored is not None and step < best_stored:
            break
        if snapshot.whole or step in book.flushed:
            restore = Restore(step, "memory", snapshot.world_size, snapshot.generation, snapshot.on)
            return restore, Decision("memory", _join(why, f"snapshot {step} is whole"), key("snapshot_replicas"))
        why.append(f"snapshot {step} lacks {snapshot.missing} of {snapshot.world_size} shards")
    if best_stored is not None:
        text = _join(why, f"storage has step {best_stored}")
        return Restore(best_stored, "storage"), Decision("storage", text, key("snapshot_replicas"))
    return None, Decision("none", _join(why, "no step was saved"), key("snapshot_replicas"))


def _join(why: list[str], last: str) -> str:
    return ", ".join([*why, last])
