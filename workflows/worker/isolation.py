"""Isolation: a body's changes to its process do not affect the next body.

A worker process runs many bodies, one after another. When a body has ended, its changes to the process are undone, and
processes that it left are ended. The worker is given up, so that the next task runs in another process, if a change
cannot be undone, if processes had to be ended (a library may rely on them), or if a body that changed something has
also imported modules, because an import's settings belong to the module's later users.

Not covered: running threads, and changes inside modules. Random numbers start as in a new process, so that bodies that
do not seed them do not draw the same numbers as an earlier body.
"""

import builtins
import contextlib
import faulthandler
import gc
import locale
import logging
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from _signal import getsignal, pthread_sigmask  # fifty times faster than in signal, which looks for members of an enum
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from infra.processes import GONE, adopt_orphans, children, process_state
from infra.ray_internals import end_after_this_task

"""`max_calls` of our Ray tasks: never reached, unless a worker is given up."""
ENDING_S = 5.0
LEAVING_S = 1.0
"""Time for a process to end that its body told to end, but did not wait for."""
NAMELESS_S = 0.5
THREADS_S = 0.1
"""Time for a thread to end that is ending when the body returns."""
LIMIT_NAMES = ("AS", "CPU", "DATA", "FSIZE", "NOFILE", "NPROC", "STACK")
LIMITS = [getattr(resource, f"RLIMIT_{name}") for name in LIMIT_NAMES]
INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
ENVIRONMENT = os.environ
TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


class Part(NamedTuple):
    """A part of a process's state that a body may change, with functions to read and to restore it."""

    name: str
    read: Callable[[], Any]
    put_back: Callable[[Any], object]


class Isolation:
    """The isolation of one worker process, created before its first body. `given_up`: no other body may run here."""

    def __init__(self) -> None:
        self.given_up = False
        adopt_orphans(True)

    @contextlib.contextmanager
    def around_body(self, said: list[str]) -> Iterator[None]:
        """Undo the body's changes; messages about those that matter to users are added to `said`."""
        before, left_before = [(part, _read(part)) for part in PARTS], set(children())
        threads_before = set(threading.enumerate())
        modules, threads = len(sys.modules), os.environ.get("OMP_NUM_THREADS", "")
        torch = _torch()
        try:
            with warnings.catch_warnings():
                yield
        finally:
            _end_helpers()
            ended = _end_children(left_before)
            before.append((Part("torch's settings", _torch, _put_torch_back), torch or _fresh_torch(threads)))
            changed = [(part, was) for part, was in before if _read(part) != was and not isinstance(was, Exception)]
            stuck = [part.name for part, was in changed if not _put_back(part, was)]
            _start_anew()
            said += [f"process {process} outlived its step and was ended" for process in ended]
            said += [f"what it did to {name} cannot be undone: its worker process is given up" for name in stuck]
            if ended or stuck or (changed and len(sys.modules) != modules) or _threads_left(threads_before):
                self.given_up = True
                _give_up()


def _give_up() -> None:
    """Let Ray end this process once the task's result is sent."""
    if (ray := sys.modules.get("ray")) is not None:
        end_after_this_task(ray)


def _end_helpers() -> None:
    """Processes that multiprocessing starts for itself, and restarts when it needs them. (The tracker removes shared
    memory that a body left.)"""
    for module, helper in (("resource_tracker", "_resource_tracker"), ("forkserver", "_forkserver")):
        if (loaded := sys.modules.get(f"multiprocessing.{module}")) is not None:
            with contextlib.suppress(Exception):
                getattr(loaded, helper)._stop()


def _threads_left(before: set[threading.Thread]) -> bool:
    """Whether Python threads of the body still run, except those that libraries keep for their next call."""
    deadline = time.monotonic() + THREADS_S
    while new := [each for each in set(threading.enumerate()) - before if not _is_librarys(each)]:
        if time.monotonic() > deadline:
            return True
        new[0].join(THREADS_S / 10)
    return False


