"""Stored runs: listed, shown and cancelled without Ray and without the recipe's code."""

import contextlib
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from infra.errors import StoreError, UserError, nearest
from infra.storage import Store
from workflows.graph.values import artifact_records
from workflows.runs.fold import CallState, Head, JournalState, uncollected
from workflows.runs.journal import cancel_key, driver_is_gone, lease_key, read_journal
from workflows.runs.records import CallRecord, Commit, Json, Lease, Start
from workflows.runs.status import COUNTED, DRIVER, Counts, read_status

RUN_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
LISTING_THREADS = 16


@dataclass(frozen=True)
class StepView:
    """One call of a run. Times are seconds since the epoch; None if not reached yet.

    `status`: committed, reused, running, waiting (its last attempt failed and a retry is due), failed, interrupted,
    waiting-for-approval, waiting-for-event (the call needs an outside answer; `message` is the question). `seconds`:
    the winning body's time; for a reused call, its time in its own run. `attempts`: attempt ids in order. `result`:
    encoded as in the journal (workflows.graph.values.decode decodes it). `needs`: ids of the calls whose results it
    takes.
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
    error: Json | None
    reused_from: str | None
    needs: tuple[str, ...] = ()
    message: str = ""


@dataclass(frozen=True)
class RunSummary:
    """One run in a list. `status`: as RunView's, or "damaged": its data cannot be read. `counts`: calls that are
    committed, reused, running, failed, waiting. `driver`: its present or last driver."""

    run_id: str
    workflow: str
    status: str
    created: float
    ended: float | None
    counts: dict[str, int]
    driver: str

    @property
    def done(self) -> int:
        return self.counts["committed"] + self.counts["reused"]


@dataclass(frozen=True)
class RunView:
    """One run. `status`: submitted (to a service), running, interrupted (its driver died), finished, failed, cancelled.
    `drivers`: the number of its drivers so far."""

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
    error: Json | None


def list_runs(store: Store) -> list[RunSummary]:
    """Every run of the store, newest first. Reads two small objects per run, and its journal only if the status object
    is missing or stale."""
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        found = list(pool.map(lambda run_id: _summary(store, run_id), store.folders("runs")))
    return sorted((each for each in found if each is not None), key=lambda each: each.created, reverse=True)


def _summary(store: Store, run_id: str) -> RunSummary | None:
    raw = store.get(f"runs/{run_id}/run.json")
    if raw is None:
        return None
    metadata = _parsed(raw)
    if metadata is None:
        return RunSummary(run_id, "", "damaged", 0.0, None, dict.fromkeys(COUNTED, 0), "")
    status = read_status(store, run_id)
    if status is None:
        state = read_journal(store, run_id)
        now, counts = run_status(store, run_id, state), Counts.of(state)
        lease, ended = state.lease, state.end.time if state.end else None
        numbers = counts.numbers(alive=now == "running")
    else:
        lease = Lease(**{name: status["driver"][name] for name in DRIVER})
        now, ended = status["status"], status["ended"]
        numbers = {name: status["counts"].get(name, 0) for name in COUNTED}
        if now == "running" and (driver_is_gone(lease) or time.time() - status["time"] > 2 * lease.ttl_s):
            now, numbers = "interrupted", {**numbers, "running": 0}
    return RunSummary(run_id, metadata["workflow"], now, metadata["created"], ended, numbers, _driver(lease))


def _driver(lease: Lease | None) -> str:
    return f"process {lease.pid} on {lease.host}" if lease else ""


def load_run(store: Store, run_id: str) -> RunView:
    """One run and its calls, in the order in which they first started or were committed.

    Raises:
        UserError: there is no such run; the nearest name is in the message.
    """
    metadata = load_metadata(store, run_id)
    state = read_journal(store, run_id)
    status = run_status(store, run_id, state)
    return RunView(
        run_id=run_id,
        workflow=metadata["workflow"],
        status=status,
        created=metadata["created"],
        ended=state.end.time if state.end else None,
        recipe=metadata["recipe"],
        drivers=state.drivers,
        driver=_driver(state.lease),
        steps=_steps(state, alive=status == "running"),
        result=state.end.result if state.end else None,
        error=state.end.error if state.end else None,
    )


def load_metadata(store: Store, run_id: str) -> Json:
    """What a run was started with: `workflow`, `recipe`, `created`, ...

    Raises:
        UserError: there is no such run; the message has the nearest name.
        StoreError: the run's metadata is damaged.
    """
    metadata = find_metadata(store, run_id) if run_id and "/" not in run_id else None
    if metadata is None:
        others = (each for each in store.folders("runs") if each != run_id)
        raise UserError(f"no run {run_id!r} in {store.url}{nearest(run_id, others)}")
    return metadata


def find_metadata(store: Store, run_id: str) -> Json | None:
    """`load_metadata`; None if there is no such run.

    Raises:
        StoreError: it is damaged.
    """
    raw = store.get(f"runs/{run_id}/run.json")
    if raw is None:
        return None
    metadata = _parsed(raw)
    if metadata is None:
        raise StoreError(f"--store {store.url}: runs/{run_id}/run.json is damaged: restore it, or remove runs/{run_id}")
    return metadata


def _parsed(raw: bytes) -> Json | None:
    """The metadata in a run.json; None if the content is something else."""
    try:
        metadata: Json = json.loads(raw)
        assert isinstance(metadata["created"], (int, float)) and isinstance(metadata["workflow"], str)
        assert "recipe" in metadata
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
        return None
    return metadata


def run_status(store: Store, run_id: str, state: Head) -> str:
    """A run's status, as far as the store shows it."""
    if state.end is not None:
        return state.end.status
    if state.lease is None:
        return "submitted" if store.exists(active_key(run_id)) else "interrupted"
    if driver_is_gone(state.lease):
        return "interrupted"
    beaten = state.lease.time
    with contextlib.suppress(
        ValueError, TypeError, KeyError
    ):  # beats are not flushed: a power cut may leave half of one
        beaten = json.loads(store.get(lease_key(run_id, state.lease_slot)) or b"")["time"]
    return "running" if time.time() - beaten < 2 * state.lease.ttl_s else "interrupted"


