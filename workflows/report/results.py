"""A run's results as tables: evaluations, answers side by side, and where the time of its ranks went."""

from typing import Any

from infra.telemetry import redact, shorten
from workflows.report.groups import interruptions, time_spent
from workflows.report.record import RunRecord, evaluations
from workflows.report.summary import summarise, table

Json = dict[str, Any]
ERROR_LETTERS = 10_000
LEDGER_NOTE = (
    "Every second of every rank is in one row, as a share of the requested capacity; compute is useful work only."
)


def results(record: RunRecord) -> Json:
    """A run's results: {"endpoints", "errors": [{id, message}], "sections": [{title, note, rows}]}. The first row is a
    header; a cell is a text, or an answer {text, correct}."""
    summary = summarise(record)
    sections = [
        _section("Evaluation", table(summary), "An asterisk marks a difference beyond two standard errors."),
        _section("Interruptions of training", interruptions(record.groups)),
        _section("Where the time of the ranks went", time_spent(record.groups), LEDGER_NOTE),
        _section("Sample answers, first and last stage", _samples(record)),
    ]
    return {
        "endpoints": [name for name in ("grpc", "openai") if summary["served"][name]],
        "errors": [
            {"id": step.name, "message": redact(shorten(step.error, ERROR_LETTERS))}
            for step in record.steps
            if step.error
        ],
        "sections": [section for section in sections if len(section["rows"]) > 1],
    }


def _samples(record: RunRecord) -> list[list[Any]]:
    """The prompts that the first and the last evaluated stage both answered, side by side, a header first."""
    evaluated = [item for item in evaluations(record) if item.get("samples")]
    if not evaluated:
        return []
    first, last = evaluated[0], evaluated[-1]
    after = {sample["prompt"]: sample for sample in last["samples"]}
    rows = [
        [each.get("task_type"), each["prompt"], each.get("expected"), _answer(each), _answer(after[each["prompt"]])]
        for each in first["samples"]
        if each["prompt"] in after
    ]
    return [["task_type", "prompt", "expected", first["stage"], last["stage"]], *rows]


def _answer(sample: Json) -> Json:
    correct = sample.get("correct")
    return {"text": redact(str(sample["answer"])), "correct": correct if isinstance(correct, bool) else None}


def _section(title: str, rows: list[list[Any]], note: str = "") -> Json:
    return {"title": title, "note": note, "rows": [[_cell(value) for value in row] for row in rows]}


def _cell(value: Any) -> Any:
    return value if isinstance(value, dict) else redact("" if value is None else str(value))
