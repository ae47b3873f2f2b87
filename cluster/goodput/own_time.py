"""A rank's own computing time in a step, without waiting for others: the whole step is equally long on all ranks.

A collective lets its thread sleep until the slowest rank is there, so the kernel's account of the training thread shows
a slow rank: how long it ran, and how long it wanted to run but got no processor. Fetching data waits for no other rank,
so sleeping counts there too (a slow disk). A GPU computes beside the thread: with one, the own time is the time that
passed less the waits that the step measured.
"""

import os
import threading
import time

from infra.processes import starved_s


class OwnTime:
    """Used by one thread: `begin`, `fetched` once the data is there, `end`.

    Args:
        crowding: count time without a processor as the rank's own.
        beside: a device computes beside the thread.
    """

    def __init__(self, crowding: bool = False, beside: bool = False) -> None:
        self._crowding, self._beside = crowding, beside
        self._wall = self._cpu = self._starved = self._asleep = 0.0

    def begin(self) -> None:
        self._asleep = 0.0
        self._wall, self._cpu, self._starved = _now()

    def fetched(self) -> None:
        wall, cpu, starved = _now()
        self._asleep = max(0.0, (wall - self._wall) - (cpu - self._cpu) - (starved - self._starved))

    def end(self, waited_s: float = 0.0) -> float:
        """Seconds since `begin` without waits for others; `waited_s`: those waits as the step measured them."""
        wall, cpu, starved = _now()
        if self._beside:
            return max(0.0, wall - self._wall - waited_s)
        return self._asleep + cpu - self._cpu + (starved - self._starved if self._crowding else 0.0)


def _now() -> tuple[float, float, float]:
    return time.monotonic(), time.thread_time(), starved_s(os.getpid(), threading.get_native_id())
