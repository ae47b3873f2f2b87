"""The worker's side of one attempt: what runs inside the Ray task.

A task is JSON in and JSON out. The body's exceptions travel as records, so a class that only the worker has cannot
break the driver; standard output and error go to the attempt's log, children's included.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from infra import faults
from infra.errors import FencedError, StoreError, SystemFault
from infra.storage import Store, open_store
from workflows.artifacts import ArtifactSource
from workflows.channel import Sender
from workflows.context import StepContext, enter
from workflows.graph import Step
from workflows.journal import fenced, latest_lease
from workflows.names import load_name
from workflows.outcome import describe
from workflows.reaper import Reaper
from workflows.values import decode, encode

Payload = dict[str, Any]
LOG = ".log.txt"


def run_attempt(run: str, attempt: bytes) -> bytes:
    """Run one attempt. `run`: what all attempts of a run share, `attempt`: this one's part, both JSON objects.

    Returns `{"ok": true, "result": ...}` or `{"ok": false, "error": ...}`, with times and node.
    """
    task: Payload = {**_parsed(run), "faults": {}, **json.loads(attempt)}
    outcome: dict[str, Any] = {"node": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
    clock = time.perf_counter()
    try:
        store = _store(task["store"])
        with _scratch(task) as scratch:
            with _log(store, task, scratch):
                outcome |= _body(task, store, scratch)
            outcome |= _keep_log(store, task, scratch)
    except Exception as error:  # the log, the lease, this machine: ours, not the user's
        outcome |= {"ok": False, "error": describe(error)}
    outcome["seconds"] = time.perf_counter() - clock
    return json.dumps(outcome).encode()


def _body(task: Payload, store: Store, scratch: Path) -> dict[str, Any]:
    send = _sender(*task["channel"]).send
    who = {"call": task["call"], "attempt_id": task["attempt_id"]}

    def tell(message: dict[str, Any]) -> None:
        send({**message, **who})

    source = ArtifactSource(task["store"], task["cache"])
    step_context = StepContext(
        task["run"],
        task["call"],
        task["attempt"],
        task["attempt_id"],
        task["store"],
        scratch,
        store,
        source,
        tell,
        functools.partial(_fault, task, "artifact.upload"),
    )
    _check_lease(task, store, _sender(*task["channel"]))
    tell({"kind": "started", "node": socket.gethostname(), "pid": os.getpid(), "time": time.time()})
    leave = enter(step_context)
    try:
        step = load_name(task["step"])
        assert isinstance(step, Step), f"{task['step']} is no step"
        arguments = decode(task["arguments"], source)
        _fault(task, "executor.body")
        value = step.fn(*arguments["args"], **arguments["kwargs"])
        return {"ok": True, "result": encode(value, f"{task['call']}: the result")}
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        record = describe(error)
        print(record["traceback"], file=sys.stderr, flush=True)
        return {"ok": False, "error": record}
    finally:
        leave()


def _check_lease(task: Payload, store: Store, driver: Sender) -> None:
    """No attempt begins for a driver that another one may have replaced: a task can wait in a queue for long. A lease
    that still runs is not enough: where its driver has ended, the next one need not wait for it."""
    if time.time() <= task["lease_until"] and driver.open():
        return
    if latest_lease(store, task["run"]) != task["lease_slot"]:
        error: FencedError = fenced(task["run"])
        raise error


def _fault(task: Payload, point: str) -> None:
    action = task["faults"].pop(point, None)
    faults.perform(action, point, pid=task["driver_pid"] if action in faults.SIGNALS else None)
    if action in faults.SIGNALS:
        time.sleep(30)  # the driver is dying, and this process with it


@contextlib.contextmanager
def _scratch(task: Payload) -> Iterator[Path]:
    """A folder for one attempt: removed when the body ends, by the reaper where this process dies first."""
    with _machine_trouble():
        scratch = Path(tempfile.mkdtemp(prefix="recua-"))
        _reaper().begin(task["timeout"], str(scratch))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        _reaper().end()


@contextlib.contextmanager
def _machine_trouble() -> Iterator[None]:
    """A full disk or too many open files before a body begins is no fault of the body."""
    try:
        yield
    except OSError as error:
        raise SystemFault(f"{socket.gethostname()} cannot begin a step: {error}") from error


def _log_key(task: Payload) -> str:
    return f"runs/{task['run']}/attempts/{task['attempt_id']}/log.txt"


@contextlib.contextmanager
def _log(store: Store, task: Payload, scratch: Path) -> Iterator[None]:
    """Send file descriptors 1 and 2 to the attempt's log while the body runs."""
    file = store.local_path(_log_key(task)) or scratch / LOG
    with _machine_trouble():
        file.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    saved = [os.dup(1), os.dup(2)]
    _flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        yield
    finally:
        _flush()
        for number, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(log)


def _keep_log(store: Store, task: Payload, scratch: Path) -> dict[str, Any]:
    """Upload the log where the store is no folder. A body's end, good or bad, stands even where its log is lost: what
    there is to say of that, as a `warning`."""
    file = scratch / LOG
    try:
        if file.exists() and file.stat().st_size:
            store.upload_file(_log_key(task), file)
    except StoreError as error:
        return {"warning": f"the log of attempt {task['attempt']} could not be kept: {error}"}
    return {}


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError, io.UnsupportedOperation):
            stream.flush()


# One of each per worker process, made at its first step: processes, connections and clients are reused across steps.
@functools.cache
def _reaper() -> Reaper:
    return Reaper()


@functools.cache
def _parsed(run: str) -> Payload:
    parsed: Payload = json.loads(run)
    return parsed


@functools.cache
def _store(url: str) -> Store:
    return open_store(url)


@functools.cache
def _sender(host: str, port: int, token: str) -> Sender:
    return Sender((host, port, token))


def bootstrap(roots: list[str], run: str) -> Callable[[bytes], bytes]:
    """The function that Ray ships, once per run: nested, so that it travels by value and can first make our modules
    importable. `run`: what all attempts of the run share."""

    def recua_step(attempt: bytes) -> bytes:
        import os
        import sys

        for root in roots:
            if root not in sys.path and os.path.isdir(root):
                sys.path.append(root)
        from workflows.worker import run_attempt

        return run_attempt(run, attempt)

    return recua_step
