"""What one body does to its process does not meet the next one.

A worker process runs many bodies, one after another. What a body changed of the process is put back when it has ended,
and processes that it left are ended. The worker is given up, so that its next task runs in another process, where
something cannot be put back, where processes had to be ended (a library may count on them), and where a body that
changed something has also imported modules: what an import sets belongs to whoever uses the module later.

Not seen: threads that go on, and what was changed inside modules. Random numbers begin anew, as in a new process:
bodies that do not seed them must not draw what an earlier one drew.
"""

import contextlib
import gc
import locale
import logging
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from _signal import getsignal  # fifty times faster than signal.getsignal, which looks for members of an enum
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from infra.processes import GONE, adopt_orphans, children, process_state
from infra.ray_internals import end_after_this_task

"""`max_calls` of our Ray tasks: never reached, unless a worker is given up."""
ENDING_S = 5.0
LEAVING_S = 1.0
"""A process that its body told to end, and did not wait for, may take so long."""
NAMELESS_S = 0.5
LIMITS = [getattr(resource, f"RLIMIT_{name}") for name in ("AS", "CPU", "FSIZE", "NOFILE")]


class Part(NamedTuple):
    """Something of a process that a body may change: how to read it, and how to put it back as it was."""

    name: str
    read: Callable[[], Any]
    put_back: Callable[[Any], object]


class Isolation:
    """Of one worker process, made before its first body. `given_up`: no other body may run here."""

    def __init__(self) -> None:
        self.given_up = False
        adopt_orphans(True)

    @contextlib.contextmanager
    def around_body(self, said: list[str]) -> Iterator[None]:
        """What the next body would have met, and people should know of, is added to `said`."""
        before, left_before = [(part, _read(part)) for part in PARTS], set(children())
        modules, threads = len(sys.modules), os.environ.get("OMP_NUM_THREADS", "")
        torch = _torch()
        try:
            with warnings.catch_warnings():
                yield
        finally:
            ended = _end_children(left_before)
            before.append((Part("torch's settings", _torch, _put_torch_back), torch or _fresh_torch(threads)))
            changed = [(part, was) for part, was in before if _read(part) != was and not isinstance(was, OSError)]
            stuck = [part.name for part, was in changed if not _put_back(part, was)]
            _forget_seeds()
            said += [f"process {process} outlived its step and was ended" for process in ended]
            said += [f"what it did to {name} cannot be undone: its worker process is given up" for name in stuck]
            if ended or stuck or (changed and len(sys.modules) != modules):
                self.given_up = True
                _give_up()


def _give_up() -> None:
    """Let Ray end this process once the task's result is sent."""
    if (ray := sys.modules.get("ray")) is not None:
        end_after_this_task(ray)


def _end_children(before: set[int]) -> list[str]:
    """End and reap what was left; those that were alive, in words. Children of what is ended become ours."""
    ended: dict[int, str] = {}
    patience = time.monotonic() + LEAVING_S
    while time.monotonic() < patience and any(process_state(pid) not in GONE for pid in set(children()) - before):
        time.sleep(0.005)
    deadline = time.monotonic() + ENDING_S
    while (left := [pid for pid in children() if pid not in before]) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(OSError):
                if command := _command(pid):
                    ended.setdefault(pid, f"{pid} ({command})")
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    return list(ended.values())


def _command(pid: int) -> str:
    """What a process runs; "" where it has ended by itself. One that is just becoming another program shows nothing for
    a moment, one that hides its command line nothing at all."""
    deadline = time.monotonic() + NAMELESS_S
    while process_state(pid) not in GONE:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as stream:
            command = stream.read(80).replace("\0", " ").strip()
        if command or time.monotonic() > deadline:
            return command or "without a name"
        time.sleep(0.001)
    return ""


def _read(part: Part) -> Any:
    try:
        return part.read()
    except OSError as error:  # the working folder is gone
        return error


def _put_back(part: Part, was: Any) -> bool:
    """Whether it is as it was."""
    with contextlib.suppress(Exception):
        part.put_back(was)
    return bool(_read(part) == was)


# --- the parts ---


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _environment() -> dict[bytes, bytes]:
    """Not decoded, which would take longer than all the rest."""
    kept: dict[bytes, bytes] = vars(os.environ)["_data"]
    return kept.copy()


