"""How long a rank computes in a step by itself, told from waiting for others: all ranks of a step take equally long.

A collective lets its thread sleep until the slowest rank is there, so what tells a slow rank is the kernel's account of
the training thread: how long it ran, and how long it wanted to run and got no processor. While it fetches its data
nobody else is waited for, so there sleeping counts too (a slow disk). A GPU computes beside the thread: there it is the
time that passed less what the step itself measured of its waits.
"""

import os
import threading
import time

from infra.processes import starved_s


class OwnTime:
    """Used by one thread: `begin`, `fetched` once the data is there, `end`.

    Args:
        crowding: time without a processor counts as the rank's own.
        beside: something beside the thread computes.
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
        """Seconds since `begin`, without those spent on waiting for others: `waited_s` as the step measured them."""
        wall, cpu, starved = _now()
        if self._beside:
            return max(0.0, wall - self._wall - waited_s)
        return self._asleep + cpu - self._cpu + (starved - self._starved if self._crowding else 0.0)


def _now() -> tuple[float, float, float]:
    return time.monotonic(), time.thread_time(), starved_s(os.getpid(), threading.get_native_id())
