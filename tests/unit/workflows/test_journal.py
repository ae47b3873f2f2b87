"""The journal: one owner at a time, slots written once, commits in batches."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from infra.errors import FencedError, StoreError, UserError
from infra.processes import process_start, this_machine
from infra.storage import FolderStore
from workflows.runs.journal import (
    GroupCommit,
    Heartbeat,
    Journal,
    cancel_key,
    driver_is_gone,
    lease_key,
    read_journal,
    slot_key,
)
from workflows.runs.records import Commit, Lease, Record, Start


def commit(call: str) -> Commit:
    return Commit(call, "m:f", result=call)


def let_go(journal: Journal) -> None:
    """Make the lease look as if its driver had died: its process id now names nobody."""
    key = slot_key(journal.run_id, journal.lease_slot)
    raw = journal.store.get(key)
    assert raw is not None
    tree = json.loads(raw)
    tree["records"][0]["process_start"] = "0"
    journal.store.put(key, json.dumps(tree).encode())


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


def test_commits_are_replayed_in_order(store: FolderStore) -> None:
    journal = Journal.acquire(store, "r")
    journal.append([commit("a"), Start("b", "m:f", attempt=1)])
    journal.append([commit("b")])
    state = read_journal(store, "r")
    assert list(state.commits) == ["a", "b"] and state.slot == 3 and state.drivers == 1
    assert state.starts["b"][0].attempt == 1


def test_a_driver_that_lost_its_lease_commits_nothing(store: FolderStore) -> None:
    old = Journal.acquire(store, "r")
    old.append([commit("a")])
    let_go(old)
    new = Journal.acquire(store, "r")
    new.append([commit("b")])
    with pytest.raises(FencedError, match="another driver"):
        old.append([commit("b")])
    with pytest.raises(FencedError):
        old.append([commit("c")])
    state = read_journal(store, "r")
    assert list(state.commits) == ["a", "b"] and state.drivers == 2


def test_a_living_driver_is_not_displaced(store: FolderStore) -> None:
    journal = Journal.acquire(store, "r", ttl_s=10.0)
    heartbeat = Heartbeat(journal, on_cancel=lambda: None, on_error=lambda error: None)
    with pytest.raises(UserError, match=rf"being driven by process {os.getpid()}"):
        Journal.acquire(store, "r")
    heartbeat.close()


def test_a_silent_driver_is_replaced_after_its_lease(store: FolderStore) -> None:
    silent = Journal.acquire(store, "r", ttl_s=0.5)
    new = Journal.acquire(store, "r", ttl_s=0.5)
    assert new.lease_slot == silent.lease_slot + 1


def test_a_dead_process_is_known_at_once() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lease = Lease(machine=this_machine(), pid=child.pid, process_start=process_start(child.pid))
    assert not driver_is_gone(lease)
    child.kill()
    child.wait()
    assert driver_is_gone(lease)
    assert not driver_is_gone(replace(lease, machine="elsewhere")), "nothing is known of another machine's processes"
    reused = Lease(machine=this_machine(), pid=os.getpid(), process_start="1")
    assert driver_is_gone(reused), "the id names another process now"


def test_heartbeat_notices_a_successor_and_a_cancel_request(store: FolderStore) -> None:
    journal = Journal.acquire(store, "r", ttl_s=0.2)
    errors: list[BaseException] = []
    seen = threading.Event()
    Heartbeat(journal, on_cancel=seen.set, on_error=lambda error: (errors.append(error), seen.set()))
    store.put(lease_key("r", journal.lease_slot + 5), b"{}")
    assert seen.wait(60) and isinstance(errors[0], FencedError)
    other = Journal.acquire(store, "other", ttl_s=0.2)
    cancelled = threading.Event()
    beat = Heartbeat(other, on_cancel=cancelled.set, on_error=errors.append)
    store.put(cancel_key("other", other.lease_slot), b"")
    assert cancelled.wait(60)
    beat.close()


def test_group_commit_gathers_while_a_slot_is_written(store: FolderStore) -> None:
    journal = Journal.acquire(store, "r")
    gate, entered = threading.Event(), threading.Event()
    append = journal.append

    def slow(records: Sequence[Record]) -> None:
        entered.set()
        assert gate.wait(60)
        append(records)

    journal.append = slow  # type: ignore[method-assign]
    written: list[str] = []
    commits = GroupCommit(journal, on_error=lambda error: pytest.fail(str(error)))
    commits.commit(commit("first"), lambda: written.append("first"))
    assert entered.wait(60)
    for number in range(100):
        commits.commit(commit(str(number)), lambda number=number: written.append(str(number)))
    gate.set()
    commits.close()
    assert written == ["first", *map(str, range(100))]
    assert read_journal(store, "r").slot == 3, "lease, the first commit, and one slot for the hundred"


def test_group_commit_stops_at_the_first_failure(store: FolderStore) -> None:
    journal = Journal.acquire(store, "r")
    store.put(slot_key("r", 2), b"somebody else's")
    errors: list[BaseException] = []
    acknowledged: list[str] = []
    commits = GroupCommit(journal, on_error=errors.append)
    commits.commit(commit("a"), lambda: acknowledged.append("a"))
    commits.commit(commit("b"), lambda: acknowledged.append("b"))
    commits.close()
    assert len(errors) == 1 and isinstance(errors[0], FencedError) and acknowledged == []
    assert not store.exists(slot_key("r", 3))


def test_notes_are_written_without_a_commit(store: FolderStore) -> None:
    journal = Journal.acquire(store, "r")
    commits = GroupCommit(journal, on_error=lambda error: pytest.fail(str(error)), idle_s=0.01)
    commits.note(Start("a", "m:f", attempt=1))
    commits.close()
    assert "a" in read_journal(store, "r").starts


def test_a_damaged_or_missing_slot_is_an_error_that_names_it(store: FolderStore) -> None:
    journal = Journal.acquire(store, "r")
    journal.append([commit("a")])
    journal.append([commit("b")])
    store.put(slot_key("r", 2), b'{"half": ')
    with pytest.raises(StoreError, match=r"00000002\.json is damaged"):
        read_journal(store, "r")
    store.delete(slot_key("r", 2))
    with pytest.raises(StoreError, match="slot 2 is missing"):
        read_journal(store, "r")