def _put_environment_back(was: dict[bytes, bytes]) -> None:
    for name in os.environb.keys() - was.keys():
        del os.environb[name]
    for name, value in was.items():
        if os.environb.get(name) != value:
            os.environb[name] = value
    time.tzset()


def _handlers() -> dict[int, Any]:
    return {number: getsignal(number) for number in range(1, signal.SIGRTMIN)}


def _put_handlers_back(was: dict[int, Any]) -> None:
    for number, handler in was.items():
        if handler != getsignal(number):
            signal.signal(number, handler)


def _put_limits_back(was: list[tuple[int, int]]) -> None:
    for number, limit in zip(LIMITS, was, strict=True):
        resource.setrlimit(number, limit)


def _logging() -> tuple[Any, ...]:
    root = logging.getLogger()
    return root.level, list(root.handlers), root.disabled, root.manager.disable


def _put_logging_back(was: tuple[Any, ...]) -> None:
    root = logging.getLogger()
    root.setLevel(was[0])
    root.handlers[:], root.disabled, root.manager.disable = was[1:]


def _interpreter() -> tuple[Any, ...]:
    settings = (sys.getrecursionlimit(), gc.isenabled(), socket.getdefaulttimeout(), list(sys.argv), list(sys.path))
    return (*settings, sys.excepthook, threading.excepthook, sys.stdin)


def _put_interpreter_back(was: tuple[Any, ...]) -> None:
    sys.setrecursionlimit(was[0])
    (gc.enable if was[1] else gc.disable)()
    socket.setdefaulttimeout(was[2])
    sys.argv[:], sys.path[:], sys.excepthook, threading.excepthook, sys.stdin = was[3:]


PARTS = [
    Part("the timer", lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0, lambda _: signal.alarm(0)),
    Part("the signal handlers", _handlers, _put_handlers_back),
    Part("the resource limits", lambda: [resource.getrlimit(number) for number in LIMITS], _put_limits_back),
    Part("the working folder", os.getcwd, os.chdir),
    Part("the umask", _umask, os.umask),
    Part("the environment", _environment, _put_environment_back),
    Part("the locale", lambda: locale.setlocale(locale.LC_ALL), lambda was: locale.setlocale(locale.LC_ALL, was)),
    Part(
        "the priority", lambda: os.getpriority(os.PRIO_PROCESS, 0), lambda was: os.setpriority(os.PRIO_PROCESS, 0, was)
    ),
    Part("the CPUs", lambda: os.sched_getaffinity(0), lambda was: os.sched_setaffinity(0, was)),
    Part("the user", os.getresuid, lambda was: os.setresuid(*was)),
    Part("logging", _logging, _put_logging_back),
    Part(
        "the start method",
        lambda: multiprocessing.get_start_method(allow_none=True),
        lambda was: multiprocessing.set_start_method(was, force=True),
    ),
    Part("the interpreter", _interpreter, _put_interpreter_back),
]


# --- torch and random numbers, where they are loaded ---


def _torch() -> tuple[Any, ...] | None:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_default_device"):  # not loaded, or not to its end
        return None
    choices = (torch.get_default_dtype(), torch.empty(0).device, torch.get_float32_matmul_precision())
    modes = (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
    return (*choices, *modes, torch.get_num_threads(), torch.get_num_interop_threads())


def _fresh_torch(threads: str) -> tuple[Any, ...] | None:
    """What a body met that imported it. `threads`: OMP_NUM_THREADS by then, which Ray sets."""
    if (now := _torch()) is None:
        return None
    torch = sys.modules["torch"]
    fresh = (torch.float32, torch.device("cpu"), "highest", True, False)
    return (*fresh, int(threads) if threads.isdigit() and int(threads) else now[-2], now[-1])


def _put_torch_back(was: tuple[Any, ...]) -> None:
    torch = sys.modules["torch"]
    torch.set_default_dtype(was[0])
    torch.set_default_device(None if was[1] == torch.device("cpu") else was[1])
    torch.set_float32_matmul_precision(was[2])
    torch.set_grad_enabled(was[3])
    torch.use_deterministic_algorithms(was[4])
    torch.set_num_threads(was[5])


def _forget_seeds() -> None:
    random.seed(int.from_bytes(os.urandom(16)))
    if (numbers := sys.modules.get("numpy.random")) is not None and hasattr(numbers, "seed"):
        numbers.seed(int.from_bytes(os.urandom(4)))
    if (generator := getattr(sys.modules.get("torch"), "default_generator", None)) is not None:
        generator.seed()
