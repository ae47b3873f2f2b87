"""One call of one step, from its creation to its end, and its run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from infra.fault_injection import FaultSchedule
from workflows.driver.settings import RunSettings
from workflows.graph.mapping import Fanout
from workflows.graph.steps import Step, StepOptions
from workflows.runs.events import Event
from workflows.runs.journal import Journal

ClusterCheck = Callable[[list[dict[str, float]]], None]
"""Called once, before the first attempt, with each node's resources by Ray's names; raises to refuse them. Left out if
an autoscaler may bring other nodes."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class Call:
    """One call of one step. A map is also a call: it has a `fanout`, makes its `children` when its list is known, and
    ends when they have ended.

    Waiting threads read `result` and `error` once `ended` is true, and change `awaited` and `seen`
    (workflows.driver.ends); everything else belongs to the loop's thread."""

    id: str
    step: Step[..., Any]
    options: StepOptions
    arguments: Any
    needs: tuple[str, ...]
    upstream: dict[str, "Call"]
    """The calls of `needs`, until their results are taken."""
    fanout: Fanout | None = None
    children: list["Call"] | None = None
    of: int | None = None
    """The number of items of this call's map."""
    waiting: int = 0
    """The number of `upstream` or `children` that have not ended."""
    dependents: list["Call"] = field(default_factory=list)
    inputs: str = ""
    key: str = ""
    code: str = ""
    attempt: int = 0
    attempt_id: str = ""
    started: float | None = None
    handed_back: bool = False
    """Whether its task handed the attempt back without beginning it."""
    user_failures: int = 0
    system_failures: int = 0
    saved_state: bool = False
    """Whether its body stored state for a retry, which must be removed after the commit."""
    result: Any = None
    error: BaseException | None = None
    ended: bool = False
    awaited: int = 0
    """The number of threads that wait for its end."""
    seen: bool = False
    """Whether its error was raised in the workflow."""


@dataclass(slots=True, eq=False)
class Batch:
    """One Ray task and the calls that share it; usually one call."""

    number: int
    calls: list[Call]
    reference: Any = None


@dataclass(frozen=True)
class RunContext:
    """Data that all parts of a driven run share. `emit` takes events from any thread."""

    journal: Journal
    settings: RunSettings
    faults: FaultSchedule
    emit: Callable[[Event], None]
    cluster_checks: tuple[ClusterCheck, ...] = ()

    def tell(self, kind: str, call: Call, **data: Any) -> None:
        """Emit an event of a call."""
        self.emit(Event(kind, call.id, call.step.short_name, data))

    def warn(self, message: str) -> None:
        """Emit a warning about the whole run."""
        self.emit(Event("warning", data={"message": message}))
