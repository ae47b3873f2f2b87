"""Steps for the tests of one task's batch."""

import asyncio
import builtins
import decimal
import gc
import locale
import logging
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np

from workflows.graph import step


@step
def plain(x: int) -> int:
    return x + 1


@step
def large(x: int) -> str:
    return "x" * (100 << 10)


@step
def gated(gate: str) -> str:
    deadline = time.monotonic() + 60
    while not Path(gate).exists():
        assert time.monotonic() < deadline, "the gate stays closed"
        time.sleep(0.01)
    return "open"


@step
def change_process(folder: str) -> float:
    """Change everything in the process that can be restored; the folder is gone afterwards."""
    asyncio.run(asyncio.sleep(0))
    block = shared_memory.SharedMemory(create=True, size=8)
    block.close()
    block.unlink()
    Path(folder).mkdir()
    os.chdir(folder)
    Path(folder).rmdir()
    os.umask(0o777)
    os.environ.update(LEFT="1", PATH="/nowhere", TZ="Asia/Tokyo")
    del os.environ["PYTHONPATH"]
    time.tzset()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 3600)
    locale.setlocale(locale.LC_ALL, "C")
    resource.setrlimit(resource.RLIMIT_NOFILE, (99, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    warnings.simplefilter("error")
    logging.basicConfig(level=logging.DEBUG, force=True)
    logging.disable(logging.CRITICAL)
    multiprocessing.set_start_method("spawn")
    socket.setdefaulttimeout(0.01)
    sys.setrecursionlimit(321)
    sys.set_int_max_str_digits(0)
    sys.settrace(lambda *_: None)
    sys.unraisablehook = sys.displayhook = print
    gc.set_threshold(1)
    threading.stack_size(1 << 20)
    tempfile.tempdir = folder
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    signal.setitimer(signal.ITIMER_PROF, 3600)
    builtins.left = builtins.ascii = None  # type: ignore[attr-defined]
    logging.getLogger().addFilter(lambda _: False)
    sys.path.insert(0, "/left")
    sys.argv.append("--left")
    np.seterr(all="raise")
    decimal.getcontext().prec = 3
    print("the last words")
    with sys.stdout:
        pass
    sys.stderr = None
    random.seed(1)
    np.random.seed(1)
    drawn = random.random() + float(np.random.random())
    os.environ = {}  # type: ignore[assignment]  # noqa: B003
    sys.meta_path.insert(0, None)  # type: ignore[arg-type]
    return drawn


@step
def process_state(_: int) -> dict[str, Any]:
    print("still heard")
    print("too", file=sys.stderr)
    loop = asyncio.get_event_loop()
    closed = loop.is_closed()
    loop.close()
    return {
        "folder": os.getcwd(),
        "umask": os.umask(0o077),
        "environment": dict(os.environ),
        "zone": time.strftime("%Z"),
        "handler": str(signal.getsignal(signal.SIGUSR1)),
        "timer": signal.getitimer(signal.ITIMER_REAL)[0],
        "locale": locale.setlocale(locale.LC_ALL),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "processors": sorted(os.sched_getaffinity(0)),
        "warnings": len(warnings.filters),
        "logging": [logging.getLogger().level, len(logging.getLogger().handlers), logging.root.manager.disable],
        "start method": multiprocessing.get_start_method(allow_none=True),
        "timeout": socket.getdefaulttimeout(),
        "recursion": sys.getrecursionlimit(),
        "path": list(sys.path),
        "arguments": list(sys.argv),
        "numpy": np.geterr(),
        "precision": decimal.getcontext().prec,
        "digits": sys.get_int_max_str_digits(),
        "trace": str(sys.gettrace()),
        "finders": str(sys.meta_path),
        "hooks": [str(sys.unraisablehook), str(sys.displayhook)],
        "collector": gc.get_threshold(),
        "stack": threading.stack_size(),
        "temporary": tempfile.gettempdir(),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "profile timer": signal.getitimer(signal.ITIMER_PROF)[0],
        "names": [hasattr(builtins, "left"), str(ascii)],
        "filters": len(logging.getLogger().filters),
        "loop closed": closed,
    }


@step
def draw(_: int) -> float:
    return random.random() + float(np.random.random())


@step
def first_torch(_: int) -> str:
    import torch

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    return str(torch.ones(1).dtype)


@step
def leave_thread(x: int) -> int:
    """Leave a thread that keeps printing."""

    def talk() -> None:
        while True:
            print("from before")
            time.sleep(0.001)

    threading.Thread(target=talk, daemon=True).start()
    return x


@step
def change_torch(_: int) -> None:
    import torch

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.backends.cudnn.benchmark = True
    torch.autograd.set_detect_anomaly(True)
    torch.autocast("cpu").__enter__()


@step
def torch_state(_: int) -> list[bool]:
    import torch

    modes = [torch.backends.cudnn.benchmark, torch.is_anomaly_enabled(), torch.is_autocast_enabled("cpu")]
    return [*modes, torch.distributed.is_initialized()]


@step
def leave_processes(folder: str) -> None:
    """Leave a child that keeps printing, and an orphaned process; each writes its pid to a file."""
    talk = "echo $$ > {0}/{1}.new; mv {0}/{1}.new {0}/{1}; while :; do echo {1}; sleep 0.01; done"
    subprocess.Popen(["sh", "-c", talk.format(folder, "child")], start_new_session=True)
    subprocess.run(
        ["sh", "-c", f"(setsid sh -c '{talk.format(folder, 'orphan')}' &)"], env={"PATH": os.environ["PATH"]}
    )
    deadline = time.monotonic() + 60
    while not {"child", "orphan"} <= {file.name for file in Path(folder).iterdir()}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
