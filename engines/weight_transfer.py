"""The learner's side of weight transfer: publish a version, hand the record to every generator.

    sender = build_sender("shared_memory", folder)
    update = sender.publish(learner.export(), "sft-12")     # rank 0 only; the record is small and crosses processes
    for generator in generators: generator.update_weights(update)
    sender.wait()                                           # until the bytes may be overwritten

`shared_memory` writes one safetensors file per version into memory (CPU); its bytes are brought to other nodes. `nccl`
and `ipc` drive vLLM's own backends on GPUs. Who waits for whom: `publish` of shared_memory returns when the file is
complete; that of nccl returns at once and broadcasts on a thread, which ends only after every generator has called
`update_weights`.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engines.base import WeightUpdate
from infra.errors import CheckpointError, ResourceError

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class WeightSender(Protocol):
    """What actors use, whatever the backend."""

    backend: str

    def receiver_info(self, receiver: int) -> dict[str, Any]:
        """What generator number `receiver` needs once, before its first update (`VllmGenerator.connect`)."""
        ...

    def connect(self) -> None:
        """Meet the generators; they must be in `connect` at the same time (nccl). Nothing to do for the others."""
        ...

    def publish(self, named_tensors: NamedTensors, version: str) -> WeightUpdate:
        """Make full HF tensors available as `version`."""
        ...

    def wait(self) -> None:
        """Block until the published tensors may be changed."""
        ...

    def close(self) -> None:
        """Give back what the sender holds."""
        ...


def build_sender(backend: str, folder: Path = Path("/dev/shm"), **options: Any) -> WeightSender:
    """`folder` for shared_memory; `master_address`, `master_port`, `receiver_sizes` for nccl."""
    if backend == "shared_memory":
        return SharedMemorySender(folder, **options)
    if backend == "nccl":
        return NcclSender(**options)
    if backend == "ipc":
        return IpcSender(**options)
    raise ValueError(f"weight_backend {backend!r}: known are shared_memory, nccl, ipc")


def describe(
    tensors: Sequence[tuple[str, torch.Tensor]], version: str, backend: str, location: dict[str, Any]
) -> WeightUpdate:
    """The record of `tensors`; dtypes are torch's names without the `torch.` prefix."""
    return WeightUpdate(
        version=version,
        backend=backend,
        names=tuple(name for name, _ in tensors),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors),
        shapes=tuple(tuple(tensor.shape) for _, tensor in tensors),
        location=location,
    )


