"""A rank's beacon: a small file in shared memory with its state, which its node agent reads from outside.

Nothing here waits. The rank writes its place, its phase and the outcomes of its last steps; one of its threads moves
the pulse, which therefore stops if the process is stopped or its interpreter is locked. The file outlives the process,
so the last record of a killed rank can be read. Records are written in two places in turn, and the number of the valid
one is written last (one aligned 8-byte store), as in cluster.goodput.stopwatch.
"""

import json
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.goodput.stopwatch import MEMORY_BYTES
from infra.processes import process_start

SUFFIX = ".beacon"
MAGIC = b"RECUABC2"
PULSE_PERIOD_S = 0.05
STATES = ("starting", "standby", "joining", "joined", "aborted", "boundary", "finished", "failed")
"""A worker's states: the last five are ends of its generation (see cluster.core.messages.Found)."""
PHASES = ("wait", "data", "collective", "save", "join", "form", "build", "load", "fetch", "apart")
"""`collective`: inside a step, which all ranks take together; ticks show how far each is. While joining: `form` and
`wait` for the others; `join`, `build`, `load` are a rank's own work; `fetch` waits for storage or another node's
memory. `apart`: out again, because machines cannot reach each other."""

RECORD = struct.Struct("<11q2d")
"""pid, its start, its training thread, state, generation, rank, world size, first step, step, phase, ticks; when the
phase was entered, own computing so far."""
WORD = struct.Struct("<Q")
PULSE_AT = len(MAGIC)
WRITTEN_AT = PULSE_AT + WORD.size
RECORDS_AT = WRITTEN_AT + WORD.size
ACCOUNT_AT = RECORDS_AT + 2 * RECORD.size
ROWS_AT = -(-(ACCOUNT_AT + MEMORY_BYTES) // 64) * 64
ROW_HEAD = struct.Struct("<QQ")
"""Step + 1 (0: empty), number of bytes that follow."""
ROW_BYTES = 320
ROWS = 2048
NOTES = ("burn-in", "proof-0", "proof-1")
"""A rank's measurements before standby; its proofs of the last verified steps (cluster.guard.proofs)."""
NOTES_AT = ROWS_AT + ROWS * ROW_BYTES
NOTE_BYTES = 1024
FILE_BYTES = NOTES_AT + len(NOTES) * NOTE_BYTES


@dataclass(frozen=True)
class Record:
    """A rank's last record. `start` and `step`: committed steps, at the start of its generation and now; `ticks`: its
    progress within the generation (while joining: stages that all ranks go through); `own_s`: seconds of its own
    computing in it, up to `step` (see cluster.goodput.own_time).

    `started` (see infra.processes) tells the process from a later one with the same pid; `thread` is the kernel's
    number of the training thread.
    Example: Record(4711, 8812345, 4730, "joined", 3, 1, 4, 90, 120, "collective", 9311, 5000.2).
    """

    pid: int
    started: int = 0
    thread: int = 0
    state: str = "starting"
    generation: int = 0
    rank: int = 0
    world_size: int = 0
    start: int = 0
    step: int = 0
    phase: str = "wait"
    ticks: int = 0
    entered_at: float = 0.0
    own_s: float = 0.0


class BeaconWriter:
    """The rank's side. Any thread may write.

    Args:
        path: the file, which gets this name once it is readable.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        with draft.open("wb+") as file:
            file.truncate(FILE_BYTES)
            self._memory = mmap.mmap(file.fileno(), FILE_BYTES)
        self.record = Record(os.getpid(), int(process_start(os.getpid()) or 0), entered_at=time.monotonic())
        self._lock = threading.Lock()
        self._written = self._pulse = self._notes = 0
        self._memory[:PULSE_AT] = MAGIC
        self._write()
        draft.rename(path)
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    @property
    def account(self) -> memoryview:
        """Memory for a cluster.goodput.stopwatch.Stopwatch."""
        return memoryview(self._memory)[ACCOUNT_AT : ACCOUNT_AT + MEMORY_BYTES]

    def set(self, **changes: Any) -> None:
        """Change fields of the record, e.g. set(state="joined", step=7)."""
        with self._lock:
            entered = {"entered_at": time.monotonic()} if "phase" in changes else {}
            self.record = Record(**{**self.record.__dict__, **entered, **changes})
            self._write()

    def enter(self, phase: str) -> None:
        self.set(phase=phase, ticks=self.record.ticks + 1)

    def tick(self) -> None:
        """Show progress within a step."""
        self.set(ticks=self.record.ticks + 1)

    def stir(self, phase: str) -> None:
        """Show progress that other ranks need not make: no tick is counted, but the phase begins anew."""
        self.set(phase=phase)

    def say(self, step: int, row: Mapping[str, Any]) -> None:
        """Write the outcome of a step; the last `ROWS` stay. Call it before `step` counts as committed."""
        text = json.dumps(row, separators=(",", ":")).encode()
        if len(text) > ROW_BYTES - ROW_HEAD.size:
            raise ValueError(f"a row of {len(text)} bytes, at most {ROW_BYTES - ROW_HEAD.size} fit")
        place = ROWS_AT + step % ROWS * ROW_BYTES
        with self._lock:
            WORD.pack_into(self._memory, place, 0)
            start = place + ROW_HEAD.size
            self._memory[start : start + len(text)] = text
            WORD.pack_into(self._memory, place + WORD.size, len(text))
            WORD.pack_into(self._memory, place, step + 1)

    def note(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one of NOTES; it replaces the last one of that name."""
        text = json.dumps(content, separators=(",", ":")).encode()
        if len(text) > NOTE_BYTES - ROW_HEAD.size:
            raise ValueError(f"a note of {len(text)} bytes, at most {NOTE_BYTES - ROW_HEAD.size} fit")
        place = NOTES_AT + NOTES.index(name) * NOTE_BYTES
        with self._lock:
            self._notes += 1
            WORD.pack_into(self._memory, place, 0)
            self._memory[place + ROW_HEAD.size : place + ROW_HEAD.size + len(text)] = text
            WORD.pack_into(self._memory, place + WORD.size, len(text))
            WORD.pack_into(self._memory, place, self._notes)

    def close(self) -> None:
        """Stop the pulse; the file stays."""
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(PULSE_PERIOD_S):
            self._pulse += 1
            WORD.pack_into(self._memory, PULSE_AT, self._pulse)

    def _write(self) -> None:
        self._written += 1
        record = self.record
        place = RECORDS_AT + self._written % 2 * RECORD.size
        numbers = (record.generation, record.rank, record.world_size, record.start, record.step)
        state, phase = STATES.index(record.state), PHASES.index(record.phase)
        process, times = (record.pid, record.started, record.thread), (record.entered_at, record.own_s)
        RECORD.pack_into(self._memory, place, *process, state, *numbers, phase, record.ticks, *times)
        WORD.pack_into(self._memory, WRITTEN_AT, self._written)


class BeaconReader:
    """The agent's side; works even after the writer and the file are gone.

    Raises:
        ValueError: the file is no beacon.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != FILE_BYTES:
                raise ValueError(f"{path} is no beacon")
            self._memory = mmap.mmap(file.fileno(), FILE_BYTES, access=mmap.ACCESS_READ)
        if self._memory[:PULSE_AT] != MAGIC:
            raise ValueError(f"{path} is no beacon")
        self.name = path.name.removesuffix(SUFFIX)
        self._notes: dict[str, tuple[int, dict[str, Any]]] = {}

    @property
    def pulse(self) -> int:
        return int(WORD.unpack_from(self._memory, PULSE_AT)[0])

    @property
    def account(self) -> bytes:
        return self._memory[ACCOUNT_AT : ACCOUNT_AT + MEMORY_BYTES]

    def read(self) -> Record:
        """The newest record; read again if the writer has overtaken it."""
        while True:
            (written,) = WORD.unpack_from(self._memory, WRITTEN_AT)
            numbers = RECORD.unpack_from(self._memory, RECORDS_AT + written % 2 * RECORD.size)
            if WORD.unpack_from(self._memory, WRITTEN_AT)[0] == written:
                pid, born, thread, state, generation, rank, world, start, step, phase, ticks, at, own_s = numbers
                seat = (generation, rank, world, start, step)
                return Record(pid, born, thread, STATES[state], *seat, PHASES[phase], ticks, at, own_s)

    def notes(self) -> dict[str, dict[str, Any]]:
        """The newest note of each name that has one."""
        for index, name in enumerate(NOTES):
            place = NOTES_AT + index * NOTE_BYTES
            number, length = ROW_HEAD.unpack_from(self._memory, place)
            if not number or self._notes.get(name, (0,))[0] == number:
                continue
            text = self._memory[place + ROW_HEAD.size : place + ROW_HEAD.size + length]
            if WORD.unpack_from(self._memory, place)[0] == number:  # else it is being written: read it next time
                self._notes[name] = number, json.loads(text)
        return {name: content for name, (_, content) in self._notes.items()}

    def rows(self, first: int, floor: int) -> Iterator[dict[str, Any]]:
        """Rows from step `first` on without a gap, of generation `floor` or later."""
        step = first
        while (row := self.row(step)) is not None and row["generation"] >= floor:
            yield row
            step += 1

    def row(self, step: int) -> dict[str, Any] | None:
        """The outcome of a step; None if it has been overwritten or not been written."""
        place = ROWS_AT + step % ROWS * ROW_BYTES
        written, length = ROW_HEAD.unpack_from(self._memory, place)
        if written != step + 1:
            return None
        text = self._memory[place + ROW_HEAD.size : place + ROW_HEAD.size + length]
        if WORD.unpack_from(self._memory, place)[0] != written:
            return None
        row: dict[str, Any] = json.loads(text)
        return row
