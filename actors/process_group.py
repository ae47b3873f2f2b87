"""torch.distributed inside a worker: made from its seat, and its errors given a name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from cluster.worker import Seat
from infra.errors import NodeLost, RecuaError

LOST_PEER = re.compile(r"connection (closed|reset)|broken pipe|connection refused|connection was likely closed", re.I)


def open_process_group(seat: Seat, device: torch.device, timeout_s: float) -> None:
    """(collective) The default group: gloo for tensors in host memory, NCCL too when this rank has a GPU."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{seat.master_address}:{seat.master_port}",
        rank=seat.rank,
        world_size=seat.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )


@contextmanager
def naming_lost_peers(seat: Seat) -> Iterator[None]:
    """A collective that failed because the other side is gone raises NodeLost, so that it counts as the platform's."""
    try:
        yield
    except RecuaError:
        raise
    except RuntimeError as error:
        if not LOST_PEER.search(str(error)):
            raise
        first_line = str(error).strip().splitlines()[0]
        raise NodeLost(f"rank {seat.rank}, generation {seat.generation}, lost a peer: {first_line}") from error