class SharedMemorySender:
    """Weights as files in memory: `<folder>/recua-weights-<uid>/sender-*/<n>-<hash>.safetensors`.

    A file appears under its name only when it is complete. The newest `keep` versions stay, so that a generator that
    still reads version k survives the publishing of k+1. Each sender holds a lock on its subfolder for as long as its
    process lives; a new sender removes the subfolders of dead ones, so killed learners leak nothing for long.
    """

    backend = "shared_memory"

    def __init__(self, folder: Path = Path("/dev/shm"), keep: int = 2) -> None:
        base = Path(folder) / f"recua-weights-{os.getuid()}"
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._keep = keep
        self._count = 0
        _remove_leftovers(base)
        fresh = base / f"new-{uuid.uuid4().hex}"
        fresh.mkdir()
        self._lock = open(fresh / "lock", "w")  # noqa: SIM115  (held until close())
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.folder = base / fresh.name.replace("new-", "sender-")
        fresh.rename(self.folder)

    def receiver_info(self, receiver: int) -> dict[str, Any]:
        return {}

    def connect(self) -> None:
        return None

    def publish(self, named_tensors: NamedTensors, version: str) -> WeightUpdate:
        """Write `version` and return its record.

        Raises:
            ResourceError: the folder has not enough room left for one more copy of the weights.
        """
        tensors = [(name, tensor.detach().cpu().contiguous()) for name, tensor in named_tensors]
        need = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors) + 256 * len(tensors) + 4096
        self._remove_old(self._keep - 1)
        self._check_room(need)
        self._count += 1
        name = f"{self._count:06d}-{hashlib.sha256(version.encode()).hexdigest()[:12]}.safetensors"
        target = self.folder / name
        partial = self.folder / f".{name}"
        try:
            save_file(_without_shared_storage(tensors), partial, metadata={"format": "pt", "version": version})
            partial.rename(target)
        except (OSError, SafetensorError) as error:
            raise ResourceError(f"shared_folder {self.folder}: writing {need} bytes failed: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        return describe(tensors, version, self.backend, {"path": str(target)})

    def wait(self) -> None:
        return None

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _check_room(self, need: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise ResourceError(
                f"shared_folder {self.folder} has {free / 2**20:.0f} MiB left and one version of the weights takes "
                f"{need / 2**20:.0f} MiB: enlarge /dev/shm (docker run --shm-size) or set shared_folder elsewhere"
            )

    def _remove_old(self, keep: int) -> None:
        files = sorted(self.folder.glob("*.safetensors"))
        for file in files[: max(0, len(files) - keep)]:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def brought_here(update: WeightUpdate, content: np.ndarray) -> Iterator[WeightUpdate]:
    """What was published in another machine's memory, as a file of its bytes [N] in this one's: other processes here
    can open it, and it goes with this one.

    Raises:
        ResourceError: there is no room for it.
    """
    with open(os.memfd_create("recua-weights"), "wb") as file:
        try:
            content.tofile(file)
            file.flush()
        except OSError as error:
            raise ResourceError(f"{content.nbytes} bytes of weights do not fit into memory here: {error}") from error
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        yield dataclasses.replace(update, location={**update.location, "path": path})


def _without_shared_storage(tensors: Sequence[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """safetensors refuses two names for one storage (tied weights): such a second name gets its own copy."""
    seen: set[int] = set()
    unique: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        pointer = tensor.untyped_storage().data_ptr()
        unique[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return unique


def _remove_leftovers(base: Path) -> None:
    for folder in base.glob("sender-*"):
        try:
            with open(folder / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its owner lives, or somebody else is removing it
            continue


def read_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of one safetensors file or of every one in a model folder, memory-mapped.

    Raises:
        CheckpointError: nothing there, or a damaged file.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"{path}: no *.safetensors file in this model folder")
    for file in files:
        try:
            reader = safe_open(file, framework="pt")
        except Exception as error:
            raise CheckpointError(f"{file}: not readable as safetensors: {error}") from error
        with reader:
            for name in reader.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield name, reader.get_tensor(name)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """name -> shape, from the headers alone.

    Raises:
        CheckpointError: nothing there, or a damaged file.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"{path}: no *.safetensors file in this model folder")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                shapes |= {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
        except Exception as error:
            raise CheckpointError(f"{file}: not readable as safetensors: {error}") from error
    return shapes


def check_same_architecture(
    expected: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]], source: str
) -> None:
    """A partial reload would silently mix two models, so names and shapes must match; a tied head may come or not.

    Raises:
        CheckpointError: names the first tensors that are missing, unknown or of another shape.
    """
    optional = {"lm_head.weight"} if "lm_head.weight" not in expected or "lm_head.weight" not in given else set()
    problems = [f"missing {name}" for name in expected if name not in given and name not in optional]
    problems += [f"unknown {name}" for name in given if name not in expected and name not in optional]
    problems += [
        f"{name} is {given[name]}, not {shape}" for name, shape in expected.items() if given.get(name, shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{source}: other tensors than the running model's: {'; '.join(problems[:5])}{more}")


class NcclSender:
    """vLLM's own "nccl" backend, one broadcast to all generators. Needs GPUs; not run on the development machines.

    NCCL ranks: 0 is this sender, then the generators' workers in order (`receiver_sizes` = their tensor_parallel).
    """

    backend = "nccl"

    def __init__(self, master_address: str, master_port: int, receiver_sizes: Sequence[int]) -> None:
        self._address, self._port, self._sizes = master_address, master_port, list(receiver_sizes)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nccl-weights")
        self._running: Future[None] | None = None
        self._group: Any = None

    def receiver_info(self, receiver: int) -> dict[str, Any]:
        return {
            "master_address": self._address,
            "master_port": self._port,
            "rank_offset": 1 + sum(self._sizes[:receiver]),
            "world_size": 1 + sum(self._sizes),
            "packed": True,
        }

    def connect(self) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self._group = trainer_init(
            {"master_address": self._address, "master_port": self._port, "world_size": 1 + sum(self._sizes)}
        )

    def publish(self, named_tensors: NamedTensors, version: str) -> WeightUpdate:
        assert self._group is not None, "connect() comes first"
        self.wait()
        tensors = [(name, tensor.detach().contiguous()) for name, tensor in named_tensors]
        device = torch.cuda.current_device()
        self._running = self._thread.submit(self._broadcast, tensors, device)
        return describe(tensors, version, self.backend, {})

    def wait(self) -> None:
        if self._running is not None:
            self._running.result()
            self._running = None

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._group is not None:
            self._group.destroy()
            self._group = None

    def _broadcast(self, tensors: list[tuple[str, torch.Tensor]], device: int) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        torch.cuda.set_device(device)
        packed_nccl_broadcast_producer(iter(tensors), self._group, src=0, post_iter_func=lambda pair: pair[1])
        torch.cuda.synchronize(device)


class IpcSender:
    """vLLM's own "ipc" backend: CUDA handles to the learner's copies, for generators on the same GPU.

    Needs a GPU; not run on the development machines. The copies live until the next `publish` or `close`.
    """

    backend = "ipc"

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def receiver_info(self, receiver: int) -> dict[str, Any]:
        return {"packed": False}

    def connect(self) -> None:
        return None

    def publish(self, named_tensors: NamedTensors, version: str) -> WeightUpdate:
        from torch.multiprocessing.reductions import reduce_tensor

        tensors = [(name, tensor.detach().contiguous()) for name, tensor in named_tensors]
        uuid_of_gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handles = [{uuid_of_gpu: reduce_tensor(tensor)[1]} for _, tensor in tensors]
        torch.cuda.synchronize()
        self._kept = [tensor for _, tensor in tensors]
        return describe(tensors, version, self.backend, {"ipc_handles": handles})

    def wait(self) -> None:
        return None

    def close(self) -> None:
        self._kept = []
