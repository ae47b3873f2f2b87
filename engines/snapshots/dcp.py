"""A snapshot as a checkpoint of `torch.distributed.checkpoint`, for programs that load with torch's own loader.

Only they import this: DCP takes a second of CPU to import.
"""

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from engines.snapshots.reader import Entry, SnapshotReader


class DcpReader(StorageReader):
    """A `StorageReader` for `torch.distributed.checkpoint.load`. Later versions of torch may pass its methods more."""

    def __init__(self, reader: SnapshotReader) -> None:
        self._reader = reader

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries: dict[str, Any] = {name: _described(entry) for name, entry in self._reader.entries.items()}
        return Metadata(state_dict_metadata=entries, storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            index = item.storage_index
            assert index.offset is not None
            target = planner.resolve_tensor(item).detach()
            target.copy_(self._reader.read(index.fqn, tuple(index.offset), item.storage_offsets, item.lengths))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _described(entry: Entry) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in entry.chunks.items()]
    return TensorStorageMetadata(TensorProperties(dtype=getattr(torch, entry.dtype)), torch.Size(entry.shape), chunks)
