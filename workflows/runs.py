"""Runs as they lie in the store: listed, shown and cancelled without Ray and without the recipe's code."""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from infra.errors import UserError
from infra.storage import Store
from workflows.journal import JournalState, Record, cancel_key, driver_is_gone, lease_key, read_journal
from workflows.values import artifact_records


@dataclass(frozen=True)
class StepView:
    """One call of a run. Times are seconds since the epoch, None where it has not come to that.

    `status`: committed, reused, running, waiting (its last attempt failed and another is due), failed, interrupted.
    `seconds`: what the winning body took; of a reused call, what it took in its own run. `attempts`: attempt ids in
    order. `result`: encoded as the journal keeps it (workflows.values.decode makes it Python again).
    """

    call_id: str
    step: str
    status: str
    started: float | None
    ended: float | None
    seconds: float | None
    attempts: tuple[str, ...]
    node: str
    result: Any
    error: Record | None
    reused_from: str | None


@dataclass(frozen=True)
class RunView:
    """One run. `status`: running, interrupted (its driver died), finished, failed, cancelled. `drivers`: how many have
    worked on it."""

    run_id: str
    workflow: str
    status: str
    created: float
    ended: float | None
    recipe: Any
    drivers: int
    driver: str
    steps: tuple[StepView, ...]
    result: Any
    error: Record | None


def list_runs(store: Store) -> list[RunView]:
    """Every run of the store, newest first."""
    views = [load_run(store, run_id) for run_id in store.folders("runs") if store.exists(f"runs/{run_id}/run.json")]
    return sorted(views, key=lambda view: view.created, reverse=True)


def load_run(store: Store, run_id: str) -> RunView:
    """One run and its calls, in the order in which they first started or were committed.

    Raises:
        UserError: there is no such run; the nearest name is in the message.
    """
    raw = store.get(f"runs/{run_id}/run.json") if run_id and "/" not in run_id else None
    if raw is None:
        raise UserError(f"no run {run_id!r} in {store.url}{_nearest(run_id, store.folders('runs'))}")
    metadata = json.loads(raw)
    state = read_journal(store, run_id)
    status = run_status(store, run_id, state)
    lease = state.lease
    return RunView(
        run_id=run_id,
        workflow=metadata["workflow"],
        status=status,
        created=metadata["created"],
        ended=state.end["time"] if state.end else None,
        recipe=metadata["recipe"],
        drivers=state.drivers,
        driver=f"process {lease['pid']} on {lease['host']}" if lease else "",
        steps=tuple(_steps(state, alive=status == "running")),
        result=state.end.get("result") if state.end else None,
        error=state.end.get("error") if state.end else None,
    )


def run_status(store: Store, run_id: str, state: JournalState) -> str:
    """What a run is doing, as far as the store can say."""
    if state.end is not None:
        return str(state.end["status"])
    if state.lease is None or driver_is_gone(state.lease):
        return "interrupted"
    beat = store.get(lease_key(run_id, state.lease_slot))
    beaten = json.loads(beat)["time"] if beat else state.lease["time"]
    return "running" if time.time() - beaten < 2 * state.lease["ttl_s"] else "interrupted"


def find_steps(view: RunView, text: str) -> list[StepView]:
    """The calls that `text` means: a call id, or all calls of a step.

    Raises:
        UserError: none; the nearest name is in the message.
    """
    exact = [step for step in view.steps if step.call_id == text]
    found = exact or [step for step in view.steps if step.step.rpartition(":")[2] == text]
    if not found:
        raise UserError(f"run {view.run_id} has no step {text!r}{_nearest(text, (s.call_id for s in view.steps))}")
    return found


def read_log(store: Store, run_id: str, attempt_id: str) -> str:
    """What an attempt printed; empty where nothing was kept."""
    raw = store.get(f"runs/{run_id}/attempts/{attempt_id}/log.txt")
    return "" if raw is None else raw.decode(errors="replace")


def cancel_run(store: Store, run_id: str, wait_s: float = 30.0) -> str:
    """Ask the run's driver to stop and wait for it; the run's status then.

    Raises:
        UserError: there is no such run.
    """
    deadline = time.monotonic() + wait_s
    while (view := load_run(store, run_id)).status == "running":
        state = read_journal(store, run_id)
        store.put_if_absent(cancel_key(run_id, state.lease_slot), b"")
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return view.status


def artifacts_of(step: StepView) -> list[Record]:
    """The artifacts in a call's result: digest, name, location, meta."""
    return artifact_records(step.result)


def _steps(state: JournalState, alive: bool) -> Iterator[StepView]:
    order = {call: None for call in [*state.starts, *state.commits]}
    firsts = {call: starts[0]["time"] for call, starts in state.starts.items()}
    firsts |= {call: record["started"] for call, record in state.commits.items() if call not in firsts}
    for call in sorted(order, key=lambda call: firsts[call]):
        starts, failures = state.starts.get(call, []), state.failures.get(call, [])
        attempts = tuple(start["attempt_id"] for start in starts)
        commit = state.commits.get(call)
        if commit is not None:
            yield _committed(commit, attempts)
            continue
        failed = bool(failures) and failures[-1]["attempt_id"] == starts[-1]["attempt_id"]
        if failed:
            status = "failed" if failures[-1]["final"] else "waiting" if alive else "interrupted"
        else:
            status = "running" if alive else "interrupted"
        ended = failures[-1]["time"] if failed else None
        error = failures[-1]["error"] if failed else None
        last = starts[-1]
        yield StepView(call, last["step"], status, last["time"], ended, None, attempts, "", None, error, None)


def _committed(commit: Record, attempts: tuple[str, ...]) -> StepView:
    return StepView(
        call_id=commit["call"],
        step=commit["step"],
        status="reused" if "reused_from" in commit else "committed",
        started=commit["started"],
        ended=commit["ended"],
        seconds=commit["seconds"],
        attempts=attempts,
        node=commit["node"],
        result=commit["result"],
        error=None,
        reused_from=commit.get("reused_from"),
    )


def _nearest(text: str, known: Iterable[str]) -> str:
    import difflib

    names = list(known)
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names[:10]) or 'none'}"
