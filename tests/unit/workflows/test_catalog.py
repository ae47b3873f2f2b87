"""Runs in the store: listed from one small object each, replayed where that is missing or stale."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.errors import StoreError, UserError
from infra.storage import FolderStore, Store
from tests.helpers.stored_records import append
from workflows.runs.catalog import list_runs, load_metadata, load_run
from workflows.runs.journal import Heartbeat, Journal, read_journal, slot_key
from workflows.runs.references import read_run
from workflows.runs.status import Counts, StatusFile, read_status, status_key
from workflows.runs.why import Reasons


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


def start(call: str, attempt: int = 1, **more: Any) -> dict[str, Any]:
    made = {"type": "start", "call": call, "step": "m:f", "attempt": attempt, "attempt_id": f"{call}{attempt}"}
    return {**made, "time": 10.0 + attempt, **more}


def failure(call: str, attempt: int, final: bool) -> dict[str, Any]:
    made = {"type": "attempt-failed", "call": call, "step": "m:f", "attempt": attempt, "attempt_id": f"{call}{attempt}"}
    return {**made, "final": final, "time": 20.0, "error": {"message": "no"}}


def commit(call: str, **more: Any) -> dict[str, Any]:
    made = {"type": "commit", "call": call, "step": "m:f", "result": call, "started": 11.0, "ended": 12.0}
    return {**made, "seconds": 1.0, "node": "", "attempt": 1, **more}


def wait(call: str, kind: str, **more: Any) -> dict[str, Any]:
    made = {"type": "wait", "call": call, "step": f"workflows.waits:{kind}", "message": "go on?", "time": 30.0}
    return {**made, "needs": ["a"], "deadline": None, **more}


RECORDS = [
    [start("a"), start("b", needs=["a"])],
    [commit("a"), commit("r", reused_from="earlier", needs=["a", "b"]), failure("b", 1, final=False)],
    [start("b", 2, needs=["a"]), start("c"), failure("c", 1, final=True), start("d"), failure("d", 1, final=False)],
    [wait("ask", "approval"), wait("later", "event"), wait("asked", "approval"), commit("asked", needs=["a"])],
]
NUMBERS = {"committed": 2, "reused": 1, "running": 1, "failed": 1, "waiting": 3}


def make_run(store: Store, run_id: str, created: float = 1.0) -> Journal:
    tree = {"workflow": "m:w", "recipe": None, "created": created}
    store.put(f"runs/{run_id}/run.json", json.dumps(tree).encode())
    return Journal.acquire(store, run_id)


def test_counts_follow_the_journal_whether_appended_or_replayed(store: FolderStore) -> None:
    journal = make_run(store, "r")
    file = StatusFile(journal)
    for records in RECORDS:
        append(journal, records)
    file.write()
    status = read_status(store, "r")
    assert status is not None and status["counts"] == NUMBERS and status["slot"] == 5
    assert Counts.of(read_journal(store, "r")).numbers(alive=True) == NUMBERS
    assert Counts.of(read_journal(store, "r")).numbers(alive=False)["running"] == 0


def test_a_list_says_what_a_replay_says(store: FolderStore) -> None:
    journal = make_run(store, "r")
    file = StatusFile(journal)
    heartbeat = Heartbeat(journal, lambda: None, lambda error: None, file.write)
    heartbeat.close()
    assert read_status(store, "r") is not None, "the first beat wrote it"
    for records in RECORDS:
        append(journal, records)
    assert read_status(store, "r") is None, "it does not count the last slots"
    [replayed] = list_runs(store)
    file.write()
    assert list_runs(store) == [replayed] and replayed.counts == NUMBERS and replayed.status == "running"
    append(journal, [{"type": "end", "status": "failed", "time": 50.0}])
    file.write()
    [ended] = list_runs(store)
    assert (ended.status, ended.ended, ended.done) == ("failed", 50.0, 3)
    store.put(status_key("r"), b"{half")
    assert list_runs(store) == [ended], "a damaged object is no trouble"


def test_a_list_reads_no_journal_of_a_run_that_left_word(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        journal = make_run(store, f"r{number}", created=float(number))
        file = StatusFile(journal)
        append(journal, [*RECORDS[0], {"type": "end", "status": "finished", "time": 50.0}])
        file.write()
    read: list[str] = []
    monkeypatch.setattr(FolderStore, "get", lambda self, key: read.append(key) or (self.root / key).read_bytes())
    assert [run.run_id for run in list_runs(store)] == ["r2", "r1", "r0"]
    assert not [key for key in read if "/journal/" in key] and len(read) == 6


def test_a_dead_driver_leaves_an_interrupted_run(store: FolderStore) -> None:
    journal = make_run(store, "r")
    lease = journal.state.lease
    assert lease is not None
    file = StatusFile(journal)
    append(journal, RECORDS[0])
    journal.state.lease = replace(lease, process_start="0")
    file._driver["process_start"] = "0"
    file.write()
    [run] = list_runs(store)
    assert run.status == "interrupted" and run.counts["running"] == 0


def test_needs_waits_and_messages_are_seen(store: FolderStore) -> None:
    journal = make_run(store, "r")
    Heartbeat(journal, lambda: None, lambda error: None).close()
    for records in RECORDS:
        append(journal, records)
    steps = {step.call_id: step for step in load_run(store, "r").steps}
    assert {call: step.status for call, step in steps.items()} == {
        "a": "committed",
        "b": "running",
        "c": "failed",
        "d": "waiting",
        "r": "reused",
        "ask": "waiting-for-approval",
        "asked": "committed",
        "later": "waiting-for-event",
    }
    assert steps["r"].needs == ("a", "b") and steps["b"].needs == ("a",) and steps["ask"].needs == ("a",)
    assert steps["ask"].message == "go on?" and steps["asked"].message == "go on?" and steps["ask"].started == 30.0


def test_two_hundred_runs_are_listed_quickly(store: FolderStore) -> None:
    """10,000 committed calls in the newest; the bound is far above what it takes, far below a replay of all."""
    status = {"format": 1, "status": "finished", "time": time.time(), "slot": 1, "lease_slot": 1, "ended": 2.0}
    driver = {"host": "h", "pid": 1, "machine": "elsewhere", "process_start": "1", "ttl_s": 15.0}
    for number in range(200):
        make = {"workflow": "m:w", "recipe": None, "created": float(number)}
        store.put(f"runs/r{number}/run.json", json.dumps(make).encode(), durable=False)
        tree = {**status, "driver": driver, "counts": {"committed": 10_000}}
        store.put(status_key(f"r{number}"), json.dumps(tree).encode(), durable=False)
        store.put(slot_key(f"r{number}", 1), b"never read", durable=False)
    runs = list_runs(store)
    assert len(runs) == 200 and runs[0].run_id == "r199" and runs[0].done == 10_000


@pytest.mark.parametrize(
    "kept", [b"", b"[]", b"null", b"{}", b"\xff", b'{"workflow": 3, "created": 1, "recipe": {}}', b"[" * 10**5]
)
def test_a_run_whose_metadata_is_damaged_is_named_and_hides_no_other(store: FolderStore, kept: bytes) -> None:
    make_run(store, "good")
    store.put("runs/bad/run.json", kept)
    assert {run.run_id: run.status for run in list_runs(store)} == {"good": "running", "bad": "damaged"}
    for read in (load_run, load_metadata, read_run, Reasons):
        with pytest.raises(StoreError, match=r"runs/bad/run.json is damaged: restore it, or remove runs/bad$"):
            read(store, "bad")
    assert load_run(store, "good").workflow == "m:w"


def test_what_is_left_of_a_run_is_not_suggested_for_it(store: FolderStore) -> None:
    store.put("runs/gone/status.json", b"{}")
    with pytest.raises(UserError, match=r"^no run 'gone' in .*; known: none$"):
        load_run(store, "gone")
