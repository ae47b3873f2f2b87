"""Which snapshot can a group resume from? Pure functions of what the holders have.

A snapshot is one (generation, step). It is whole when every rank's shard is there, or when those that are there cover
every tensor (replicated parameters: one survivor is enough). Of several the newest generation's newest step is taken: a
generation starts from a step that all its ranks agreed on, so what an older one computed after it never counts.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engines.snapshots.shard import Layout, ShardName


@dataclass(frozen=True, order=True)
class SnapshotName:
    """All shards of one step of one generation."""

    generation: int
    step: int

    def __str__(self) -> str:
        return f"generation {self.generation}, step {self.step}"


def snapshots(
    names: Iterable[ShardName], layout: Callable[[ShardName], Layout | None]
) -> list[tuple[SnapshotName, list[ShardName]]]:
    """The whole snapshots, best first, with the shards that are there.

    `layout` reads a shard's description, None where it is damaged; only asked when ranks are missing.
    """
    found: dict[SnapshotName, set[ShardName]] = defaultdict(set)
    for name in names:
        found[SnapshotName(name.generation, name.step)].add(name)
    whole = []
    for snapshot in sorted(found, reverse=True):
        shards = sorted(found[snapshot])
        if len(shards) == shards[0].world_size or covers(filter(None, map(layout, shards))):
            whole.append((snapshot, shards))
    return whole


def covers(layouts: Iterable[Layout]) -> bool:
    """Whether the shards hold every element of every tensor that any of them knows, and of as many as there are.

    Shards of one snapshot cut a tensor into the same pieces, so two pieces are equal or apart, and counting suffices.
    """
    tensors, sizes = 0, dict[str, int]()
    pieces: dict[str, dict[tuple[int, ...], int]] = defaultdict(dict)
    for layout in layouts:
        tensors = max(tensors, layout.tensors)
        for part in layout.parts:
            sizes[part.name] = math.prod(part.global_shape)
            pieces[part.name][part.offsets] = math.prod(part.sizes)
    return len(sizes) >= max(1, tensors) and all(sum(pieces[name].values()) == size for name, size in sizes.items())
