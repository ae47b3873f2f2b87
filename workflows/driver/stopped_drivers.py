"""Killing replaced drivers that are stopped (SIGSTOP, a debugger, a frozen container) and still hold Ray's workers.

Ray lends workers to drivers, and a stopped driver returns none: neither the workers of its attempts, nor those that its
waiting requests get later. Its successor on the same cluster could wait for ever. A run that gets no workers therefore
kills the stopped processes of its earlier drivers, which can commit nothing more. A driver that only sleeps is left
alone: it wakes up and finds itself fenced.
"""

import time
from collections.abc import Callable
from typing import Any

from infra.processes import this_machine

Record = dict[str, Any]
Everywhere = Callable[[Callable[[list[Record]], list[int]], list[Record], Callable[[list[int]], None]], None]
ASK_AGAIN_S = 60.0
"""Shortest time between two requests to all nodes, each of which starts a worker process per node."""


class StoppedDrivers:
    """`leases`: of the drivers that were replaced. `everywhere(function, argument, answer)`: call `function(argument)`
    on every node, and `answer` with each result. `killed(pid)` is called for each driver that was killed."""

    def __init__(self, leases: list[Record], everywhere: Everywhere, killed: Callable[[int], None]) -> None:
        here = this_machine()
        self._here = [lease for lease in leases if lease["machine"] == here]
        self._elsewhere = [lease for lease in leases if lease["machine"] != here]
        self._everywhere = everywhere
        self._killed = killed
        self._next = 0.0

    def kill(self) -> None:
        """Kill those on this machine at once, and those on other machines by a task on every node."""
        self._answer(kill_stopped(self._here))
        if self._elsewhere and time.monotonic() >= self._next:
            self._next = time.monotonic() + ASK_AGAIN_S
            self._everywhere(kill_stopped, self._elsewhere, self._answer)

    def _answer(self, pids: list[int]) -> None:
        for pid in pids:
            self._killed(pid)


def kill_stopped(leases: list[Record]) -> list[int]:
    """Kill the drivers of these leases that are stopped processes on this machine; returns their process ids. Ray
    pickles this function by value, so that it must be self-contained."""
    import os
    import signal
    from pathlib import Path

    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    here = f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    killed = []
    for lease in leases:
        if lease["machine"] != here:
            continue
        try:
            state = Path(f"/proc/{lease['pid']}/stat").read_text().rpartition(")")[2].split()
            if state[0] in ("T", "t") and state[19] == lease["process_start"]:
                os.kill(lease["pid"], signal.SIGKILL)
                killed.append(lease["pid"])
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return killed
