"""A driver that was stopped (SIGSTOP, a debugger, a frozen container) and replaced still holds what Ray gave it.

Ray lends workers to drivers, and a stopped one gives nothing back: not the workers of its attempts, nor those that its
waiting requests are granted later. Its successor on the same cluster could wait for ever. So a run that is starved
kills the stopped processes of its earlier drivers, which may commit nothing any more; one that only sleeps a little is
left to wake up and find itself fenced.
"""

import time
from collections.abc import Callable
from typing import Any

from infra.processes import this_machine

Record = dict[str, Any]
Everywhere = Callable[[Callable[[list[Record]], list[int]], list[Record], Callable[[list[int]], None]], None]
ASK_AGAIN_S = 60.0
"""A question to all nodes starts a worker process on each: not more often than this."""


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
        """Those of this machine at once, those of other machines by a question to the cluster's nodes."""
        self._answer(kill_stopped(self._here))
        if self._elsewhere and time.monotonic() >= self._next:
            self._next = time.monotonic() + ASK_AGAIN_S
            self._everywhere(kill_stopped, self._elsewhere, self._answer)

    def _answer(self, pids: list[int]) -> None:
        for pid in pids:
            self._killed(pid)


def kill_stopped(leases: list[Record]) -> list[int]:
    """Kill the drivers of these leases that are stopped processes of this machine; their process ids. It travels to
    nodes by value, and is therefore whole in itself."""
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
