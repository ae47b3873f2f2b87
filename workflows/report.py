"""What a finished (or failed, or running) run says about itself: report.json and one self-contained HTML page.

    RunRecord (read from the store, or written by hand in a test)
      -> summarise(record) -> the dictionary behind report.json
      -> report_page.saved(record), .render(answers) -> HTML: the service's page with this run in it

The inputs are conventions, so a step needs to know nothing of this module: an artifact whose folder holds
`metrics.jsonl` of rows with a `step` gives curves; a result that has a text `stage` and the numbers `n` and `accuracy`
is an evaluation; a result that has `grpc`, `openai` and `weight_version` says what is served. They are found wherever
in a step's result they are. What only resembles them (a user's own file or result) is left out, part by part.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.storage import Store, write_text
from infra.telemetry import is_number, metric_rows
from workflows import report_groups
from workflows.artifacts import Artifact
from workflows.runs import RunView

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
    """One run: its calls in the order they began, and the rows of all `metrics.jsonl` among its artifacts."""

    run_id: str
    workflow: str
    status: str
    steps: list[StepRecord]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    wall_s: float | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Elastic groups with their goodput and pauses (cluster.goodput.accounts.GroupReport)."""
    store: Store | None = None
    """Where the page finds arguments, logs and edges; None: it shows what stands here."""

    def measured_wall_s(self) -> float:
        """`wall_s` where it is known, else from the first start to the last end."""
        if self.wall_s is not None:
            return self.wall_s
        starts = [step.started for step in self.steps if step.started is not None]
        ends = [step.ended for step in self.steps if step.ended is not None]
        return max(ends) - min(starts) if starts and ends else 0.0


def read_run(store: Store, view: RunView, with_metrics: bool = True) -> RunRecord:
    """A run as it lies in the store; if wanted, with the metrics in its artifacts."""
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
    """An encoded result (workflows.values) as dictionaries, lists and Artifacts; loads nobody's classes."""
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
    """The rows of every `metrics.jsonl` in the steps' artifacts, each artifact read once and nothing else fetched.

    A row without `stage` belongs to the step that wrote it. An artifact that two steps return counts for the first. A
    file without any row is somebody else's; lines that are none in a file that has some are left out with a warning.
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
                log.warning("%s: lines left out that are no metrics (an object with a `step`): %d", key, others)
            rows += [{"stage": step.name, **row} for row in found]
    return rows


def evaluations(record: RunRecord) -> list[dict[str, Any]]:
    """The evaluation results, one per stage, in the order in which they were made (the last of a stage wins)."""
    found: dict[str, dict[str, Any]] = {}
    for step in record.steps:
        for item in dictionaries(step.result):
            if isinstance(item.get("stage"), str) and is_number(item.get("n")) and is_number(item.get("accuracy")):
                found.pop(item["stage"], None)
                found[item["stage"]] = _evaluation(item)
    return list(found.values())


def _evaluation(item: dict[str, Any]) -> dict[str, Any]:
    """Without the parts that are not what ours are: a user's result may have some of the names by chance."""
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


def summarise(record: RunRecord) -> dict[str, Any]:
    """The content of report.json: `run`, `workflow`, `status`, `wall_s`, `stages`, `eval`, `served`,
    `groups` (goodput, ledger and pauses of elastic training)."""
    served: dict[str, Any] = {"grpc": False, "openai": False}
    for step in record.steps:
        found = [item for item in dictionaries(step.result) if {"grpc", "openai", "weight_version"} <= item.keys()]
        if found:  # the outermost: the single answers inside it have the same keys
            served = {k: value for k, value in found[0].items() if not isinstance(value, (Artifact, dict, list))}
            served |= {"grpc": found[0]["grpc"] is True, "openai": found[0]["openai"] is True}
    keep = ("n", "accuracy", "accuracy_ci", "per_task_type", "pass_at_n", "safety", "reward", "weight_version")
    return {
        "run": record.run_id,
        "workflow": record.workflow,
        "status": record.status,
        "wall_s": round(record.measured_wall_s(), 3),
        "stages": [
            {
                "name": step.name,
                "seconds": None if step.seconds is None else round(step.seconds, 3),
                "status": step.status,
            }
            for step in record.steps
        ],
        "eval": {
            item["stage"]: {key: item[key] for key in keep if key in item} | {"versus": item.get("versus", {})}
            for item in evaluations(record)
        },
        "served": served,
        "groups": report_groups.summary(record.groups),
    }


def table(summary: dict[str, Any]) -> list[list[str]]:
    """The evaluation as rows of text, a header first: accuracy with its interval, the change against the stage before
    (`*`: beyond two standard errors), pass@N, refusals, then one column per task_type."""
    evaluated = summary["eval"]
    types = sorted({name for item in evaluated.values() for name in item.get("per_task_type", {})})
    extras = sorted({name for item in evaluated.values() for name in _extras(item)})
    rows = [["stage", "accuracy", "95% interval", "vs before", *extras, *types]]
    before = None
    for stage, item in evaluated.items():
        low, high = item.get("accuracy_ci") or (None, None)
        extra = _extras(item)
        rows.append(
            [
                stage,
                f"{item['accuracy']:.1%}",
                "" if low is None else f"{low:.1%} to {high:.1%}",
                _versus(item.get("versus") or {}, before),
                *(_number(extra.get(name)) for name in extras),
                *(_percent(item.get("per_task_type", {}).get(name)) for name in types),
            ]
        )
        before = stage
    return rows


def table_lines(summary: dict[str, Any]) -> list[str]:
    """The table for a terminal: turned around (a column per stage), because task types are many and stages few."""
    if not summary["eval"]:
        return []
    columns = table(summary)
    widths = [max(len(cell) for cell in column) for column in columns]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in zip(*columns, strict=True)
    ]


def write(record: RunRecord, folder: Path) -> Path:
    """Write `report.html` and `report.json` into `folder`, each atomically; returns the page's path."""
    from workflows import report_page

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.json", json.dumps(summarise(record), indent=2, default=_json) + "\n")
    page = folder / "report.html"
    text = report_page.render(report_page.saved(record))
    write_text(page, text.encode(errors="backslashreplace").decode())  # an error's text may hold half a surrogate
    return page


def _extras(item: dict[str, Any]) -> dict[str, float]:
    reward = {f"{name} reward": value for name, value in (item.get("reward") or {}).items()}
    return {**(item.get("pass_at_n") or {}), **(item.get("safety") or {}), **reward}


def _versus(versus: dict[str, dict[str, float]], before: str | None) -> str:
    change = versus.get(before or "")
    if not change:
        return ""
    mark = "*" if abs(change["difference"]) > 2 * change["standard_error"] else ""
    return f"{100 * change['difference']:+.1f}{mark}"


def _percent(item: dict[str, float] | None) -> str:
    return "" if item is None else f"{item['accuracy']:.1%}"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) else ""


def plain_json(value: Any) -> Any:
    """A plain result as JSON has it: an artifact by its digest."""
    return json.loads(json.dumps(value, default=_json))


def _json(value: Any) -> Any:
    return {"artifact": value.digest} if isinstance(value, Artifact) else asdict(value)
