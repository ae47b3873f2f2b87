"""Reading one snapshot into any mesh; `engines.snapshots.dcp` gives it to torch's own loader.

Planning is local: who needs which part of which shard follows from the shards' descriptions and the reader's own place,
without a collective. Only shards that are needed are opened, each is verified first, and where several hold the same
piece the next one is taken when one is refused.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engines.snapshots.shard import Layout, Part, Piece, Shard, ShardName
from infra.errors import CheckpointError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Entry:
    """One whole tensor of a snapshot. `chunks`: the pieces that its shards cut it into, sizes by offsets."""

    dtype: str
    shape: tuple[int, ...]
    chunks: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)


class SnapshotReader:
    """Over shards that lie anywhere.

    Args:
        layouts: descriptions of the snapshot's shards, those nearest to this process first.
        open_shard: fetches and verifies one; CheckpointError where no good copy of it is left.
        moved: called before every piece that is read.
        more: descriptions of further shards, asked for when those of `layouts` were refused.
    """

    def __init__(
        self,
        layouts: Mapping[ShardName, Layout],
        open_shard: Callable[[ShardName], Shard],
        moved: Callable[[], None] = lambda: None,
        more: Callable[[], Mapping[ShardName, Layout]] | None = None,
    ) -> None:
        self._open, self._opened = open_shard, dict[ShardName, Shard | CheckpointError]()
        self._moved, self._more = moved, more
        self._places: dict[tuple[str, tuple[int, ...]], list[tuple[ShardName, Part]]] = {}
        self.entries: dict[str, Entry] = {}
        self._add(layouts)

    def _add(self, layouts: Mapping[ShardName, Layout]) -> None:
        for name, layout in layouts.items():
            for part in layout.parts:
                if part.name not in self.entries:
                    self.entries[part.name] = Entry(part.dtype, tuple(part.global_shape))
                offsets = tuple(part.offsets)
                self.entries[part.name].chunks.setdefault(offsets, tuple(part.sizes))
                self._places.setdefault((part.name, offsets), []).append((name, part))

    def _take_more(self) -> bool:
        more, self._more = self._more, None
        if more is not None:
            self._add(more())
        return more is not None

    def read(self, name: str, offsets: tuple[int, ...], start: Sequence[int], lengths: Sequence[int]) -> "torch.Tensor":
        """Of the chunk of a tensor that begins at `offsets`, the part from `start` (within it) on, in place.

        Raises:
            CheckpointError: no shard that holds it is intact.
        """
        return _narrowed(self._read((name, offsets)), start, lengths)

    def read_same(self, piece: Piece) -> "torch.Tensor | None":
        """The same of exactly this piece; None where shards cut the tensor in another way."""
        index = (piece.name, tuple(piece.offsets))
        places = self._places.get(index)
        return self._read(index) if places and tuple(places[0][1].sizes) == tuple(piece.tensor.shape) else None

    def _read(self, index: tuple[str, tuple[int, ...]]) -> "torch.Tensor":
        self._moved()
        refused = []
        for name, part in self._places[index]:
            shard = self._shard(name)
            if not isinstance(shard, CheckpointError):
                return shard.tensor(part)
            refused.append(str(shard))
        if self._take_more():
            return self._read(index)
        raise CheckpointError(f"no intact copy of {index[0]}: {'; '.join(refused)}")

    def progress(self, rank: int) -> dict[str, Any]:
        """What the learner of `rank` noted beside its tensors, or another rank's where that one is lost."""
        names = sorted({name for places in self._places.values() for name, _ in places})
        for name in sorted(names, key=lambda name: name.rank != rank):
            shard = self._shard(name)
            if isinstance(shard, Shard):
                return {**shard.progress, "of_rank": name.rank, "of_world": name.world_size}
        if self._take_more():
            return self.progress(rank)
        raise CheckpointError("no intact shard")

    def _shard(self, name: ShardName) -> Shard | CheckpointError:
        if name not in self._opened:
            try:
                self._opened[name] = self._open(name)
            except CheckpointError as error:
                self._opened[name] = error
        return self._opened[name]


def restore(pieces: Sequence[Piece], reader: SnapshotReader) -> None:
    """Fill live tensors, whatever part of the whole each is.

    Raises:
        CheckpointError: a tensor is unknown to the snapshot, has another shape there, or is not whole or intact; the
            tensors are then partly filled.
    """
    import torch

    with torch.no_grad():
        for piece in pieces:
            if piece.tensor.numel():
                _fill(piece, reader)


def _fill(piece: Piece, reader: SnapshotReader) -> None:
    entry = reader.entries.get(piece.name)
    if entry is None:
        raise CheckpointError(f"the snapshot has no {piece.name}")
    if entry.shape != tuple(piece.global_shape):
        raise CheckpointError(f"{piece.name} is {entry.shape} in the snapshot, {piece.global_shape} here")
    if (same := reader.read_same(piece)) is not None:  # the mesh is as it was
        piece.tensor.copy_(same)
        return
    filled = 0
    for offsets, sizes in list(entry.chunks.items()):
        start, lengths = _overlap(piece.offsets, piece.tensor.shape, offsets, sizes)
        if 0 in lengths:
            continue
        target = _narrowed(piece.tensor, _within(start, piece.offsets), lengths)
        target.copy_(reader.read(piece.name, offsets, _within(start, offsets), lengths))
        filled += math.prod(lengths)
    if filled != piece.tensor.numel():
        raise CheckpointError(f"the snapshot has {filled} of {piece.tensor.numel()} elements of {piece.name}")


def _overlap(
    ours: Sequence[int], our_sizes: Sequence[int], theirs: Sequence[int], their_sizes: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Where two pieces of a tensor have elements in common: (start in the whole, lengths); a length of 0 if nowhere."""
    start = [max(offsets) for offsets in zip(ours, theirs, strict=True)]
    our_ends = [sum(ends) for ends in zip(ours, our_sizes, strict=True)]
    their_ends = [sum(ends) for ends in zip(theirs, their_sizes, strict=True)]
    ends = zip(start, our_ends, their_ends, strict=True)
    return start, [max(0, min(our_end, their_end) - first) for first, our_end, their_end in ends]


def _within(start: Sequence[int], offsets: Sequence[int]) -> list[int]:
    return [first - offset for first, offset in zip(start, offsets, strict=True)]


def _narrowed(tensor: "torch.Tensor", start: Sequence[int], lengths: Sequence[int]) -> "torch.Tensor":
    for dimension, (first, length) in enumerate(zip(start, lengths, strict=True)):
        tensor = tensor.narrow(dimension, first, length)
    return tensor
