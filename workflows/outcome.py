"""What became of an attempt, as a record: the user's fault, the platform's, or a result.

The platform's faults (`system`) are retried with backoff, bounded, apart from the user's retries. Everything else is
the user's: shown with the user's own traceback first, without a frame of ours.
"""

import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import infra.errors as errors
from infra.errors import RecuaError, StepError, StepTimeout, StoreError, SystemFault, UserError

Record = dict[str, Any]
OURS = {"worker.py", "executor.py", "session.py", "outcome.py", "graph.py"}


def describe(error: BaseException) -> Record:
    """An exception of a body as a record: `kind` is "user", "refused" (never retried) or "system"."""
    return {
        "kind": _kind(error),
        "type": _system_name(error) or type(error).__name__,
        "message": str(error).strip() or type(error).__name__,
        "traceback": user_traceback(error),
    }


def user_traceback(error: BaseException) -> str:
    """The traceback from the user's first frame on, causes included."""
    shown = traceback.TracebackException(type(error), error, _user_frames(error.__traceback__))
    cause = shown
    while cause is not None:
        cause.stack = traceback.StackSummary.from_list([frame for frame in cause.stack if not _is_ours(frame.filename)])
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    return "".join(shown.format())


def of_ray_error(error: BaseException, ran_s: float | None, timeout_s: float | None) -> Record:
    """What Ray says of a task that returned nothing: the worker, its node or its memory is gone, or it was cancelled.

    `ran_s`: seconds since the body began, None where it never did.
    """
    name, text = type(error).__name__, str(error).strip()
    first_line = text.splitlines()[0] if text else name
    if timeout_s is not None and ran_s is not None and ran_s >= timeout_s - 0.2:
        message = f"ran past its timeout of {timeout_s:g} s; its processes were killed (timeout= of the step)"
        return {"kind": "timeout", "type": "StepTimeout", "message": message, "traceback": ""}
    if name == "RuntimeEnvSetupError":
        return {"kind": "refused", "type": "ConfigError", "message": text, "traceback": ""}
    if name == "OutOfMemoryError":
        message = "killed for memory by Ray; give the step more (memory=) or run fewer steps at once"
        return {"kind": "system", "type": "OutOfMemory", "message": message, "traceback": ""}
    if name == "RayTaskError" or "RayTaskError" in name:
        return {"kind": "user", "type": name, "message": first_line, "traceback": text}
    kind = "Preempted" if "preempt" in text.lower() else "NodeLost"
    return {"kind": "system", "type": kind, "message": f"its worker process died ({name})", "traceback": ""}


def rebuild(call_id: str, record: Record) -> RecuaError:
    """The typed exception for a failed call."""
    message = f"{call_id}: {record['message']}"
    kind = getattr(errors, record["type"], None)
    typed = isinstance(kind, type) and issubclass(kind, (UserError, SystemFault, StoreError))
    if typed and record["kind"] != "user":
        assert kind is not None
        error: RecuaError = kind(message)
        return error
    return StepError(f"{call_id}: {record['type']}: {record['message']}", record["traceback"])


def _kind(error: BaseException) -> str:
    if isinstance(error, StepTimeout):
        return "timeout"
    if isinstance(error, (SystemFault, StoreError)) or _system_name(error):
        return "system"
    return "refused" if isinstance(error, UserError) else "user"


def _system_name(error: BaseException) -> str | None:
    """Errors of a body's own actors and objects that mean a lost process, not wrong code."""
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
    return path.parent == Path(__file__).parent and path.name in OURS
