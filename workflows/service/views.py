"""What the page and the command line see of a store, as JSON-able dictionaries. No Ray, no HTTP."""

from typing import Any

from infra.errors import UserError
from infra.storage import Store
from infra.telemetry import redact
from workflows.history import read_history
from workflows.runs import RunView, StepView, artifacts_of, find_steps, list_runs, load_run
from workflows.values import brief

Json = dict[str, Any]
CHUNK = 256 << 10


class RunCache:
    """What was read of runs, kept between calls."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, tuple[int, Json]]] = {}


def runs(store: Store) -> list[Json]:
    """Every run, newest first."""
    names = ("run_id", "workflow", "status", "created", "ended", "counts", "driver")
    return [{name: getattr(view, name) for name in names} for view in list_runs(store)]


def run(cache: RunCache, store: Store, run_id: str) -> Json:
    """One run: head, recipe, result and error."""
    view = load_run(store, run_id)
    return {**_head(view), "recipe": view.recipe, "error": view.error, "result": brief(view.result)}


def steps(cache: RunCache, store: Store, run_id: str, after: int = 0) -> Json:
    """The steps that changed since version `after`, and the version now."""
    known = cache.steps.setdefault(run_id, {})
    version = max((changed for changed, _ in known.values()), default=0)
    for view in load_run(store, run_id).steps:
        now = _step(view)
        if view.call_id not in known or known[view.call_id][1] != now:
            known[view.call_id] = (version + 1, now)
    version = max((changed for changed, _ in known.values()), default=0)
    return {"version": version, "steps": [each for changed, each in known.values() if changed > after]}


def step(cache: RunCache, store: Store, run_id: str, call_id: str) -> Json:
    """One call with everything that is known of it."""
    view = find_steps(load_run(store, run_id), call_id)[0]
    result = None if view.result is None else brief(view.result)
    return {**_step(view), "result": result, "error": view.error, "artifacts": artifacts_of(view)}


def log(cache: RunCache, store: Store, run_id: str, call_id: str = "", attempt: str = "", offset: int = 0) -> Json:
    """A piece of what an attempt (default: the last one) printed, from byte `offset`; a negative one counts from the
    end. Without a call: what the run's last driver printed."""
    attempts: tuple[str, ...] = ()
    if call_id:
        attempts = find_steps(load_run(store, run_id), call_id)[0].attempts
        chosen = attempt or (attempts[-1] if attempts else "")
        raw = store.get(f"runs/{run_id}/attempts/{chosen}/log.txt") or b""
    else:
        logs = list(store.list(f"runs/{run_id}/driver"))
        raw = (store.get(logs[-1]) if logs else None) or b""
    start = max(0, len(raw) + offset) if offset < 0 else offset
    piece = raw[start : start + CHUNK]
    text = redact(piece.decode(errors="replace"))
    return {"text": text, "start": start, "offset": start + len(piece), "attempts": list(attempts)}


def metrics(cache: RunCache, store: Store, run_id: str, call_id: str = "", after: str = "") -> Json:
    """Progress and metrics since the cursor `after`, of one call or (empty) of all."""
    events, cursor = read_history(store, run_id, after)
    return {"version": cursor, "events": [event for event in events if call_id in ("", event["call"])]}


def lineage(cache: RunCache, store: Store, run_id: str, digest: str) -> Json:
    """Which call of the run made an artifact."""
    for view in load_run(store, run_id).steps:
        for entry in artifacts_of(view):
            if entry["digest"].startswith(digest):
                return {"digest": entry["digest"], "call": _step(view)}
    raise UserError(f"run {run_id} has no artifact {digest!r}")


def _head(view: RunView) -> Json:
    counts: dict[str, int] = {}
    for each in view.steps:
        counts[each.status] = counts.get(each.status, 0) + 1
    head = {"run_id": view.run_id, "workflow": view.workflow, "status": view.status, "created": view.created}
    return {**head, "ended": view.ended, "counts": counts, "driver": view.driver}


def _step(view: StepView) -> Json:
    names = ("status", "started", "ended", "seconds", "node", "reused_from")
    message = str(view.error["message"]) if view.error else getattr(view, "message", "")
    head = {"id": view.call_id, "step": view.step, **{name: getattr(view, name) for name in names}}
    return {**head, "attempts": len(view.attempts), "needs": list(getattr(view, "needs", ())), "message": message}
