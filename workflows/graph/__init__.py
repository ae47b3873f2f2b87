"""The API for authors of workflows: steps, workflows, artifacts, gangs, maps, waits.

from workflows.graph import Artifact, context, step, workflow
"""

from workflows.graph.artifact_writer import ArtifactWriter
from workflows.graph.artifacts import Artifact
from workflows.graph.context import StepContext, context
from workflows.graph.futures import Future, Part
from workflows.graph.gangs import Gang
from workflows.graph.steps import Step, StepOptions, Workflow, on_end, run_id, step, workflow
from workflows.graph.waits import Approval, approval, event

__all__ = [
    "Approval",
    "Artifact",
    "ArtifactWriter",
    "Future",
    "Gang",
    "Part",
    "Step",
    "StepContext",
    "StepOptions",
    "Workflow",
    "approval",
    "context",
    "event",
    "on_end",
    "run_id",
    "step",
    "workflow",
]