def _is_librarys(thread: threading.Thread) -> bool:
    """Whether an installed library or native code has started the thread."""
    code = getattr(getattr(thread, "_target", None) or type(thread).run, "__code__", None)
    installed = code is not None and INSTALLED.search(code.co_filename) is not None
    return installed or isinstance(thread, threading._DummyThread)


def _end_children(before: set[int]) -> list[str]:
    """End and reap the processes that were left; returns the live ones in words. Their children become ours."""
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
    """A process's command line; "" if it has ended by itself. A process that is calling exec shows none for a moment,
    and one that hides its command line never does."""
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
    except Exception as error:  # the working folder is gone, or the body replaced the object that is read
        return error


def _put_back(part: Part, was: Any) -> bool:
    """Whether the value is unchanged."""
    with contextlib.suppress(Exception):
        part.put_back(was)
    return bool(_read(part) == was)


# --- the parts ---


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _environment() -> tuple[bool, dict[bytes, bytes], Any]:
    """Whether os.environ is Python's own object, its content (not decoded, because decoding is slow), and the C
    library's time zone."""
    kept: dict[bytes, bytes] = vars(ENVIRONMENT)["_data"]
    return os.environ is ENVIRONMENT, kept.copy(), time.tzname


def _put_environment_back(before: tuple[bool, dict[bytes, bytes], Any]) -> None:
    os.environ = ENVIRONMENT  # noqa: B003  # a body may have put a dict there
    was = before[1]
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
    classes = (logging.getLoggerClass(), logging.getLogRecordFactory(), logging.raiseExceptions)
    return root.level, root.disabled, root.manager.disable, list(root.handlers), list(root.filters), *classes


def _put_logging_back(was: tuple[Any, ...]) -> None:
    root = logging.getLogger()
    root.setLevel(was[0])
    root.disabled, root.manager.disable, root.handlers[:], root.filters[:] = was[1:5]
    logging.setLoggerClass(was[5])
    logging.setLogRecordFactory(was[6])
    logging.raiseExceptions = was[7]


SWITCHES: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (sys.getswitchinterval, sys.setswitchinterval),
    (sys.get_int_max_str_digits, sys.set_int_max_str_digits),
    (sys.gettrace, sys.settrace),
    (sys.getprofile, sys.setprofile),
    (threading.gettrace, threading.settrace),
    (threading.getprofile, threading.setprofile),
    (threading.stack_size, threading.stack_size),
    (gc.isenabled, lambda was: gc.enable() if was else gc.disable()),
    (gc.get_threshold, lambda was: gc.set_threshold(*was)),
    (socket.getdefaulttimeout, socket.setdefaulttimeout),
]
"""Settings of the interpreter, with functions to read and to set each."""
ATTRIBUTES: list[tuple[Any, str]] = [
    *((sys, name) for name in ("displayhook", "excepthook", "unraisablehook", "breakpointhook", "stdin")),
    *((sys, name) for name in ("argv", "path", "meta_path", "path_hooks", "dont_write_bytecode", "pycache_prefix")),
    (threading, "excepthook"),
    (tempfile, "tempdir"),
]


def _interpreter() -> tuple[Any, ...]:
    attributes = [getattr(module, name) for module, name in ATTRIBUTES]
    kept = [list(value) if isinstance(value, list) else value for value in attributes]
    return [read() for read, _ in SWITCHES], kept, vars(builtins).copy()


def _put_interpreter_back(was: tuple[Any, ...]) -> None:
    switches, attributes, names = was
    for (_, put), value in zip(SWITCHES, switches, strict=True):
        put(value)
    for (module, name), value in zip(ATTRIBUTES, attributes, strict=True):
        if isinstance(value, list) and isinstance(getattr(module, name, None), list):
            getattr(module, name)[:] = value
        else:
            setattr(module, name, value)
    there = vars(builtins)
    there.update(names)
    for name in there.keys() - names.keys():
        del there[name]


def _put_user_back(was: tuple[Any, ...]) -> None:
    os.setresuid(*was[0])
    os.setresgid(*was[1])
    os.setgroups(was[2])


