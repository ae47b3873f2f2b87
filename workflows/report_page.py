"""The report's HTML: plain tables and plotly figures, one file, nothing fetched when it is opened."""

import html
from collections import defaultdict
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from infra.telemetry import redact, shorten
from workflows.report import RunRecord, StepRecord, evaluations, table
from workflows.report_groups import interruptions, time_spent

COLOURS = {"committed": "#2a9d8f", "reused": "#8ab6d6", "running": "#e9c46a", "failed": "#d1495b"}
LEDGER_NOTE = (
    "Every second of every rank stands in one row, as a share of the capacity asked for; compute is useful work only."
)
ERROR_LETTERS = 10_000
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 0.85rem }
th, td { text-align: left; padding: 0.3rem 0.7rem; border-bottom: 1px solid #ddd; vertical-align: top }
td.answer { white-space: pre-wrap; font-family: ui-monospace, monospace }
.right { color: #2a7d4f } .wrong { color: #b23a48 } .quiet { color: #666 }
"""


def render(record: RunRecord, summary: dict[str, Any]) -> str:
    """One HTML document. Sections without data say so or are left out; texts of models are escaped and redacted."""
    sections = [
        _head(record, summary),
        _section("Timeline", timeline(record.steps)),
        _section("Interruptions of training", _optional_table(interruptions(record.groups))),
        _section("Where the time of the ranks went", _optional_table(time_spent(record.groups)), LEDGER_NOTE),
        _section("Evaluation", _evaluation(summary), "An asterisk marks a difference beyond two standard errors."),
        _section("Loss per stage", curves(record.metrics, lambda name: name == "loss")),
        *_losses_by_type(record.metrics),
        _section("Reward", curves(record.metrics, lambda name: "reward" in name)),
        _section("KL", curves(record.metrics, lambda name: name == "kl" or name.startswith("kl/"))),
        _section("Sample answers, first and last stage", _samples(record)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(record.run_id)}</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>\n" + "\n".join(filter(None, sections)) + "\n</body></html>\n"
    )


def timeline(steps: list[StepRecord]) -> go.Figure | None:
    """A Gantt chart: one bar per call, in seconds since the first start."""
    timed = [step for step in steps if step.started is not None and step.ended is not None]
    if not timed:
        return None
    zero = min(step.started or 0.0 for step in timed)
    figure = go.Figure()
    for status in sorted({step.status for step in timed}):
        chosen = [step for step in timed if step.status == status]
        figure.add_bar(
            orientation="h",
            name=status,
            y=[step.name for step in chosen],
            base=[(step.started or 0.0) - zero for step in chosen],
            x=[step.seconds for step in chosen],
            marker_color=COLOURS.get(status, "#999"),
            hovertemplate="%{y}: %{x:.1f} s<extra></extra>",
        )
    figure.update_layout(barmode="overlay", height=120 + 26 * len(timed), xaxis_title="seconds", margin_l=160)
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=[step.name for step in timed])
    return figure


def curves(rows: list[dict[str, Any]], wanted: Any, named_by: str = "stage") -> go.Figure | None:
    """One line per (stage, metric) over `step`, for the metrics whose name passes `wanted`."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for position, row in enumerate(rows):
        for name, value in row.items():
            if name not in ("stage", "step") and wanted(name) and isinstance(value, (int, float)):
                lines[(str(row["stage"]), name)].append((row.get("step", position), value))
    if not lines:
        return None
    metrics = {metric for _, metric in lines}
    figure = go.Figure()
    for (stage, metric), points in lines.items():
        label = stage if len(metrics) == 1 else metric if named_by == "metric" else f"{stage} {metric}"
        figure.add_scatter(x=[x for x, _ in points], y=[y for _, y in points], mode="lines", name=label)
    figure.update_layout(height=380, xaxis_title="optimizer step", showlegend=True)
    return figure


def _losses_by_type(rows: list[dict[str, Any]]) -> list[str]:
    stages = dict.fromkeys(str(row["stage"]) for row in rows if any(name.startswith("loss/") for name in row))
    return [
        _section(
            f"Loss per task_type: {stage}",
            curves([row for row in rows if row["stage"] == stage], lambda name: name.startswith("loss/"), "metric"),
        )
        for stage in stages
    ]


def _head(record: RunRecord, summary: dict[str, Any]) -> str:
    served = ", ".join(name for name in ("grpc", "openai") if summary["served"][name]) or "nothing"
    failed = "".join(
        f'<p class="wrong">{html.escape(step.name)}: {_text(shorten(step.error, ERROR_LETTERS))}</p>'
        for step in record.steps
        if step.error
    )
    return (
        f"<h1>{html.escape(record.workflow)} <span class=quiet>{html.escape(record.run_id)}</span></h1>"
        f"<p>{html.escape(record.status)}; {len(record.steps)} steps, {summary['wall_s']:.0f} s; "
        f"verified endpoints: {served}</p>{failed}"
    )


def _optional_table(rows: list[list[str]]) -> str | None:
    return _table(rows) if rows else None


def _evaluation(summary: dict[str, Any]) -> str | None:
    return _table(table(summary)) if summary["eval"] else None


def _samples(record: RunRecord) -> str | None:
    """The prompts that the first and the last evaluated stage both answered, side by side."""
    evaluated = [item for item in evaluations(record) if item.get("samples")]
    if not evaluated:
        return None
    first, last = evaluated[0], evaluated[-1]
    after = {sample["prompt"]: sample for sample in last["samples"]}
    columns = ["task_type", "prompt", "expected", first["stage"], last["stage"]]
    body = "".join(
        f"<tr><td>{_text(sample.get('task_type'))}</td><td class=answer>{_text(sample['prompt'])}</td>"
        f"<td class=answer>{_text(sample.get('expected'))}</td>{_answer(sample)}{_answer(after[sample['prompt']])}</tr>"
        for sample in first["samples"]
        if sample["prompt"] in after
    )
    header = "".join(f"<th>{_text(column)}</th>" for column in columns)
    return f"<div class=scroll><table><tr>{header}</tr>{body}</table></div>"


def _answer(sample: dict[str, Any]) -> str:
    mark = {"True": "right", "False": "wrong"}.get(str(sample.get("correct")), "")
    return f'<td class="answer {mark}">{_text(sample["answer"])}</td>'


def _table(rows: list[list[str]]) -> str:
    header, *body = rows
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f"<div class=scroll><table><tr>{head}</tr>{lines}</table></div>"


def _text(value: Any) -> str:
    return html.escape(redact("" if value is None else str(value)))


def _section(title: str, content: go.Figure | str | None, note: str = "") -> str:
    if content is None:
        return ""
    if isinstance(content, go.Figure):
        content.update_layout(template="plotly_white", margin_t=20, margin_b=40)
        content = content.to_html(full_html=False, include_plotlyjs=False)
    caption = f"<p class=quiet>{html.escape(note)}</p>" if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{caption}{content}</section>"
