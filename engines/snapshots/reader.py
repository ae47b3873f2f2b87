"""Reading one snapshot into any mesh: the shards as a DCP checkpoint in memory, and `restore` for our own learners.

Planning is local: who needs which part of which shard follows from the shards' descriptions and the reader's own place,
without a collective. Only shards that are needed are opened, each is verified first, and where several hold the same
piece the next one is taken when one is refused.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from engines.snapshots.shard import Layout, Part, Piece, Shard, ShardName
from infra.errors import CheckpointError


class SnapshotReader(StorageReader):
    """A `StorageReader` for `torch.distributed.checkpoint.load`, over shards that lie anywhere.

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
        self._places: dict[MetadataIndex, list[tuple[ShardName, Part]]] = {}
        self.metadata = Metadata(state_dict_metadata={})
        self._add(layouts)

    def _add(self, layouts: Mapping[ShardName, Layout]) -> None:
        entries: dict[str, Any] = self.metadata.state_dict_metadata
        for name, layout in layouts.items():
            for part in layout.parts:
                entry = entries.get(part.name)
                if entry is None:
                    properties = TensorProperties(dtype=getattr(torch, part.dtype))
                    entry = TensorStorageMetadata(properties, torch.Size(part.global_shape), [])
                    entries[part.name] = entry
                places = self._places.setdefault(MetadataIndex(part.name, part.offsets), [])
                if not places:
                    entry.chunks.append(ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)))
                places.append((name, part))

    def _take_more(self) -> bool:
        more, self._more = self._more, None
        if more is not None:
            self._add(more())
        return more is not None

    def read(self, item: ReadItem) -> torch.Tensor:
        """The part of a shard that `item` asks for, in place.

        Raises:
            CheckpointError: no shard that holds it is intact.
        """
        tensor = self._read(MetadataIndex(item.storage_index.fqn, item.storage_index.offset))
        for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            tensor = tensor.narrow(dimension, start, length)
        return tensor

    def read_same(self, piece: Piece) -> torch.Tensor | None:
        """The same of exactly this piece; None where shards cut the tensor in another way."""
        index = MetadataIndex(piece.name, piece.offsets)
        places = self._places.get(index)
        return self._read(index) if places and tuple(places[0][1].sizes) == tuple(piece.tensor.shape) else None

    def _read(self, index: MetadataIndex) -> torch.Tensor:
        self._moved()
        refused = []
        for name, part in self._places[index]:
            shard = self._shard(name)
            if not isinstance(shard, CheckpointError):
                return shard.tensor(part)
            refused.append(str(shard))
        if self._take_more():
            return self._read(index)
        raise CheckpointError(f"no intact copy of {index.fqn}: {'; '.join(refused)}")

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

    # ---- torch's StorageReader; later versions may pass more arguments ---------------------------------------------

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.metadata.storage_meta = StorageMeta()
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            target.copy_(self.read(item))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


@torch.no_grad()
def restore(pieces: Sequence[Piece], reader: SnapshotReader) -> None:
    """Fill live tensors, whatever part of the whole each is.

    Raises:
        CheckpointError: a tensor is unknown to the snapshot, has another shape there, or is not whole or intact; the
            tensors are then partly filled.
    """
    for piece in pieces:
        if not piece.tensor.numel():
            continue
        entry = reader.metadata.state_dict_metadata.get(piece.name)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"the snapshot has no {piece.name}")
        if tuple(entry.size) != tuple(piece.global_shape):
            raise CheckpointError(f"{piece.name} is {tuple(entry.size)} in the snapshot, {piece.global_shape} here")
        if (same := reader.read_same(piece)) is not None:  # the mesh is as it was
            piece.tensor.copy_(same)
            continue
        own = ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.shape)
        filled = 0
        for item in create_read_items_for_chunk_list(piece.name, entry, [own]):
            target = piece.tensor
            for dimension, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
                target = target.narrow(dimension, start, length)
            target.copy_(reader.read(item))
            filled += math.prod(item.lengths)
        if filled != piece.tensor.numel():
            raise CheckpointError(f"the snapshot has {filled} of {piece.tensor.numel()} elements of {piece.name}")