def active_key(run_id: str) -> str:
    """The key of an object that exists while a service must drive the run to its end."""
    return f"service/active/{run_id}"


def find_steps(view: RunView, text: str) -> list[StepView]:
    """The calls that `text` names: a call id, or all calls of a step.

    Raises:
        UserError: there is none; the message has the nearest name.
    """
    exact = [step for step in view.steps if step.call_id == text]
    found = exact or [step for step in view.steps if step.step.rpartition(":")[2] == text]
    if not found:
        raise UserError(f"run {view.run_id} has no step {text!r}{nearest(text, (s.call_id for s in view.steps))}")
    return found


def read_log(store: Store, run_id: str, attempt_id: str) -> str:
    """An attempt's output; empty if none was stored."""
    raw = store.get(f"runs/{run_id}/attempts/{attempt_id}/log.txt")
    return "" if raw is None else raw.decode(errors="replace")


def cancel_run(store: Store, run_id: str, wait_s: float = 30.0) -> str:
    """Ask the run's driver to stop, and wait until it has; returns the run's status.

    Raises:
        UserError: there is no such run.
    """
    deadline = time.monotonic() + wait_s
    while (status := ask_to_stop(store, run_id)) == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    return status


def ask_to_stop(store: Store, run_id: str) -> str:
    """Ask the run's driver to cancel it, and let no service resume it; returns the run's earlier status.

    Raises:
        UserError: there is no such run.
    """
    load_metadata(store, run_id)
    store.delete(active_key(run_id))
    state = read_journal(store, run_id)
    status = run_status(store, run_id, state)
    if status == "running":
        store.put_if_absent(cancel_key(run_id, state.lease_slot), b"")
    return status


def artifacts_of(step: StepView) -> list[Json]:
    """The artifacts in a call's result: digest, name, location, meta."""
    return artifact_records(step.result)


def _steps(state: JournalState, alive: bool) -> tuple[StepView, ...]:
    with uncollected():
        calls = [(CallState.of(records), records) for records in state.calls.values()]
        calls.sort(key=lambda each: each[0].began)
        return tuple(_step(call, records, state.commits.get(call.id), alive) for call, records in calls)


def _step(call: CallState, records: Iterable[CallRecord], commit: Commit | None, alive: bool) -> StepView:
    over = call.status in ("failed", "waiting")
    return StepView(
        call_id=call.id,
        step=call.step,
        status=call.shown_status(alive),
        started=call.started,
        ended=call.ended,
        seconds=call.seconds,
        attempts=tuple(record.attempt_id for record in records if isinstance(record, Start)),
        node=call.node,
        result=None if commit is None else commit.result,
        error=call.error if over else None,
        reused_from=call.reused_from,
        needs=call.needs,
        message=call.message,
    )


def submission_key(run_id: str) -> str:
    return f"runs/{run_id}/submission.json"
