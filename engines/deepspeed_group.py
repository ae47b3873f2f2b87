"""The process group under DeepSpeed, formed and left in-process.

DeepSpeed keeps the group in module globals (`deepspeed.comm.comm.cdb`, `deepspeed.utils.groups`). `leave` resets them,
so that survivors of a failure join a new group without starting their process again: under a second instead of ten.
"""

import logging
import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def join(
    rank: int, world_size: int, address: str | None = None, store: dist.Store | None = None, timeout: float = 600.0
) -> None:
    """(collective) Make the default group, unless this process is in one, and tell DeepSpeed about it.

    `address` is host:port, served by rank 0; `store` is an existing store instead. A single rank needs neither.
    gloo on CPU; NCCL for CUDA tensors beside it on GPUs.

    Raises:
        ValueError: several ranks without an address, or this process sits in a group of another size.
    """
    if not dist.is_initialized():
        _init_torch(rank, world_size, address, store, timeout)
    if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
        raise ValueError(
            f"rank {rank} of {world_size} asked for, but this process is rank {dist.get_rank()} of "
            f"{dist.get_world_size()} in its group: leave() it first"
        )
    comm = load_deepspeed().comm
    if not comm.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        comm.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def leave() -> None:
    """Leave the group, broken or not; learners must have been closed. The process can `join` another afterwards."""
    comm = load_deepspeed().comm
    if comm.is_initialized():
        comm.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()
    comm.comm.cdb = None


def load_deepspeed() -> Any:
    """Import DeepSpeed for this machine's accelerator, quietly, on gloo alone.

    Its shared-memory all-reduce for CPU would be compiled at the first use (g++, a minute), and has to be re-made for
    every new group; gloo needs neither.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")  # a Ray actor sees its own device only
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)  # DeepSpeed's calls
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _init_torch(rank: int, world_size: int, address: str | None, store: dist.Store | None, timeout: float) -> None:
    cuda = torch.cuda.is_available()
    options: dict[str, Any] = {
        "backend": "cpu:gloo,cuda:nccl" if cuda else "gloo",
        "rank": rank,
        "world_size": world_size,
        "timeout": timedelta(seconds=timeout),
    }
    if cuda:
        options["device_id"] = torch.device("cuda", torch.cuda.current_device())
    if store is None and address is None and world_size > 1:
        raise ValueError(f"a group of {world_size} ranks needs an address (host:port) or a store")
    if store is None and address is None:
        store = dist.HashStore()
    if store is not None:
        dist.init_process_group(store=store, **options)
    else:
        dist.init_process_group(init_method=f"tcp://{address}", **options)
