"""Waits that gloo forgets to end, and how to end them.

When a connection breaks, gloo (as in torch 2.13) wakes a thread that waits for data from it and one that has announced
data, but not one that waits for data that was being written: `Pair::signalException` passes over the unbound buffers of
its write queue. Such a collective sleeps until its timeout, minutes later, and destroying its group sleeps with it. It
is rare (about one in 300 aborts on a loaded machine: a write has to fall between the break and its discovery).

`UnboundBuffer::abortWaitSend` ends such a wait, and the next operation of the collective then fails as it should. The
buffer is found through the address at which the kernel says that the thread sleeps: it lies inside the buffer, and the
buffer begins with the address of its class's table of virtual functions.
"""

import contextlib
import ctypes
import os
import platform
from pathlib import Path

import torch

FUTEX = {"x86_64": 202, "aarch64": 98}
REACH = 256
"""Bytes between the start of a buffer and what a thread sleeps on inside it, at most (120 and 168 in torch 2.13)."""
CLASS = "N4gloo9transport3tcp13UnboundBuffer"
WORD = ctypes.sizeof(ctypes.c_void_p)


def wake() -> int | None:
    """End the waits of this process for gloo's buffers; returns how many there were.

    Only for when every connection is closed: nobody else will end such a wait then, so the buffers stay where they are.
    None where this cannot be known: another machine type, another gloo, or a container that hides /proc.
    """
    library = _Library.load()
    if library is None:
        return None
    found = 0
    try:
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            for task in os.listdir("/proc/self/task"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
                    address = _sleeps_at(Path("/proc/self/task") / task)
                    buffer = address and _buffer_around(memory.fileno(), address, library.table)
                    if buffer:
                        library.abort_wait(buffer)
                        found += 1
    except OSError:
        return None
    return found


class _Library:
    """What is needed of gloo, in the library that torch has loaded."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.table = ctypes.addressof(ctypes.c_char.in_dll(library, f"_ZTV{CLASS}E")) + 2 * WORD
        self._abort = [getattr(library, f"_Z{CLASS}13abortWait{kind}Ev") for kind in ("Send", "Recv")]
        for function in self._abort:
            function.argtypes, function.restype = [ctypes.c_void_p], None

    @classmethod
    def load(cls) -> "_Library | None":
        try:
            return cls(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")))
        except (OSError, AttributeError, ValueError):
            return None

    def abort_wait(self, buffer: int) -> None:
        for function in self._abort:
            function(buffer)


def _sleeps_at(task: Path) -> int | None:
    """What a thread sleeps on; None for one that runs, or that waits for something else than memory."""
    words = (task / "syscall").read_text().split()
    if words[0] != str(FUTEX.get(platform.machine())):
        return None
    return int(words[1], 16)


def _buffer_around(memory: int, address: int, table: int) -> int | None:
    """The start of the buffer that `address` lies in, if it lies in one."""
    end = address // WORD * WORD
    try:
        content = os.pread(memory, REACH, end - REACH)
    except OSError:  # nothing is mapped there
        return None
    mark = table.to_bytes(WORD, "little")
    position = next((at for at in range(len(content) - WORD, -1, -WORD) if content[at : at + WORD] == mark), None)
    return None if position is None else end - REACH + position
