"""Which snapshots are whole, according to the shards that node agents list."""

from collections import defaultdict
from collections.abc import Iterator

from cluster.core import messages as m
from cluster.node.rank_watch import Shard


class HeldShards:
    """Args:
    replicated: every rank's shard is the whole state.
    """

    def __init__(self, replicated: bool) -> None:
        self._replicated = replicated
        self._on: dict[str, tuple[Shard, ...]] = {}
        self._told: dict[tuple[int, int], dict[str, frozenset[int]]] = {}

    def lose(self, node: str) -> None:
        """Forget a node's shards: its memory is gone."""
        self._on.pop(node, None)

    def saw(self, node: str, shards: tuple[Shard, ...]) -> Iterator[m.SnapshotHeld]:
        """Take one node's shards; yields the snapshots that are now whole on other nodes than reported before."""
        self._on[node] = shards
        found: dict[tuple[int, int, int], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for holder, listed in self._on.items():
            for generation, step, rank, world in listed:
                found[generation, step, world][holder].add(0 if self._replicated else rank)
        for (generation, step, world), on in found.items():
            whole = {holder: frozenset(ranks) for holder, ranks in on.items()}
            size = 1 if self._replicated else world
            if len(frozenset().union(*whole.values())) == size and self._told.get((generation, step)) != whole:
                self._told[generation, step] = whole
                yield m.SnapshotHeld(generation, step, size, whole)
        current = {(generation, step) for generation, step, _ in found}
        self._told = {key: value for key, value in self._told.items() if key in current}
