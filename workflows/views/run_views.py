"""The service's answers about runs, as JSON-able dictionaries read from the store, without Ray or a web framework.

    cache = RunCache()
    runs(store)                       the list
    run(cache, store, id)             one run: summary, counts, recipe, error, result
    steps(cache, store, id, after)    its calls, only those that changed since version `after`
    step(cache, store, id, call)      one call with all its data
    log(cache, store, id, call, ...)  an attempt's output, from an offset on
    metrics(cache, store, id, ...)    curves: from the history while a call runs, then from its result
    lineage(cache, store, id, digest) the origin of an artifact (workflows.views.lineage)

Texts pass through `infra.telemetry.redact`. Errors are UserError (no such run, no such step) and StoreError.
"""

from pathlib import Path

from infra.errors import StoreError, UserError, nearest
from infra.storage import Store
from infra.telemetry import redact
from workflows.graph.artifacts import Artifact, read_manifest
from workflows.graph.values import artifact_records
from workflows.runs.catalog import list_runs, submission_key
from workflows.runs.fold import CallState
from workflows.runs.records import Json, Wait
from workflows.views.call_details import attempts_of, call_arguments, code_of, error_of, origin_of
from workflows.views.lineage import lineage
from workflows.views.metric_curves import metrics
from workflows.views.run_replay import Replay, RunCache, commit_of, open_run
from workflows.views.shortened import name_artifacts, shown, shown_parameters

__all__ = ["RunCache", "lineage", "log", "metrics", "run", "runs", "step", "steps"]

LOG_CHUNK = 256 << 10
MOST_FILES = 200


def runs(store: Store) -> list[Json]:
    """Every run, newest first: {run_id, workflow, status, created, ended, counts, driver}."""
    return [
        {
            "run_id": view.run_id,
            "workflow": view.workflow,
            "status": view.status,
            "created": view.created,
            "ended": view.ended,
            "counts": view.counts,
            "driver": view.driver,
        }
        for view in list_runs(store)
    ]


def run(cache: RunCache, store: Store, run_id: str) -> Json:
    """One run's summary. `can`: the requests that the service accepts for it (it resumes only submitted runs)."""
    metadata, replay = open_run(cache, store, run_id)
    head = replay.head
    end, lease = head.end, head.lease
    result = None if end is None else end.result
    ended = replay.status in ("interrupted", "failed", "cancelled")
    return {
        "run_id": run_id,
        "workflow": metadata["workflow"],
        "status": replay.status,
        "created": metadata["created"],
        "ended": None if end is None else end.time,
        "counts": replay.counts(),
        "driver": f"process {lease.pid} on {lease.host}" if lease else "",
        "drivers": head.drivers,
        "store": redact(store.url),
        "recipe": shown_parameters(metadata["recipe"], []),
        "error": None if end is None else error_of(end.error),
        "result": shown(result),
        "artifacts": [_artifact(entry) for entry in artifact_records(result)],
        "can": {
            "cancel": replay.live or replay.status == "submitted",
            "resume": ended and store.exists(submission_key(run_id)),
        },
    }


def steps(cache: RunCache, store: Store, run_id: str, after: int = 0) -> Json:
    """The calls that changed after version `after` (0: all), and the version for the next request.

    {"version", "status", "live", "reset", "steps": [{id, step, status, and if known: started, ended, seconds, attempts,
    node, needs, reused_from, message}]}. `reset`: discard earlier answers. The driver may die without a record: if
    `live` is false, running calls are interrupted.
    """
    _, replay = open_run(cache, store, run_id)
    reset = after <= 0 or after > replay.head.slot
    version = replay.head.slot
    rows = replay.since(0 if reset else after)
    return {"version": version, "status": replay.status, "live": replay.live, "reset": reset, "steps": rows}


def step(cache: RunCache, store: Store, run_id: str, call_id: str) -> Json:
    """One call: its row, arguments by name, result, attempts with their errors, code, artifacts with their files.

    Raises:
        UserError: the run has no such call.
    """
    _, replay = open_run(cache, store, run_id)
    call = _call(replay, call_id)
    records = replay.records(call_id)
    commit = commit_of(records)
    attempts = attempts_of(records, commit, replay.live)
    origin = None if commit is None else origin_of(cache, store, run_id, commit)
    last = next((attempt["error"] for attempt in reversed(attempts) if attempt.get("error")), None)
    wait = next((record for record in records if isinstance(record, Wait)), None)
    result = None if commit is None else commit.result
    return {
        **replay.row(call),
        "arguments": None if commit is None else name_artifacts(call_arguments(cache, store, commit), replay.names),
        "result": shown(result),
        "error": None if commit else last,
        "tries": attempts,
        "key": None if commit is None else commit.key,
        "code": None if commit is None else code_of(cache, store, commit.code),
        "origin": None if origin is None else {"run_id": origin[0], "id": origin[1].call},
        "wait": None if wait is None else _question(wait, replay),
        "artifacts": [_artifact(entry) | _files(cache, store, entry) for entry in artifact_records(result)],
    }


