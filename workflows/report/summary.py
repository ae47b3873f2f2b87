"""A run in figures: the content of report.json, and the evaluations as a table."""

from typing import Any

from workflows.graph.artifacts import Artifact
from workflows.report import groups as report_groups
from workflows.report.record import RunRecord, dictionaries, evaluations


def summarise(record: RunRecord) -> dict[str, Any]:
    """The content of report.json: `run`, `workflow`, `status`, `wall_s`, `stages`, `eval`, `served`,
    `groups` (goodput, ledger and pauses of elastic training)."""
    served: dict[str, Any] = {"grpc": False, "openai": False}
    for step in record.steps:
        found = [item for item in dictionaries(step.result) if {"grpc", "openai", "weight_version"} <= item.keys()]
        if found:  # the outermost one, because the single answers inside it have the same keys
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
    """The table for a terminal: a column per stage, because there are many task types and few stages."""
    if not summary["eval"]:
        return []
    columns = table(summary)
    widths = [max(len(cell) for cell in column) for column in columns]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in zip(*columns, strict=True)
    ]


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
