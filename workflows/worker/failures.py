"""Failures of attempts as records: the user's or the platform's.

The platform's faults (`system`) are retried with backoff, a bounded number of times, apart from the user's retries. All
others are the user's: their traceback is shown first, without frames of ours.
"""

import re
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import infra.errors as errors
from infra.errors import RecuaError, StepError, StepTimeout, StoreError, SystemFault, UserError
from infra.telemetry import shorten
from workflows.graph.values import readable

Record = dict[str, Any]
MESSAGE_LETTERS, TRACEBACK_LETTERS = 10_000, 100_000
OURS = {
    Path(__file__).parents[1] / name
    for name in (
        "worker/attempt.py",
        "worker/failures.py",
        "driver/executor.py",
        "driver/session.py",
        "graph/steps.py",
        "graph/futures.py",
        "graph/definitions.py",
    )
}


def describe(error: BaseException) -> Record:
    """An exception of a body as a record: `kind` is "user", "refused" (never retried) or "system". Very long texts are
    shortened in the middle."""
    ended = _ended_by_ray(error)
    raised = _raised_remotely(error) or error
    message = _message(raised) if ended is None else f"its worker process was ended: {ended}"
    return {
        "kind": _kind(error),
        "type": _system_name(error) or type(raised).__name__,
        "message": shorten(_plain(message).strip() or type(raised).__name__, MESSAGE_LETTERS),
        "traceback": shorten(user_traceback(error), TRACEBACK_LETTERS),
    }


def _message(error: BaseException) -> str:
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        return f"the body called sys.exit({'' if error.code is None else error.code}); a step ends by returning"
    try:
        return str(error)
    except BaseException as failure:
        return f"it cannot say what it is about: {type(failure).__name__} in its __str__"


def user_traceback(error: BaseException) -> str:
    """The traceback from the user's first frame on, with its causes."""
    shown = traceback.TracebackException(type(error), error, _user_frames(error.__traceback__))
    cause = shown
    while cause is not None:
        cause.stack = traceback.StackSummary.from_list([frame for frame in cause.stack if not _is_ours(frame.filename)])
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    return _plain("".join(shown.format()))


def of_ray_error(error: BaseException, ran_s: float | None, timeout_s: float | None, preempted: bool = False) -> Record:
    """The record of a task that returned nothing: its worker or node died, memory ran out, or it was cancelled.

    `ran_s`: seconds since the body's start was reported, None if it was not. `preempted`: its node ended after a
    notice.
    """
    name, text = type(error).__name__, str(error).strip()
    first_line = text.splitlines()[0] if text else name
    if timeout_s is not None and ran_s is not None and ran_s >= timeout_s - min(1.0, timeout_s / 2):
        message = f"ran past its timeout of {timeout_s:g} s; its processes were killed (timeout= of the step)"
        return {"kind": "timeout", "type": "StepTimeout", "message": message, "traceback": ""}
    if name == "RuntimeEnvSetupError":
        return {"kind": "refused", "type": "ConfigError", "message": text, "traceback": ""}
    if name == "OutOfMemoryError":
        message = "killed for memory by Ray; give the step more (memory=) or run fewer steps at once"
        return {"kind": "system", "type": "OutOfMemory", "message": message, "traceback": ""}
    if name == "RayTaskError" or "RayTaskError" in name:
        trace = shorten(text, TRACEBACK_LETTERS)
        return {"kind": "user", "type": name, "message": shorten(first_line, MESSAGE_LETTERS), "traceback": trace}
    if preempted:
        return {"kind": "system", "type": "Preempted", "message": "its node was preempted", "traceback": ""}
    what = "its node was lost" if name == "NodeDiedError" else f"its worker process died ({name})"
    return {"kind": "system", "type": "NodeLost", "message": what, "traceback": ""}


def rebuild(call_id: str, record: Record) -> RecuaError:
    """The typed exception for a failed call."""
    message = f"{call_id}: {record['message']}"
    kind = getattr(errors, record["type"], None)
    typed = isinstance(kind, type) and issubclass(kind, (UserError, SystemFault, StoreError))
    if typed and record["kind"] != "user":
        assert kind is not None
        error: RecuaError = kind(message)
        return error
    said = "" if record["message"] == record["type"] else f": {record['message']}"
    return StepError(f"{call_id}: {record['type']}{said}", record["traceback"])


def _raised_remotely(error: BaseException) -> BaseException | None:
    """The error of a body's own Ray task or actor, without Ray's wrapper."""
    cause = getattr(error, "cause", None) if type(error).__name__.startswith("RayTaskError") else None
    return cause if isinstance(cause, BaseException) else None


def _plain(text: str) -> str:
    """The text without the colours in Ray's errors, and with halves of surrogate pairs (from file names that are not
    text) as escapes, so that every stream can write it."""
    return readable(re.sub("\x1b\\[[0-9;]*m", "", text))


def _kind(error: BaseException) -> str:
    if isinstance(error, StepTimeout):
        return "timeout"
    if isinstance(error, (SystemFault, StoreError)) or _system_name(error):
        return "system"
    return "refused" if isinstance(error, UserError) else "user"


def _ended_by_ray(error: BaseException) -> str | None:
    """Why Ray ends the body's process, if this is the error that it raises then."""
    return getattr(error, "ray_terminate_msg", None) if isinstance(error, SystemExit) else None


def _system_name(error: BaseException) -> str | None:
    """The message of an error of a body's process, or of its own actors and objects, that means a lost process and not
    wrong code."""
    if _ended_by_ray(error) is not None:
        return "NodeLost"
    module, name = type(error).__module__, type(error).__name__
    if not module.startswith("ray."):
        return None
    if getattr(error, "actor_init_failed", False):
        return None  # the actor's own __init__ raised
    if getattr(error, "preempted", False):
        return "Preempted"
    if name in {"ActorDiedError", "RayActorError", "ActorUnavailableError", "WorkerCrashedError", "NodeDiedError"}:
        return "NodeLost"
    if name in {"ObjectLostError", "OwnerDiedError", "ObjectReconstructionFailedError", "LocalRayletDiedError"}:
        return "NodeLost"
    return "OutOfMemory" if name == "OutOfMemoryError" else None


def _user_frames(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and _is_ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace


def _is_ours(filename: str) -> bool:
    path = Path(filename)
    if "site-packages" in path.parts and "ray" in path.parts:
        return True
    return path in OURS