def log(cache: RunCache, store: Store, run_id: str, call_id: str = "", attempt: str = "", offset: int = 0) -> Json:
    """The output of an attempt (default: the last one) from byte `offset` on; a negative offset counts from the end.
    Without a call: the output of the run's last driver.

    {"text", "start", "offset", "attempt", "attempts", "ended"}: read on from `offset`; `ended`: no more will follow.
    While the attempt runs, only whole lines are returned. A reused call has the log of the run that executed it.

    Raises:
        UserError: no such run, call or attempt.
    """
    _, replay = open_run(cache, store, run_id)
    if not call_id:
        names = list(store.list(f"runs/{run_id}/driver"))
        return _piece(store, names[-1] if names else None, offset, over=not replay.live)
    running = _call(replay, call_id).shown_status(replay.live) == "running"
    where, records = run_id, replay.records(call_id)
    commit = commit_of(records)
    if commit is not None and (origin := origin_of(cache, store, run_id, commit)) is not None:
        where, commit = origin[0], origin[1]
        records = open_run(cache, store, where)[1].records(commit.call)
    attempts = [entry["id"] for entry in attempts_of(records, commit, replay.live)]
    if attempt and attempt not in attempts:
        raise UserError(f"{call_id} has no attempt {attempt!r}")
    chosen = attempt or (attempts[-1] if attempts else "")
    key = f"runs/{where}/attempts/{chosen}/log.txt" if chosen else None
    over = not running or chosen != attempts[-1]
    return {**_piece(store, key, offset, over), "attempt": chosen, "attempts": attempts}


def _piece(store: Store, key: str | None, offset: int, over: bool) -> Json:
    """A part of a log as text; whole lines while more may come."""
    start, data = _tail(store, key, offset) if key else (0, b"")
    full = len(data) == LOG_CHUNK
    if offset < 0 and start > 0:  # redact cannot recognise a secret that begins before this text
        cut = data.find(b"\n") + 1
        start, data = start + cut, data[cut:]
    if full or not over:
        data = data[: data.rfind(b"\n") + 1] or (data if full else b"")
    text = redact(data.decode(errors="replace"))
    return {"text": text, "start": start, "offset": start + len(data), "ended": over and not full}


def _question(record: Wait, replay: Replay) -> Json:
    """An approval's question, and the data to show before an answer."""
    show = name_artifacts(shown(record.show), replay.names)
    return {"message": redact(record.message), "since": record.time, "show": show}


def _call(replay: Replay, call_id: str) -> CallState:
    call = replay.calls.get(call_id)
    if call is None:
        raise UserError(f"run {replay.run_id} has no step {call_id!r}{nearest(call_id, replay.calls)}")
    return call


def _artifact(entry: Json) -> Json:
    return {
        "digest": entry["digest"],
        "name": entry["name"],
        "location": entry["location"],
        "meta": shown(entry["meta"]),
    }


def _files(cache: RunCache, store: Store, entry: Json) -> Json:
    """An artifact's content: {"files": [{path, size}], "bytes", "count"}; {} if it is no longer in the store."""

    def read() -> Json:
        try:
            files = read_manifest(store, Artifact.from_record(entry, None))
        except StoreError:
            return {}
        first = [{"path": file.path, "size": file.size} for file in files[:MOST_FILES]]
        return {"files": first, "count": len(files), "bytes": sum(file.size for file in files)}

    found: Json = cache.fact(f"{store.url} files {entry['location']}", read)
    return found


def _tail(store: Store, key: str, offset: int) -> tuple[int, bytes]:
    """(start, up to LOG_CHUNK bytes) of an object; a file in a folder is read in place."""
    local: Path | None = store.local_path(key)
    if local is None:
        whole = store.get(key) or b""
        start = min(len(whole), offset if offset >= 0 else max(0, len(whole) + offset))
        return start, whole[start : start + LOG_CHUNK]
    try:
        with local.open("rb") as stream:
            size = stream.seek(0, 2)
            start = min(size, offset if offset >= 0 else max(0, size + offset))
            stream.seek(start)
            return start, stream.read(LOG_CHUNK)
    except FileNotFoundError:
        return 0, b""
    except OSError as error:
        raise StoreError(f"--store {store.url}: cannot use {key}: {error.strerror}") from error
