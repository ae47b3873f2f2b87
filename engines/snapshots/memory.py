"""Snapshots of one rank into host memory while it trains on.

Who waits for whom: `take` returns at once; one thread copies the state while the next step's forward and backward run,
which read the weights and leave them alone. `settle` waits for that thread: call it before the weights change again,
and before the ranks agree to commit. So when they do agree, every shard of the snapshot before that step is sealed and
replicated on every rank: the agreement of step k acknowledges snapshot k, and a fault costs at most step k.
"""

import queue
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from engines.snapshots.milestones import NO_MILESTONES, Milestones
from engines.snapshots.segments import Segments
from engines.snapshots.shard import Layout, Piece, ShardName
from infra.errors import CheckpointError, StoreError

if TYPE_CHECKING:  # it imports torch, which node agents do without
    from engines.snapshots.cuda_copies import CudaCopier

REMEMBERED = 3
"""Steps whose digests are at hand beside the newest one's."""


class Holder(Protocol):
    """Somewhere else that keeps replicas."""

    def put(self, name: ShardName, path: Path) -> None:
        """Returns when the replica is there, verified. Raises StoreError or CheckpointError when it is not."""
        ...

    def cut(self) -> None:
        """Wake a thread that is in `put`; callable from any thread."""
        ...


Reach = Callable[[str, int, int], None]
"""`reach(moment, rank, step)`: told of the moments at which a test may want to break this process."""


def unheard(moment: str, rank: int, step: int) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Acknowledged:
    """Snapshot `step` is sealed here; `problems` name the replicas that are missing."""

    step: int
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Job:
    step: int
    pieces: Sequence[Piece]
    progress: dict[str, Any]
    ready: Any  # a CUDA event after which the pieces are final, or None


class Snapshots:
    """Takes the snapshots of one rank in one generation.

    Args:
        folder: of this node, see `segments.node_folder`.
        run, generation, rank, world_size: whose they are.
        keep: sealed snapshots that stay while the next is written.
        every: steps between snapshots.
        milestones: older ones that stay too.
        holders: who gets a replica of each.
        reach: of "snapshot", where a shard is half written.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        generation: int,
        rank: int,
        world_size: int,
        *,
        keep: int = 2,
        every: int = 1,
        milestones: Milestones = NO_MILESTONES,
        holders: Sequence[Holder] = (),
        reach: Reach = unheard,
    ) -> None:
        self._reach = reach
        self.folder, self.run, self.generation, self.rank, self.world_size = folder, run, generation, rank, world_size
        self.keep, self.every, self.milestones, self.holders = keep, every, milestones, tuple(holders)
        self.stall_s = 0.0
        """Seconds that `settle` has waited in all: the checkpoint stall."""
        self.last: Acknowledged | None = None
        self.digests: dict[int, Mapping[str, str]] = {}
        """Of the newest snapshots that were sealed: {step: {place: digest of all pieces there}}."""
        self.segments: Segments | None = None
        self._jobs: queue.SimpleQueue[_Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._cut = False
        self._failure: BaseException | None = None
        self._copier: CudaCopier | None = None
        self._thread = threading.Thread(target=self._work, name=f"snapshots-{generation}", daemon=True)
        self._thread.start()

    def take(
        self, step: int, pieces: Sequence[Piece], progress: dict[str, Any], tensors: int = 0, due: bool = False
    ) -> bool:
        """Begin to copy the state after `step` steps; False after `cut`, and where `every` skips it (not if `due`).

        The tensors may be read but not written until `settle` returns. `progress` is JSON. `tensors` is how many the
        whole state has, where this rank has no part of some.
        """
        if (step % self.every and not due) or self._cut:
            return False
        self.settle()
        if self.segments is None:
            layout = Layout.of(self.run, self.generation, self.rank, self.world_size, pieces, tensors)
            self.segments = Segments(self.folder, layout, self.keep, self.milestones)
        ready = None
        if any(piece.tensor.is_cuda for piece in pieces):
            from engines.snapshots.cuda_copies import computed

            ready = computed()
        self._idle.clear()
        self._jobs.put(_Job(step, pieces, progress, ready))
        return True

    def settle(self) -> Acknowledged | None:
        """Wait until the snapshot that was begun is sealed and its replicas are acknowledged; returns the newest one.

        Raises:
            ResourceError: no memory for it.
        """
        if not self._idle.is_set():
            started = time.perf_counter()
            self._idle.wait()
            self.stall_s += time.perf_counter() - started
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return self.last

    def cut(self) -> None:
        """Give up waiting for replicas: some holder may be gone. Callable from any thread; no snapshot follows."""
        self._cut = True
        for holder in self.holders:
            holder.cut()

    def reading(self, step: int) -> AbstractContextManager[Path | None]:
        """See `Segments.reading`."""
        assert self.segments is not None, "no snapshot was taken yet"
        return self.segments.reading(step)

    def soon(self, task: Callable[[], None]) -> None:
        """Run something in the copying thread; its error is raised by the next `settle`."""
        self._jobs.put(task)

    def close(self, remove: bool = False) -> None:
        """End the thread after what it is doing. The files stay unless `remove`."""
        self._jobs.put(None)
        self._thread.join()
        if self.segments is not None:
            if self._copier is not None:
                self._copier.close()
            self.segments.remove() if remove else self.segments.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if isinstance(job, _Job):
                    self.last = self._snapshot(job)
                else:
                    job()
            except BaseException as error:  # raised again in settle()
                self._failure = error
            finally:
                if isinstance(job, _Job):
                    self._idle.set()
                del job

    def _snapshot(self, job: _Job) -> Acknowledged:
        assert self.segments is not None
        slot = self.segments.begin(job.step)
        pieces = [piece for piece in job.pieces if piece.tensor.numel()]
        half = len(pieces) // 2
        if job.ready is not None:
            self._reach("snapshot", self.rank, job.step)
            if self._copier is None:
                from engines.snapshots.cuda_copies import CudaCopier

                self._copier = CudaCopier()
            self._copier.copy(slot, pieces, job.ready)
        else:
            for index, piece in enumerate(pieces):
                if index == half:
                    self._reach("snapshot", self.rank, job.step)
                source = piece.tensor.contiguous()
                slot.writer.write(index, source.data_ptr())
        path = self.segments.seal(slot, job.step, job.progress)
        self._note_digests(job.step, pieces, slot.writer.checksums)
        problems = []
        for holder in self.holders:
            try:
                holder.put(self.segments.layout.name(job.step), path)
            except (StoreError, CheckpointError) as error:
                problems.append(str(error))
        return Acknowledged(job.step, tuple(problems))

    def _note_digests(self, step: int, pieces: Sequence[Piece], checksums: Sequence[int]) -> None:
        folded: dict[str, Any] = defaultdict(xxhash.xxh3_64)
        for piece, checksum in zip(pieces, checksums, strict=True):
            folded[piece.place].update(struct.pack("<Q", checksum))
        newest = dict(sorted(self.digests.items())[-REMEMBERED:])
        self.digests = {**newest, step: {place: one.hexdigest() for place, one in folded.items()}}
