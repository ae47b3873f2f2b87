"""Processes of this machine, as the kernel shows them under /proc. A process id alone may belong to a later process."""

import ctypes
import functools
import os
from pathlib import Path

PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
GONE = "ZX"
"""States of a process that has ended: a zombie still has its id."""


def this_machine() -> str:
    """The running kernel and its namespace of process ids: while both are equal, an id means the same process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def process_start(pid: int) -> str | None:
    """When a process began, in kernel ticks since boot; None if it has ended (or is a zombie)."""
    words = _stat(pid)
    return None if words[0] in GONE else words[19]


def process_state(pid: int) -> str:
    """The kernel's letter: R runs, S sleeps, T is stopped, t is traced, Z is a zombie; X if there is no such
    process."""
    return _stat(pid)[0]


def children() -> list[int]:
    """Children of this process, of all its threads, with zombies. Costs one system call if it has none."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return []
    numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in numbers if _stat(pid)[1:2] == [str(os.getpid())]]


def adopt_orphans(adopt: bool) -> bool:
    """Set whether descendants that lose their parent become children of this process, which can then find them. Returns
    the earlier setting."""
    before = ctypes.c_int()
    _libc().prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    _libc().prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)
    return bool(before.value)


def flush_c_streams() -> None:
    """Flush the output buffers of C libraries."""
    _libc().fflush(None)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class ExitWatch:
    """Polls for the end of a process, at 5 microseconds per poll.

    A pidfd, a closed socket and a parent's wait report the end of a process only after the kernel has taken its memory
    back: 30 ms for one that has loaded torch, over 200 ms for 600 MB on busy cores, seconds for pinned gigabytes. The
    process's first thread is a zombie from the beginning of that time.
    """

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError if there is no such process."""
        try:
            self._stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ProcessLookupError(pid) from None

    def ends(self) -> bool:
        """Whether the process has ended or is ending: it will not run again."""
        try:
            return os.pread(self._stat, 1024, 0).rpartition(b") ")[2][:1].decode() in GONE
        except ProcessLookupError:
            return True

    def close(self) -> None:
        os.close(self._stat)


def starved_s(pid: int, thread: int) -> float:
    """How long a thread has waited for a processor so far; 0 if the kernel does not count that."""
    try:
        return int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on (the second, a name, may contain spaces and brackets)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["X"]
