"""The files in shared memory that hold one rank's shards, and the folder per node in which all of them lie.

No process owns them: they outlive a SIGKILL of their writer and each process that opens them verifies them. A file is
written as `NAME.writing` and gets its name when it is sealed, so that a name never stands for something half written.
Memory is recycled: the file of the oldest step that nobody needs becomes the next one (fresh pages cost more than the
copy).
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engines.snapshots.milestones import KEPT, NO_MILESTONES, Milestones
from engines.snapshots.shard import Layout, ShardName, ShardWriter
from infra.errors import ResourceError

WRITING = ".writing"


def node_folder(run: str, root: Path = Path("/dev/shm")) -> Path:
    """Where all shards of a run lie on this node, its own ranks' and the replicas that it keeps for others."""
    return root / f"recua-{run}"


def sealed(folder: Path) -> list[ShardName]:
    """The shards in a folder, oldest first, by their names; open them to know that they are whole."""
    try:
        names = [ShardName.parse(entry) for entry in os.listdir(folder)]
    except FileNotFoundError:
        return []
    return sorted(name for name in names if name is not None)


def forget(folder: Path, *, before: int, milestones: Milestones = NO_MILESTONES, until: int = 0) -> None:
    """Free all shards of generations below `before`, and what interrupted writers left of them.

    Milestones stay, as far as they are among those to keep and no later than step `until`, where generation `before`
    began: what older generations took after it is a discarded future.
    """
    names = sealed(folder)
    newer = {name.step for name in names if name.generation >= before}
    kept = milestones.kept(newer | {name.step for name in names if name.step <= until}) - newer
    with contextlib.suppress(FileNotFoundError):
        for entry in os.listdir(folder):
            name = ShardName.parse(entry.split(".shard")[0] + ".shard")
            if name is None or name.generation >= before:
                continue
            if name.step not in kept or name.step > until or entry != str(name):
                (folder / entry).unlink(missing_ok=True)


@dataclass
class Slot:
    """One file: its writer, its present name, and who still reads it."""

    descriptor: int
    writer: ShardWriter
    path: Path
    step: int = -1
    readers: int = 0


class Segments:
    """The files of one rank in one generation.

    Args:
        folder: of this node; made if missing.
        layout: of this rank's shard.
        keep: sealed steps that stay while the next one is written; those of `milestones` stay too.
    """

    def __init__(self, folder: Path, layout: Layout, keep: int = 2, milestones: Milestones = NO_MILESTONES) -> None:
        self.folder, self.layout, self.keep, self.milestones = folder, layout, keep, milestones
        self._slots: list[Slot] = []
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, step: int) -> Path:
        return self.folder / str(self.layout.name(step))

    def begin(self, step: int) -> Slot:
        """A file to write `step` into.

        Raises:
            ResourceError: the node's shared memory is full.
        """
        writing = self.path(step).with_suffix(".shard" + WRITING)
        slot = self._recycled(writing, step)
        if slot is None:
            try:
                slot = self._new(writing)
            except ResourceError:
                slot = self._recycled(writing, step, tight=True)
                if slot is None:
                    raise
        slot.writer.begin()
        return slot

    def seal(self, slot: Slot, step: int, progress: dict) -> Path:
        """Verified content gets its name. Returns the path."""
        slot.writer.seal(step, progress)
        with self._lock:
            final = self.path(step)
            slot.path.rename(final)
            slot.path, slot.step = final, step
        return final

    @contextlib.contextmanager
    def reading(self, step: int) -> Iterator[Path | None]:
        """The sealed file of `step`, not recycled inside the block; None when it is gone already."""
        with self._lock:
            slot = next((slot for slot in self._slots if slot.step == step), None)
            if slot is not None:
                slot.readers += 1
        try:
            yield slot.path if slot is not None else None
        finally:
            if slot is not None:
                with self._lock:
                    slot.readers -= 1

    def close(self) -> None:
        """Let go of the files; they stay."""
        for slot in self._slots:
            os.close(slot.descriptor)
        self._slots.clear()

    def remove(self) -> None:
        """Free the memory."""
        for slot in self._slots:
            slot.path.unlink(missing_ok=True)
        self.close()

    def _recycled(self, writing: Path, step: int, tight: bool = False) -> Slot | None:
        """The oldest file beyond the newest `keep`, already under its new name; that of `step` itself where it is taken
        again. `tight`: see `Milestones.kept`."""
        with self._lock:
            done = sorted((slot for slot in self._slots if slot.step >= 0), key=lambda slot: slot.step)
            kept = self.milestones.kept((slot.step for slot in done), tight)
            again = [slot for slot in done if slot.step == step]
            spare = again or [slot for slot in done[: -self.keep] if slot.step not in kept]
            spare = [slot for slot in spare if not slot.readers]
            if not spare:
                return None
            slot = spare[0]
            slot.step = -1
            slot.path.rename(writing)
            slot.path = writing
            return slot

    def _new(self, writing: Path) -> Slot:
        descriptor = os.open(writing, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            writer = ShardWriter(descriptor, self.layout)
        except OSError as error:
            os.close(descriptor)
            writing.unlink()
            need = self.layout.data_bytes / 2**20
            raise ResourceError(
                f"{self.folder}: no shared memory for a snapshot of {need:.0f} MiB ({error.strerror}); "
                f"each rank keeps {self.keep + 1}, and {KEPT + 1} older ones where steps are verified: "
                "enlarge it, or lower snapshots.keep"
            ) from error
        slot = Slot(descriptor, writer, writing)
        with self._lock:
            self._slots.append(slot)
        return slot
