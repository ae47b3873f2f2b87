"""Snapshots of a GPU's tensors: copied by a stream of their own, beside the training."""

from collections.abc import Sequence
from typing import Any

import torch

from engines.snapshots.segments import Slot
from engines.snapshots.shard import Piece


def computed() -> Any:
    """An event that comes when all that was asked of the GPU so far is computed."""
    event = torch.cuda.Event()
    event.record()
    return event


class CudaCopier:
    """Device to host on a stream of its own, into the shared memory itself, which is pinned for it."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pinned: dict[int, int] = {}

    def copy(self, slot: Slot, pieces: Sequence[Piece], ready: Any) -> None:
        address, size = slot.writer.data
        if address not in self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size, 0))
            self._pinned[address] = size
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for index, piece in enumerate(pieces):
                slot.writer.view(index).copy_(piece.tensor.detach(), non_blocking=True)
        self._stream.synchronize()
        for index in range(len(pieces)):
            slot.writer.checksum_in_place(index)

    def close(self) -> None:
        for address in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._pinned.clear()
