"""A rank's account of its own time, in memory that it shares with its node agent and that outlives it.

Nothing here waits. The rank's training thread writes; the node agent reads at any time, even if the rank was killed in
the middle of a write: two copies are written in turn, and the number of the valid one is written last (one aligned
8-byte store).
"""

import struct
import time
from collections.abc import Callable

from cluster.goodput.buckets import BUCKETS, Ledger

COPY = struct.Struct(f"<4d{len(BUCKETS)}d")
"""born, since, open bucket (-1: none), computing done before the step under way; seconds by bucket."""
WRITTEN = struct.Struct("<Q")
MEMORY_BYTES = WRITTEN.size + 2 * COPY.size
COMPUTE, RECOMPUTED, DETECTION = (BUCKETS.index(name) for name in ("compute", "recomputed", "detection"))
NONE = -1


class Stopwatch:
    """`enter("compute")` closes the previous bucket. A call takes a few microseconds; for one thread.

    Time before the stopwatch was made counts as init; before the first `enter` and after `leave`, as unattributed.

    Args:
        clock: seconds; the same for the node agent (CLOCK_MONOTONIC is shared by the processes of a machine).
        born: reading of `clock` at which the rank's life began, if that was before now (imports, actor start).
        memory: MEMORY_BYTES that outlive the process; None keeps the account in the process.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        born: float | None = None,
        memory: memoryview | bytearray | None = None,
    ) -> None:
        self._clock = clock
        self._memory = bytearray(MEMORY_BYTES) if memory is None else memory
        self._writes = 0
        self._since = clock()
        self._born = self._since if born is None else born
        self._open = NONE
        self._seconds = [0.0] * len(BUCKETS)
        self._seconds[BUCKETS.index("init")] = self._since - self._born
        self._recomputing = False
        self._at_step = 0.0
        self._entered = 0.0
        self._write()

    def enter(self, bucket: str) -> None:
        """Count time from now on in `bucket`. Raises ValueError for an unknown one."""
        index = _index(bucket)
        self._close()
        self._open = RECOMPUTED if self._recomputing and index == COMPUTE else index
        self._entered = self._since
        self._write()

    def leave(self) -> None:
        """Count time from now on as unattributed."""
        self._close()
        self._open = NONE
        self._write()

    def begin_step(self, recomputing: bool = False) -> None:
        """Start a step; `recomputing`: it was committed before a fault undid it."""
        self._close()
        self._recomputing = recomputing
        self._open = RECOMPUTED if recomputing else COMPUTE
        self._at_step = self._seconds[COMPUTE]
        self._write()

    def end_step(self) -> None:
        """Commit the step: its computing counts as useful."""
        self._close()
        self._at_step = self._seconds[COMPUTE]
        self._write()

    def step_lost(self) -> None:
        """Discard the step under way, if any: its computing is done again. Time from now on counts as detection,
        because the fault is not known yet."""
        self.enter("detection")
        lost = self._seconds[COMPUTE] - self._at_step
        self._seconds[COMPUTE] -= lost
        self._seconds[RECOMPUTED] += lost
        self._write()

    def fault_known(self, began: float, heard: float, waited: tuple[str, float, float] | None = None) -> None:
        """Book a fault that is now known: from `began` to `heard` as detection, from now on as re-forming.

        Args:
            waited: (bucket, start, end) of the wait that the fault ended, as it was booked: its part since `began` was
                in vain. Computing in that time is done again, so it stays in the bucket that `step_lost` chose.
        """
        self._close()
        if self._open == DETECTION:
            self.reattribute("detection", "re_forming", self._since - max(heard, self._entered))
        self.enter("re_forming")
        if waited is not None:
            bucket, start, end = waited
            self.reattribute(bucket, "detection", min(end, heard) - max(start, began))
            self.reattribute(bucket, "re_forming", end - max(start, heard))

    def reattribute(self, source: str, target: str, seconds: float) -> None:
        """Move measured seconds, e.g. waits for others within a step. A negative number moves nothing."""
        self._close()
        origin, place = _index(source), _index(target)
        moved = max(0.0, min(seconds, self._seconds[origin]))
        self._seconds[origin] -= moved
        self._seconds[place] += moved
        self._write()

    def ledger(self) -> Ledger:
        """The account up to now."""
        return read_account(self._memory, self._clock())

    def _close(self) -> None:
        now = self._clock()
        if self._open != NONE:
            self._seconds[self._open] += now - self._since
        self._since = now

    def _write(self) -> None:
        self._writes += 1
        place = WRITTEN.size + self._writes % 2 * COPY.size
        COPY.pack_into(self._memory, place, self._born, self._since, self._open, self._at_step, *self._seconds)
        WRITTEN.pack_into(self._memory, 0, self._writes)


def _index(bucket: str) -> int:
    if bucket not in BUCKETS:
        raise ValueError(f"no such ledger bucket: {bucket}; known: {', '.join(BUCKETS)}")
    return BUCKETS.index(bucket)


def read_account(
    memory: memoryview | bytearray | bytes, until: float, died: bool = False, still_since: float | None = None
) -> Ledger:
    """The account of the rank that writes (or wrote) into `memory`, up to `until` on its clock.

    An account that was never written is empty.

    Args:
        died: the rank ended at `until`; if in the middle of a step, other ranks repeat its computing.
        still_since: when the rank was stopped, if it was or is: the time since then is detection.
    """
    (written,) = WRITTEN.unpack_from(memory, 0)
    if written == 0:
        return Ledger(0.0)
    born, since, opened, at_step, *seconds = COPY.unpack_from(memory, WRITTEN.size + written % 2 * COPY.size)
    until = max(until, since)
    if opened != NONE:
        still = 0.0 if still_since is None else max(0.0, until - max(since, still_since))
        seconds[int(opened)] += until - since - still
        seconds[DETECTION] += still
    if died and int(opened) == COMPUTE:
        lost = seconds[COMPUTE] - at_step
        seconds[COMPUTE] -= lost
        seconds[RECOMPUTED] += lost
    return Ledger(until - born, dict(zip(BUCKETS, seconds, strict=True)))


def last_sign(memory: memoryview | bytearray | bytes) -> float:
    """When the rank that wrote into `memory` last changed its bucket, on its clock; 0 if it never wrote."""
    (written,) = WRITTEN.unpack_from(memory, 0)
    since: float = COPY.unpack_from(memory, WRITTEN.size + written % 2 * COPY.size)[1]
    return since
