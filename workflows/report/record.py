"""The record behind a run's report: report.json and one self-contained HTML page.

    RunRecord (read from the store, or written by hand in a test)
      -> summary.summarise(record) -> the dictionary behind report.json
      -> page.saved(record), page.render(answers) -> HTML: the service's page with this run in it

The inputs are conventions, so that a step need not know this module. An artifact with a `metrics.jsonl` of rows with a
`step` gives curves; a result with a text `stage` and the numbers `n` and `accuracy` is an evaluation; a result with
`grpc`, `openai` and `weight_version` describes an endpoint. They are found anywhere in a step's result. Parts that only
resemble them (a user's own file or result) are left out.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from infra.storage import Store
from infra.telemetry import is_number, metric_rows
from workflows.graph.artifacts import Artifact
from workflows.report import groups as report_groups
from workflows.runs.catalog import RunView

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """One call of a step. Times are seconds since the epoch; `result` holds only JSON values and Artifacts."""

    name: str
    step: str
    status: str  # committed | reused | running | failed
    started: float | None = None
    ended: float | None = None
    attempts: int = 1
    result: Any = None
    error: str = ""

    @property
    def seconds(self) -> float | None:
        return None if self.started is None or self.ended is None else self.ended - self.started


@dataclass(frozen=True)
class RunRecord:
    """One run: its calls in the order of their starts, and the rows of all `metrics.jsonl` in its artifacts."""

    run_id: str
    workflow: str
    status: str
    steps: list[StepRecord]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    wall_s: float | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Elastic groups with their goodput and pauses (cluster.goodput.accounts.GroupReport)."""
    store: Store | None = None
    """The source of arguments, logs and edges for the page; None: the page shows this record's."""

    def measured_wall_s(self) -> float:
        """`wall_s` if it is known, else the time from the first start to the last end."""
        if self.wall_s is not None:
            return self.wall_s
        starts = [step.started for step in self.steps if step.started is not None]
        ends = [step.ended for step in self.steps if step.ended is not None]
        return max(ends) - min(starts) if starts and ends else 0.0


def read_run(store: Store, view: RunView, with_metrics: bool = True) -> RunRecord:
    """The record of a stored run, optionally with the metrics in its artifacts."""
    steps = [
        StepRecord(
            name=step.call_id,
            step=step.step.rpartition(":")[2],
            status=step.status,
            started=step.started,
            ended=step.ended,
            attempts=len(step.attempts),
            result=plain(step.result),
            error=(step.error or {}).get("message", ""),
        )
        for step in view.steps
    ]
    ends = [step.ended for step in steps if step.ended is not None]
    ended = view.ended or max(ends, default=view.created)
    metrics = gather_metrics(store, steps) if with_metrics else []
    wall_s, groups = ended - view.created, report_groups.gather_groups(store, view.run_id)
    return RunRecord(view.run_id, view.workflow, view.status, steps, metrics, wall_s, groups, store)


def plain(tree: Any) -> Any:
    """An encoded result (workflows.graph.values) as dictionaries, lists and Artifacts; loads no user's classes."""
    if isinstance(tree, list):
        return [plain(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$artifact" in tree:
        return Artifact.from_record(tree["$artifact"], None)
    if "$dataclass" in tree or "$settings" in tree or "$namedtuple" in tree:
        return plain({**tree["fields"], **tree.get("extra", {}), **tree.get("beside", {})})
    for tag in ("$tuple", "$text"):
        if tag in tree:
            return plain(tree[tag])
    if "$kind" in tree and "value" in tree:
        return plain(tree["value"])
    if "$dict" in tree or "$kind" in tree:
        return {str(plain(key)): plain(item) for key, item in tree.get("$dict") or tree["items"]}
    if "$float" in tree:
        return float(tree["$float"])
    if "$path" in tree or "$enum" in tree:
        return plain(tree.get("$path")) or tree["name"]
    return {key: plain(item) for key, item in tree.items()}


def dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    """Every dictionary in a plain result, outermost first."""
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from dictionaries(item)
    elif isinstance(value, list):
        for item in value:
            yield from dictionaries(item)


def artifacts(value: Any) -> Iterator[Artifact]:
    """Every Artifact in a plain result."""
    if isinstance(value, Artifact):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from artifacts(item)


def gather_metrics(store: Store, steps: list[StepRecord]) -> list[dict[str, Any]]:
    """The rows of every `metrics.jsonl` in the steps' artifacts. Each artifact is read once; no other file is fetched.

    A row without `stage` belongs to the step that wrote it. An artifact that two steps return counts for the first. A
    file without rows is ignored, because it is not ours; other lines in a file with rows are skipped with a warning.
    """
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for step in steps:
        for artifact in artifacts(step.result):
            if artifact.digest in seen:
                continue
            seen.add(artifact.digest)
            key = f"{artifact.location}/data/metrics.jsonl"
            raw = store.get(key)
            found, others = metric_rows(raw or b"")
            if found and others:
                log.warning("%s: skipped %d lines that are not metrics (objects with a `step`)", key, others)
            rows += [{"stage": step.name, **row} for row in found]
    return rows


def evaluations(record: RunRecord) -> list[dict[str, Any]]:
    """The evaluation results, one per stage, in order (the last one of a stage counts)."""
    found: dict[str, dict[str, Any]] = {}
    for step in record.steps:
        for item in dictionaries(step.result):
            if isinstance(item.get("stage"), str) and is_number(item.get("n")) and is_number(item.get("accuracy")):
                found.pop(item["stage"], None)
                found[item["stage"]] = _evaluation(item)
    return list(found.values())


def _evaluation(item: dict[str, Any]) -> dict[str, Any]:
    """The result without parts of other types than ours: a user's result may have the same names by chance."""
    parts: dict[str, Any] = {name: _numbers(item[name]) for name in ("pass_at_n", "safety", "reward") if name in item}
    by_type = item.get("per_task_type")
    if isinstance(by_type, dict):
        parts["per_task_type"] = {name: part for name, part in by_type.items() if is_number(_of(part, "accuracy"))}
    versus = item.get("versus")
    if isinstance(versus, dict):
        either = {versus["stage"]: versus} if isinstance(versus.get("stage"), str) else versus
        measures = ("difference", "standard_error")
        parts["versus"] = {
            stage: {name: change[name] for name in measures}
            for stage, change in either.items()
            if all(is_number(_of(change, name)) for name in measures)
        }
    interval, samples = item.get("accuracy_ci"), item.get("samples")
    if isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval)):
        parts["accuracy_ci"] = interval
    if isinstance(samples, list):
        parts["samples"] = [each for each in samples if isinstance(_of(each, "prompt"), str) and "answer" in each]
    return {name: item[name] for name in ("stage", "n", "accuracy", "weight_version") if name in item} | parts


def _numbers(value: Any) -> dict[str, float]:
    return {name: number for name, number in value.items() if is_number(number)} if isinstance(value, dict) else {}


def _of(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def plain_json(value: Any) -> Any:
    """A plain result as JSON, with artifacts as their digests."""
    return json.loads(json.dumps(value, default=_json))


def _json(value: Any) -> Any:
    return {"artifact": value.digest} if isinstance(value, Artifact) else asdict(value)
