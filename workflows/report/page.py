"""The report's page: the service's own page in one file, which contains the service's answers about one run.

    RunRecord -> saved(record) -> answers -> render(answers) -> HTML

The page fetches nothing, also when it is opened from a disk: scripts, styles and answers are in the file, and its
security policy allows nothing else. Texts pass through `infra.telemetry.redact`, here and in
`workflows.views.run_views`.
"""

import hashlib
import html
import json
import re
import time
from base64 import b64encode
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from infra.storage import Store
from infra.telemetry import is_number, redact, shorten
from workflows.report.record import RunRecord, StepRecord, plain_json
from workflows.report.results import ERROR_LETTERS, results
from workflows.views import run_views
from workflows.views.shortened import shown

Json = dict[str, Any]
PAGE = Path(run_views.__file__).parent / "page"
MOST_DETAILS = 200
"""Most steps with full details, failed ones first; the others are in the graph, the table and the timeline."""
MOST_LETTERS = 16 << 20
"""Most characters of all full details, with logs."""
READERS = 8
"""Threads that read the store, which may be far away."""
LOG_BYTES = 32 << 10
"""So much of the end of each log."""
IMPORT = re.compile(r'^import \{ (.+) \} from "\./(\w+)\.js";$', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function\*?|class|const) (\w+))", re.MULTILINE)


def saved(record: RunRecord) -> Json:
    """All answers that the page needs: {"written", "run", "steps", "step", "log", "metrics", "results"}."""
    answers = _by_hand(record) if record.store is None else _stored(record.store, record.run_id)
    return {"written": time.time(), **answers, "results": results(record)}


def render(answers: Json) -> str:
    """One HTML document."""
    data = json.dumps(answers, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    script, style = _script(), (PAGE / "style.css").read_text()
    icon = f"data:image/svg+xml;base64,{b64encode((PAGE / 'icon.svg').read_bytes()).decode()}"
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "object-src 'none'; base-uri 'none'; form-action 'none'"
    )
    text = (PAGE / "index.html").read_text()
    for there, ours in {
        '<meta charset="utf-8">': (
            f'<meta charset="utf-8">\n  <meta http-equiv="Content-Security-Policy" content="{policy}">'
        ),
        "<title>recua</title>": f"<title>{html.escape(answers['run']['run_id'])}</title>",
        '<link rel="stylesheet" href="assets/style.css">': f"<style>{style}</style>",
        "assets/icon.svg": icon,
        '<script type="module" src="assets/main.js"></script>': (
            f'<script type="application/json" id="saved-run">{data}</script>\n  <script type="module">{script}</script>'
        ),
    }.items():
        text = text.replace(there, ours)
    return text


def _hash(content: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _script() -> str:
    """The page's modules as one script: each is a function that is called after the modules that it imports."""
    modules: dict[str, str] = {}

    def add(name: str) -> None:
        text = (PAGE / f"{name}.js").read_text()
        for _, other in IMPORT.findall(text):
            if other not in modules:
                add(other)
        body = EXPORT.sub("", IMPORT.sub(r"const { \1 } = $\2;", text))
        modules[name] = f"const ${name} = (() => {{\n{body}\nreturn {{ {', '.join(EXPORT.findall(text))} }};\n}})();\n"

    add("main")
    return "".join(modules.values())


def _stored(store: Store, run_id: str) -> Json:
    """The answers of the service, with the ends of the logs."""
    cache = run_views.RunCache()
    steps = run_views.steps(cache, store, run_id)
    first = sorted(steps["steps"], key=lambda row: row["status"] != "failed")[:MOST_DETAILS]
    told, room = [], MOST_LETTERS
    with ThreadPoolExecutor(READERS) as pool:
        for step in pool.map(lambda row: _in_full(cache, store, run_id, row["id"]), first):
            room -= len(json.dumps(step))
            if room < 0:
                break
            told.append(step)
    return {
        "run": run_views.run(cache, store, run_id),
        "steps": steps,
        "step": {detail["id"]: detail for detail, _ in told},
        "log": [_log(cache, store, run_id, ""), *(log for _, logs in told for log in logs)],
        "metrics": run_views.metrics(cache, store, run_id),
    }


def _in_full(cache: run_views.RunCache, store: Store, run_id: str, call: str) -> tuple[Json, list[Json]]:
    """One step, and the logs of its attempts, the last one first. A reused step has the log of the run that executed
    it.
    """
    detail = run_views.step(cache, store, run_id, call)
    attempts = [attempt["id"] for attempt in reversed(detail["tries"])] or [""]
    return detail, [_log(cache, store, run_id, call, attempt) for attempt in attempts]


def _log(cache: run_views.RunCache, store: Store, run_id: str, call: str, attempt: str = "") -> Json:
    answer = run_views.log(cache, store, run_id, call, attempt, -LOG_BYTES)
    left_out = f"[{answer['start']:,} bytes before; recua logs {run_id} {call}]\n" if answer["start"] else ""
    return {**answer, "id": call, "text": left_out + answer["text"], "start": 0, "ended": True}


def _by_hand(record: RunRecord) -> Json:
    """The same answers for a record that is not in a store."""
    rows = [_row(step) for step in record.steps]
    details = {
        row["id"]: {
            **row,
            "arguments": None,
            "result": shown(plain_json(step.result)),
            "error": {"type": "", "message": row["message"], "traceback": "", "kind": ""} if step.error else None,
            **dict.fromkeys(("key", "code", "origin", "wait")),
            **{"tries": [], "artifacts": []},
        }
        for row, step in zip(rows, record.steps, strict=True)
    }
    created = min((step.started for step in record.steps if step.started is not None), default=0.0)
    run: Json = {
        **{"run_id": record.run_id, "workflow": record.workflow, "status": record.status},
        **{"created": created, "ended": created + record.measured_wall_s()},
        **{"counts": Counter(step.status for step in record.steps), "recipe": [], "error": None, "result": None},
    }
    steps = {"version": 1, "status": record.status, "live": False, "reset": True, "steps": rows}
    return {"run": run, "steps": steps, "step": details, "log": [], "metrics": _curves(record)}


def _row(step: StepRecord) -> Json:
    times = {"started": step.started, "ended": step.ended, "seconds": step.seconds}
    message = redact(shorten(step.error, ERROR_LETTERS))
    head = {"id": step.name, "step": step.step, "status": step.status, "attempts": step.attempts, "message": message}
    return head | {name: value for name, value in times.items() if value is not None}


def _curves(record: RunRecord) -> Json:
    """The record's metrics in the service's form: a curve per stage and name over the optimizer step."""
    lines: dict[tuple[str, str], tuple[list[float], list[float | None]]] = defaultdict(lambda: ([], []))
    for place, row in enumerate(record.metrics):
        for name, value in row.items():
            if name not in ("stage", "step"):
                x, y = lines[(str(row["stage"]), name)]
                x.append(row.get("step", place))
                y.append(value if is_number(value) else None)
    curves = [{"call": stage, "name": name, "x": x, "y": y} for (stage, name), (x, y) in lines.items()]
    return {"version": "1", "curves": curves, "events": [], "left_out": 0}
