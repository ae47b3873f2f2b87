"""Turns Ray's errors into recua's."""

from dataclasses import dataclass

from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from infra.errors import NodeLost, OutOfMemory, Preempted, RecuaError, StepError


@dataclass(frozen=True)
class Fault:
    """`error`: the error to raise; `is_death`: the process died, rather than a method raised."""

    error: Exception
    is_death: bool


def name_fault(error: Exception, label: str) -> Fault:
    """Classify an error that `ray.get` raised for the worker called `label`.

    A dead worker is Preempted (its node was being drained), OutOfMemory or NodeLost. Recua's errors pass through
    unchanged; anything else becomes a StepError that carries the worker's traceback.
    """
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, RecuaError):
            return Fault(cause, is_death=False)
        summary = f"{type(cause).__name__}: {cause}".strip().splitlines()[0]
        return Fault(StepError(f"{label}: {summary}", user_traceback=str(error)), is_death=False)
    if isinstance(error, OutOfMemoryError):
        return Fault(OutOfMemory(f"{label} was killed for memory: {_first_line(error)}"), is_death=True)
    if isinstance(error, RayActorError):
        if error.actor_init_failed:
            reason = str(error).strip().splitlines()[-1]
            return Fault(StepError(f"{label} failed to start: {reason}", user_traceback=str(error)), is_death=False)
        if error.preempted:
            return Fault(Preempted(f"{label} was lost with its drained node"), is_death=True)
        if "(OOM)" in str(error) or "out of memory" in str(error).lower():
            return Fault(OutOfMemory(f"{label} was killed for memory"), is_death=True)
        return Fault(NodeLost(f"{label} died"), is_death=True)
    return Fault(error, is_death=False)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
