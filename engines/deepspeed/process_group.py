"""The process group under DeepSpeed, formed and left in-process.

DeepSpeed keeps the group in module globals (`deepspeed.comm.comm.cdb`, `deepspeed.utils.groups`). `leave` resets them,
so that survivors of a failure join a new group without starting their process again: under a second instead of ten.
The torch groups below are those of `engines.collectives.process_groups`: form them there if a control thread has to
abort them.
"""

import importlib.util
import logging
import os
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from engines.collectives.process_groups import ProcessGroups, Rendezvous, StoreAddress


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
        _form(rank, world_size, address, store, timeout)
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
    deepspeed = load_deepspeed()
    if dist.is_initialized():
        dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    _forget_groups(deepspeed)


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


def _forget_groups(deepspeed: Any) -> None:
    """Give `deepspeed.utils.groups` the values it is imported with: its caches name groups and sizes of the past."""
    module = deepspeed.utils.groups
    fresh = importlib.util.module_from_spec(module.__spec__)
    module.__spec__.loader.exec_module(fresh)
    for name, value in vars(fresh).items():
        if not name.startswith("__") and not callable(value) and not isinstance(value, ModuleType):
            setattr(module, name, value)


def _form(rank: int, world_size: int, address: str | None, store: dist.Store | None, timeout: float) -> None:
    place: Rendezvous | dist.Store
    if store is not None:
        place = store
    elif address is not None:
        host, _, port = address.rpartition(":")
        place = Rendezvous(StoreAddress(host, int(port)), hosts=rank == 0, timeout_s=timeout)
    elif world_size == 1:
        place = dist.HashStore()
    else:
        raise ValueError(f"a group of {world_size} ranks needs an address (host:port) or a store")
    cuda = torch.cuda.is_available()
    groups = ProcessGroups(
        0,
        rank,
        world_size,
        place,
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else None,
        timeout_s=timeout,
        form_timeout_s=timeout,
    )
    groups.form(lambda: None)
