"""Details of one call beside its row: arguments by name, code, attempts, and the run that executed it."""

import json
from typing import Any

from infra.errors import UserError
from infra.storage import Store
from infra.telemetry import redact, shorten
from workflows.identity.keys import code_key, index_key, parameters_key
from workflows.runs.records import CallRecord, Commit, Failed, Json, Start
from workflows.views.run_replay import RunCache, open_run
from workflows.views.shortened import MOST_LETTERS, shown_parameters


def call_arguments(cache: RunCache, store: Store, commit: Commit) -> list[Json]:
    """A commit record's arguments by name, if the names of the step's parameters are known."""
    key = parameters_key(commit.code, commit.step)

    def names() -> list[str]:
        return list(json.loads(store.get(key) or b"[]"))

    return shown_parameters(commit.arguments, cache.fact(f"{store.url} {key}", names))


def code_of(cache: RunCache, store: Store, code: str | None) -> Json | None:
    """A code fingerprint: {"digest", "parts": {name: sha256}}."""
    if not code:
        return None

    def parts() -> Any:
        return json.loads(store.get(code_key(code)) or b"{}")

    return {"digest": code, "parts": cache.fact(f"{store.url} code {code}", parts)}


def origin_of(cache: RunCache, store: Store, run_id: str, commit: Commit) -> tuple[str, Commit] | None:
    """(run, commit record) of the executed call behind a reused one; None if the call was executed here, or if that run
    is no longer in the store."""
    origin = commit.reused_from
    if not origin:
        return None
    try:
        replay = open_run(cache, store, origin)[1]
    except UserError:
        return None
    entry = json.loads(store.get(index_key(commit.key)) or b"{}")
    likely = [entry.get("call") if entry.get("run") == origin else None, commit.call]
    same_step = [call.id for call in replay.calls.values() if call.step == commit.step]
    for call in dict.fromkeys([*likely, *same_step]):
        found = replay.commit(call) if call in replay.calls else None
        if found is not None and found.key == commit.key:
            return origin, found
    return None


def attempts_of(records: list[CallRecord], commit: Commit | None, live: bool) -> list[Json]:
    """[{id, number, started, and if known: ended, error, status}] in order."""
    found: dict[str, Json] = {}
    for record in records:
        if isinstance(record, Start):
            status = "running" if live else "interrupted"
            attempt = {"id": record.attempt_id, "number": record.attempt, "started": record.time, "status": status}
            found[record.attempt_id] = attempt
        elif isinstance(record, Failed) and record.attempt_id in found:
            failed = {"status": "failed", "ended": record.time, "error": error_of(record.error)}
            found[record.attempt_id] |= failed
    entries = list(found.values())
    for entry in entries[:-1]:
        if entry["status"] == "running":  # its driver died
            entry["status"] = "interrupted"
    if commit is not None and commit.attempt_id in found:
        found[commit.attempt_id] |= {"status": "committed", "started": commit.started, "ended": commit.ended}
    return entries


def error_of(record: Json | None) -> Json | None:
    if record is None:
        return None
    texts = {name: redact(shorten(record.get(name) or "", MOST_LETTERS)) for name in ("type", "message", "traceback")}
    return {**texts, "kind": record.get("kind", "")}
