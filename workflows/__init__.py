"""The public surface of the durable graph: what a workflow file imports.

    from workflows import Artifact, context, step, workflow

Every name is imported when it is first asked for, so that the `recua` command, which lies in this package, stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infra.config import Settings
    from infra.errors import Denied, StepError, SystemFault, UserError
    from workflows.artifact_writer import ArtifactWriter
    from workflows.artifacts import Artifact
    from workflows.cli import run_script
    from workflows.config import RunSettings
    from workflows.gangs import Gang
    from workflows.graph import Future, Step, StepOptions, Workflow, on_end, run_id, step, workflow
    from workflows.session import RunResult, run
    from workflows.step_context import StepContext, context
    from workflows.waits import Approval, approval, event

__all__ = [
    "Approval",
    "Artifact",
    "ArtifactWriter",
    "Denied",
    "Future",
    "Gang",
    "RunResult",
    "RunSettings",
    "Settings",
    "Step",
    "StepContext",
    "StepError",
    "StepOptions",
    "SystemFault",
    "UserError",
    "Workflow",
    "approval",
    "context",
    "event",
    "on_end",
    "run",
    "run_id",
    "run_script",
    "step",
    "workflow",
]

_HOMES = {
    "infra.config": ("Settings",),
    "infra.errors": ("Denied", "StepError", "SystemFault", "UserError"),
    "workflows.artifact_writer": ("ArtifactWriter",),
    "workflows.artifacts": ("Artifact",),
    "workflows.cli": ("run_script",),
    "workflows.config": ("RunSettings",),
    "workflows.gangs": ("Gang",),
    "workflows.graph": ("Future", "Step", "StepOptions", "Workflow", "on_end", "run_id", "step", "workflow"),
    "workflows.session": ("RunResult", "run"),
    "workflows.step_context": ("StepContext", "context"),
    "workflows.waits": ("Approval", "approval", "event"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            import_module("workflows.names").make_way()
            value = globals()[name] = getattr(import_module(home), name)
            return value
    raise AttributeError(f"module 'workflows' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
