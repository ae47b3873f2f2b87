"""The waits of a workflow: an approval by a person, an event from the outside world."""

from dataclasses import dataclass
from typing import Any

from workflows.graph.steps import Future, Step, StepOptions


@dataclass(frozen=True)
class Approval:
    """Who approved, when (seconds since the epoch), and with which comment."""

    who: str
    time: float
    comment: str = ""


class Wait(Step[..., Any]):
    """A call that the executor passes to its Poller instead of a worker. `kind`: approval or event."""

    def __init__(self, kind: str) -> None:
        super().__init__(_question, StepOptions(num_cpus=0, reuse=False))
        self.short_name = kind

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"workflows.waits:{self.short_name}"


def approval(
    name: str, message: str, *, show: Any = None, timeout: float | None = None, may_fail: bool = False
) -> Future[Approval]:
    """Inside a workflow: wait for a person's `recua approve RUN NAME`. The result is an Approval.

    `show`: a value for the person, which may contain futures; the question is asked when they are there. `timeout`:
    seconds after the question was asked, even if drivers die meanwhile.

    Its `result()` raises Denied if a person denied it, StepTimeout if no answer came in time; with `may_fail=True` the
    workflow can continue after that.
    """
    return _ask("approval", name, message, show, timeout, may_fail)


def event(
    name: str, message: str = "", *, show: Any = None, timeout: float | None = None, may_fail: bool = False
) -> Future[Any]:
    """Inside a workflow: wait for `recua send RUN NAME JSON`; the result is that value. The rest as for `approval`."""
    return _ask("event", name, message, show, timeout, may_fail)


def _ask(kind: str, name: str, message: str, show: Any, timeout: float | None, may_fail: bool) -> Future[Any]:
    options = StepOptions(num_cpus=0, reuse=False, name=name, timeout=timeout, may_fail=may_fail)
    return Wait(kind).submit(options, (message, show), {})


def _question(message: str, show: Any) -> Any:
    """The parameters of a wait; this never runs."""
    raise AssertionError("a wait has no body")