PARTS = [
    Part(
        "the timers",
        lambda: [signal.getitimer(timer)[0] > 0 for timer in TIMERS],
        lambda _: [signal.setitimer(timer, 0) for timer in TIMERS],
    ),
    Part(
        "the signal mask",
        lambda: pthread_sigmask(signal.SIG_BLOCK, ()),
        lambda was: pthread_sigmask(signal.SIG_SETMASK, was),
    ),
    Part("the signal handlers", _handlers, _put_handlers_back),
    Part("the resource limits", lambda: [resource.getrlimit(number) for number in LIMITS], _put_limits_back),
    Part("the root folder", lambda: os.stat("/")[1:3], lambda was: None),
    Part("the working folder", os.getcwd, os.chdir),
    Part("the umask", _umask, os.umask),
    Part("the environment", _environment, _put_environment_back),
    Part("the locale", lambda: locale.setlocale(locale.LC_ALL), lambda was: locale.setlocale(locale.LC_ALL, was)),
    Part(
        "the priority", lambda: os.getpriority(os.PRIO_PROCESS, 0), lambda was: os.setpriority(os.PRIO_PROCESS, 0, was)
    ),
    Part("the CPUs", lambda: os.sched_getaffinity(0), lambda was: os.sched_setaffinity(0, was)),
    Part("the user", lambda: (os.getresuid(), os.getresgid(), os.getgroups()), _put_user_back),
    Part("logging", _logging, _put_logging_back),
    Part(
        "the start method",
        lambda: multiprocessing.get_start_method(allow_none=True),
        lambda was: multiprocessing.set_start_method(was, force=True),
    ),
    Part("the interpreter", _interpreter, _put_interpreter_back),
]


# --- torch and random numbers, if they are loaded ---


def _torch() -> tuple[Any, ...] | None:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_default_device"):  # not loaded, or not completely
        return None
    choices = (torch.get_default_dtype(), torch.empty(0).device, torch.get_float32_matmul_precision())
    modes = (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
    cudnn = torch.backends.cudnn
    more = (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), torch.is_anomaly_enabled())
    flags = (*more, cudnn.benchmark, cudnn.deterministic, _has_group(torch))
    return (*choices, *modes, *flags, torch.get_num_threads(), torch.get_num_interop_threads())


def _has_group(torch: Any) -> bool:
    """Whether there is a default process group: a second one is refused."""
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def _fresh_torch(threads: str) -> tuple[Any, ...] | None:
    """torch's settings for the body that imported it. `threads`: OMP_NUM_THREADS at that time, which Ray sets."""
    if (now := _torch()) is None:
        return None
    torch = sys.modules["torch"]
    fresh = (torch.float32, torch.device("cpu"), "highest", True, *[False] * 7)
    return (*fresh, int(threads) if threads.isdigit() and int(threads) else now[-2], now[-1])


def _put_torch_back(was: tuple[Any, ...]) -> None:
    torch = sys.modules["torch"]
    torch.set_default_dtype(was[0])
    torch.set_default_device(None if was[1] == torch.device("cpu") else was[1])
    torch.set_float32_matmul_precision(was[2])
    torch.set_grad_enabled(was[3])
    torch.use_deterministic_algorithms(was[4])
    torch.set_autocast_enabled("cpu", was[5])
    torch.set_autocast_enabled("cuda", was[6])
    torch.autograd.set_detect_anomaly(was[7])
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = was[8:10]
    if _has_group(torch) and not was[10]:
        torch.distributed.destroy_process_group()
    torch.set_num_threads(was[11])


def _start_anew() -> None:
    """Restore random numbers, this thread's asyncio loop (`asyncio.run` removes it), and disable a pending
    traceback."""
    faulthandler.cancel_dump_traceback_later()
    if (events := sys.modules.get("asyncio.events")) is not None:
        events.set_event_loop_policy(None)
    random.seed(int.from_bytes(os.urandom(16)))
    if (numbers := sys.modules.get("numpy.random")) is not None and hasattr(numbers, "seed"):
        numbers.seed(int.from_bytes(os.urandom(4)))
    if (generator := getattr(sys.modules.get("torch"), "default_generator", None)) is not None:
        generator.seed()
