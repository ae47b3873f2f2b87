"""The public surface of the durable graph: what a workflow file imports.

    from workflows import Artifact, context, step, workflow

Every name is imported when it is first asked for, so that the `recua` command, which lies in this package, stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import workflows.identity.moved  # noqa: F401  installs the import of modules by their earlier names

if TYPE_CHECKING:
    from infra.config import Settings
    from infra.errors import Denied, StepError, SystemFault, UserError
    from workflows.cli.main import run_script
    from workflows.driver.session import RunResult, run
    from workflows.driver.settings import RunSettings
    from workflows.graph import (
        Approval,
        Artifact,
        ArtifactWriter,
        Future,
        Gang,
        Step,
        StepContext,
        StepOptions,
        Workflow,
        approval,
        context,
        event,
        on_end,
        run_id,
        step,
        workflow,
    )

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
    "workflows.cli.main": ("run_script",),
    "workflows.driver.session": ("RunResult", "run"),
    "workflows.driver.settings": ("RunSettings",),
    "workflows.graph": (
        *("Approval", "Artifact", "ArtifactWriter", "Future", "Gang", "Step", "StepContext", "StepOptions", "Workflow"),
        *("approval", "context", "event", "on_end", "run_id", "step", "workflow"),
    ),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            import_module("workflows.identity.names").make_way()
            value = globals()[name] = getattr(import_module(home), name)
            return value
    raise AttributeError(f"module 'workflows' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
