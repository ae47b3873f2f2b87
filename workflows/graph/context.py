"""`context()`: the API for the body of a running step."""

import math
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.storage import Store
from infra.telemetry import as_number
from workflows.graph.artifact_writer import ArtifactWriter
from workflows.graph.artifacts import ArtifactSource
from workflows.graph.step_state import state_url

LOG = "log.txt"
"""The body's output, beside the attempt's artifacts."""
PROGRESS_PERIOD_S = 0.2

_step: ContextVar["StepContext"] = ContextVar("recua_step")


@dataclass(kw_only=True)
class StepContext:
    """One attempt of one call. `scratch_path` is a local folder that the first use of `scratch` creates."""

    run_id: str
    call_id: str
    attempt: int
    attempt_id: str
    scratch_path: Path
    store: Store
    source: ArtifactSource
    send: Callable[[dict[str, Any]], None]
    on_file: Callable[[], None]
    nodes_come: bool = False
    """Whether an autoscaler may add nodes to the cluster (RunSettings.wait_for_nodes)."""
    saves_state: bool = False
    """Whether `state_url` was asked for: the driver removes what is there after the commit."""
    _last_progress: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def store_url(self) -> str:
        """The run's store."""
        return self.source.store_url

    @property
    def scratch(self) -> Path:
        """A local folder of this attempt's own, removed when the body ends."""
        self.scratch_path.mkdir(mode=0o700, exist_ok=True)
        return self.scratch_path

    def artifact(self, name: str) -> ArtifactWriter:
        """A new folder to write into (`.path`), sealed into an Artifact by `.seal(**meta)`.

        Raises:
            UserError: the name is not a plain file name, is too long, or was used before.
        """
        plain = name and not name.startswith(".") and not {"/", "\0"} & set(name) and name != LOG
        if not plain or name.encode(errors="ignore").decode() != name:
            raise UserError(f"artifact name {name!r}: use a plain file name (no /, no dot at its start, not {LOG})")
        location = f"runs/{self.run_id}/attempts/{self.attempt_id}/{name}"
        self.store.check_key(location)
        try:
            return ArtifactWriter(self.store, self.source, location, self.scratch_path, self.on_file)
        except FileExistsError:
            raise UserError(f"{self.call_id} writes two artifacts named {name!r}") from None

    def state_url(self) -> str:
        """The URL of a store (`infra.storage.open_store`) for state that a retry of this call resumes from, on any
        node. The state is removed when the call's result is committed."""
        self.saves_state = True
        return state_url(self.store, self.run_id, self.call_id)

    def progress(self, done: float, total: float | None = None, **metrics: float) -> None:
        """Show the body's progress and metrics on the driver's terminal. Cheap: shows at most five reports per second,
        and always the last one (done == total). An infinite `total` means that it is unknown.

        Raises:
            UserError: `done` is not a finite number, or `total` or a metric is not a number.
        """
        done, total = as_number("done", done), None if total is None else as_number("total", total)
        if not math.isfinite(done):
            raise UserError(f"done={done}: must be finite")
        if total is not None and not math.isfinite(total):
            total = None
        numbers = {name: as_number(name, value) for name, value in metrics.items()}
        now = time.monotonic()
        with self._lock:
            if now - self._last_progress < PROGRESS_PERIOD_S and done != total:
                return
            self._last_progress = now
        self.send({"kind": "progress", "done": done, "total": total, "metrics": numbers})

    def log(self, message: str) -> None:
        """A line for this attempt's log (where its standard output goes too) and for the driver's observers."""
        print(message, flush=True)
        self.send({"kind": "log", "message": str(message)})

    def placement_group(self) -> Any:
        """The Ray placement group of this attempt (`@step(gang=...)`). The body runs in its bundle 0. Tasks and actors
        that it starts run in the group, or in one bundle with Ray's PlacementGroupSchedulingStrategy.

        Raises:
            UserError: the step has no gang.
        """
        import ray
        from ray.util.placement_group import get_current_placement_group

        group = get_current_placement_group() if ray.is_initialized() else None  # asking would start a Ray
        if group is None:
            raise UserError(f"{self.call_id} has no placement group: ask for one with @step(gang=...)")
        return group


def context() -> StepContext:
    """The context of the step body that is running.

    Raises:
        UserError: called outside a step's body (pass the context to other threads as an argument).
    """
    try:
        return _step.get()
    except LookupError:
        raise UserError("context() works only inside a @step's body, on the thread that runs it") from None


def enter(step_context: StepContext) -> Callable[[], None]:
    """Make `step_context` the current one; call the returned function to end that."""
    token = _step.set(step_context)
    return lambda: _step.reset(token)
