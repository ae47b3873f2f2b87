"""The worker's side of one attempt, inside the Ray task.

An attempt is JSON in and JSON out. The body's exceptions are sent as records, so that a class that only the worker has
cannot break the driver. Standard output and error, also of child processes, go to the attempt's log.
"""

import contextlib
import contextvars
import functools
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from infra import fault_injection
from infra.errors import SystemFault
from infra.reaper import Reaper
from infra.storage import Store, open_store
from infra.telemetry import hide_secrets_in_logs
from workflows.graph.artifacts import ArtifactSource
from workflows.graph.context import StepContext, enter
from workflows.graph.steps import function_behind
from workflows.graph.values import decode, encode
from workflows.identity.names import load_name
from workflows.runs.journal import check_lease
from workflows.worker.captured_output import CapturedOutput
from workflows.worker.channel import Sender
from workflows.worker.failures import describe
from workflows.worker.isolation import Isolation
from workflows.worker.watchdog import Watchdog

Payload = dict[str, Any]
SHORT_S = 0.1
"""A body shorter than this reports only its end."""


def run_attempt(run: str, attempt: Payload) -> str:
    """Run one attempt. `run`: the data that all attempts of a run share (a JSON object), `attempt`: this one's part.

    Returns `{"ok": true, "result": ...}` or `{"ok": false, "error": ...}`, with times and node, in JSON.
    """
    task: Payload = {**_parsed(run), "faults": {}, **attempt}
    outcome: dict[str, Any] = {"node": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
    clock = time.perf_counter()
    hide_secrets_in_logs()
    try:
        store = _store(task["store"])
        scratch = Path(f"{tempfile.gettempdir()}/recua-{task['attempt_id']}")
        with _output(task, store, scratch) as said:
            outcome |= _body(task, store, scratch, said)
        if said:
            outcome["warning"] = f"attempt {task['attempt']}: {'; '.join(said)}"
    except Exception as error:  # from the log, the lease or this machine, not from the user's code
        outcome |= {"ok": False, "error": describe(error)}
    outcome["seconds"] = time.perf_counter() - clock
    return json.dumps(outcome)


def tell_driver(run: str, message: dict[str, Any]) -> None:
    """Send a message to the driver of this run. Never raises."""
    _sender(*_parsed(run)["channel"]).send(message)


@contextlib.contextmanager
def _output(task: Payload, store: Store, scratch: Path) -> Iterator[list[str]]:
    """Capture the body's output and remove its scratch folder; the reaper does both if this process dies first. The
    yielded list gets messages about output that could not be stored."""
    output, reaper = _catcher(), _reaper()
    said: list[str] = []
    try:
        log = output.prepare(store, f"runs/{task['run']}/attempts/{task['attempt_id']}/log.txt")
        reaper.begin(task["timeout"], str(scratch), output.printed, log)
        output.begin()
    except OSError as error:  # a full disk or too many open files, not the body's fault
        raise SystemFault(f"{socket.gethostname()} cannot begin a step: {error}") from error
    try:
        yield said
    finally:
        if warning := output.end():
            said.append(warning)
        shutil.rmtree(scratch, ignore_errors=True)
        reaper.end(output.printed)


def _body(task: Payload, store: Store, scratch: Path, said: list[str]) -> dict[str, Any]:
    sender, alarm, output = _sender(*task["channel"]), _alarm(), _catcher()
    who = {"call": task["call"], "attempt_id": task["attempt_id"]}

    def tell(message: dict[str, Any]) -> None:
        alarm.now()
        sender.send({**message, **who})

    def show() -> None:
        sender.send({"kind": "started", "node": socket.gethostname(), "pid": os.getpid(), "time": time.time(), **who})
        with contextlib.suppress(OSError):
            output.show()

    source = ArtifactSource(task["store"], task["cache"])
    step_context = StepContext(
        run_id=task["run"],
        call_id=task["call"],
        attempt=task["attempt"],
        attempt_id=task["attempt_id"],
        scratch_path=scratch,
        store=store,
        source=source,
        send=tell,
        on_file=functools.partial(_fault, task, "artifact.upload"),
        nodes_come=bool(task.get("nodes_come")),
    )
    _check_lease(task, store, sender)
    alarm.set(show)
    if task["timeout"] is not None:
        alarm.now()  # the driver has a clock to start
    leave = enter(step_context)
    try:
        function = _function(task["step"])
        arguments = decode(task["arguments"], source)
        _fault(task, "executor.body")
        with _isolation().around_body(said):
            value = contextvars.copy_context().run(function, *arguments["args"], **arguments["kwargs"])
        result = encode(value, "the result")
        return {"ok": True, "result": result, **({"state": True} if step_context.saves_state else {})}
    except BaseException as error:  # sys.exit, Ctrl-C in a library, an exception class of the user's own
        record = describe(error)
        output.say(record["traceback"])
        return {"ok": False, "error": record}
    finally:
        leave()
        alarm.clear()


def _check_lease(task: Payload, store: Store, driver: Sender) -> None:
    """Refuse an attempt for a driver that may have been replaced, because a task can wait in a queue for long. A valid
    lease is not enough: if its driver has ended, the next driver need not wait for it."""
    if time.time() <= task["lease_until"] and driver.open():
        return
    check_lease(store, task["run"], task["lease_slot"])


def _fault(task: Payload, point: str) -> None:
    action = task["faults"].pop(point, None)
    fault_injection.perform(action, point, pid=task["driver_pid"] if action in fault_injection.SIGNALS else None)
    if action in fault_injection.SIGNALS:
        time.sleep(30)  # the driver is ending, and this process with it


def may_run_more() -> bool:
    """Whether other attempts may follow in this process."""
    return not _isolation().given_up


# One of each per worker process, created at its first step: steps share processes, connections and clients.
@functools.cache
def _reaper() -> Reaper:
    return Reaper()


@functools.cache
def _isolation() -> Isolation:
    return Isolation()


@functools.cache
def _catcher() -> CapturedOutput:
    return CapturedOutput()


@functools.cache
def _alarm() -> Watchdog:
    return Watchdog(SHORT_S)


@functools.cache
def _function(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = function_behind(load_name(name))
    return function


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
