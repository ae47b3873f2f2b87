"""gc: removes what no run needs, never what one needs, whatever other drivers do meanwhile."""

import json
import os
import random
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from infra.errors import StoreError, UserError
from infra.storage import FolderStore, Store, open_store
from tests.helpers.stored_records import append
from workflows.graph import ArtifactWriter
from workflows.graph.artifacts import Artifact, ArtifactSource, read_manifest
from workflows.identity.keys import index_key
from workflows.runs.catalog import list_runs, load_run
from workflows.runs.gc import LOCK_KEY, GcResult, Policy, collect, explain, plan_gc
from workflows.runs.gc_marks import DriverMarks, read_marks
from workflows.runs.journal import Heartbeat, Journal, read_journal, removed_key, slot_key

NOW = Policy(grace_s=0, patience_s=20)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path / "store" if request.param == "folder" else request.getfixturevalue("s3_url"))


class Run:
    """A run's driver, as far as gc can tell one from a real one."""

    def __init__(self, store: Store, run_id: str, folder: Path, created: float = 1.0) -> None:
        self.store, self.run_id, self._folder = store, run_id, folder
        tree = {"workflow": "m:w", "recipe": {"args": []}, "created": created}
        store.put_if_absent(f"runs/{run_id}/run.json", json.dumps(tree).encode())
        self.journal = Journal.acquire(store, run_id, ttl_s=5.0)

    def artifact(self, name: str, text: str) -> tuple[str, Artifact]:
        """An attempt's sealed artifact."""
        attempt = uuid.uuid4().hex
        location = f"runs/{self.run_id}/attempts/{attempt}/{name}"
        scratch = self._folder / attempt
        scratch.mkdir(parents=True)
        source = ArtifactSource(self.store.url, str(self._folder))
        writer = ArtifactWriter(self.store, source, location, scratch, lambda: None)
        (writer.path / "a.txt").write_text(text)
        self.store.put(f"runs/{self.run_id}/attempts/{attempt}/log.txt", b"said")
        return attempt, writer.seal()

    def commit(self, call: str, artifact: Artifact | None, attempt: str | None = None, **more: Any) -> None:
        result = None if artifact is None else {"$artifact": artifact.record()}
        record = {"type": "commit", "call": call, "step": "m:f", "result": result, "code": "c" * 64, "key": call}
        record |= {"started": 1.0, "ended": 2.0, "seconds": 1.0, "node": "", "attempt": 1, "attempt_id": attempt}
        append(self.journal, [{**record, **more}])

    def index(self, key: str, artifact: Artifact) -> None:
        entry = {"format": 1, "run": self.run_id, "key": key, "result": {"$artifact": artifact.record()}}
        self.store.put(index_key(key), json.dumps({**entry, "call": "a", "step": "m:f", "seconds": 1.0}).encode())

    def end(self, status: str = "finished", when: float = 100.0) -> None:
        append(self.journal, [{"type": "end", "status": status, "time": when, "result": None}])


def is_whole(store: Store, artifact: Artifact) -> bool:
    try:
        entries = read_manifest(store, artifact)
    except StoreError:
        return False
    return all(store.exists(f"{artifact.location}/data/{entry.path}") for entry in entries)


def kinds(result: GcResult) -> dict[str, int]:
    found: dict[str, int] = {}
    for item in result.deleted:
        found[item.kind] = found.get(item.kind, 0) + 1
    return found


def test_only_what_nobody_needs_goes_and_only_after_the_grace(store: Store, tmp_path: Path) -> None:
    run = Run(store, "r", tmp_path)
    attempt, kept = run.artifact("kept", "one")
    _, lost = run.artifact("lost", "two")
    run.commit("a", kept, attempt)
    store.put("code/" + "c" * 64 + ".json", b"{}")
    store.put("code/" + "c" * 64 + ".f.json", b"[]")
    store.put("code/" + "d" * 64 + ".json", b"{}")
    store.put("probe/x", b"visible?")
    run.index("k" * 64, lost)
    run.end()
    plan = plan_gc(store, Policy())
    assert sorted(item.kind for item in plan.items) == ["attempts that lost", "code records", "probe files"]
    assert not plan.due and is_whole(store, lost), "a plan changes nothing"
    first = collect(store, Policy())
    assert not first.deleted and len(first.marked) == 3 and is_whole(store, lost)
    assert not list(store.list("index")), "the index no longer leads there"
    second = collect(store, NOW)
    assert kinds(second) == {"attempts that lost": 1, "code records": 1, "probe files": 1}
    assert is_whole(store, kept) and not is_whole(store, lost)
    assert list(store.list("code")) == ["code/" + "c" * 64 + end for end in (".f.json", ".json")]
    assert not plan_gc(store, NOW).items and not read_marks(store).marks


def test_a_submitted_run_keeps_its_code_package(store: Store, tmp_path: Path) -> None:
    """Whichever service finds an unfinished run unpacks it, and goes on."""
    Run(store, "r", tmp_path)
    store.put("runs/r/submission.json", json.dumps({"package": "a" * 64}).encode())
    for letter in "ab":
        store.put(f"packages/{letter * 64}.zip", b"zip")
    assert [item.key for item in plan_gc(store, NOW).items] == [f"packages/{'b' * 64}.zip"]


def test_a_removed_run_keeps_what_others_took_from_it(store: Store, tmp_path: Path) -> None:
    first, second = Run(store, "old", tmp_path, created=1.0), Run(store, "new", tmp_path, created=2.0)
    attempt, shared = first.artifact("shared", "one")
    other, own = first.artifact("own", "two")
    first.commit("a", shared, attempt)
    first.commit("b", own, other)
    first.end()
    second.commit("a", shared, reused_from="old")
    second.end()
    assert "needed by run new (a), run old (a)" in explain(store, shared.digest[:12])[0]
    result = collect(store, Policy(keep_runs=1, grace_s=0))
    assert result.removed_runs == ["old"] and is_whole(store, shared) and not is_whole(store, own)
    assert [(kept.location, kept.by[0].run_id) for kept in result.kept] == [(shared.location, "new")]
    assert [run.run_id for run in list_runs(store)] == ["new"]
    with pytest.raises(UserError, match=r"run old was removed by `recua gc`"):
        Journal.acquire(store, "old")
    with pytest.raises(UserError, match="no run refers to an artifact"):
        explain(store, own.digest[:12])
    collect(store, Policy(runs=("new",), grace_s=0))
    assert not is_whole(store, shared) and not list(store.list("runs")), "and when those are gone it goes too"


def test_unfinished_runs_lose_nothing(store: Store, tmp_path: Path) -> None:
    running, failed = Run(store, "running", tmp_path), Run(store, "failed", tmp_path)
    beat = Heartbeat(running.journal, lambda: None, lambda error: None)
    _, writing = running.artifact("writing", "one")
    attempt, _ = failed.artifact("half", "two")
    failed.end("failed")
    with pytest.raises(UserError, match="--run running: it is running"):
        collect(store, Policy(runs=("running",), grace_s=0))
    beat.close()
    with pytest.raises(UserError, match="--run nobody: no such run"):
        collect(store, Policy(runs=("nobody",)))
    result = collect(store, Policy(grace_s=0, patience_s=0.1))
    assert is_whole(store, writing) and result.waiting == ["running"], "its driver has not said that it knows"
    running.end("cancelled")
    result = collect(store, NOW)
    assert not is_whole(store, writing) and kinds(result) == {"attempts that lost": 2}
    assert store.get(f"runs/failed/attempts/{attempt}/log.txt") == b"said", "the log of a failure stays"


def test_policies_choose_whole_runs(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    day = 86_400.0
    for number in range(4):
        run = Run(store, f"r{number}", tmp_path, created=number * day)
        run.end(when=number * day)
    Run(store, "interrupted", tmp_path, created=0.0)

    def chosen(**policy: Any) -> list[str]:
        return sorted(plan_gc(store, Policy(**policy), now=4 * day).runs)

    assert chosen() == [] and chosen(keep_runs=2) == ["r0", "r1"] and chosen(keep_days=2.5) == ["r0", "r1"]
    assert chosen(keep_runs=1, keep_days=2.5) == ["r0", "r1"] and chosen(keep_runs=9, keep_days=0.1) == []
    assert chosen(runs=("r3",), keep_runs=3) == ["r0", "r3"], "an interrupted run goes only by its name"


def test_it_refuses_while_anything_is_unreadable(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    run = Run(store, "r", tmp_path)
    _, lost = run.artifact("lost", "two")
    run.end()
    Run(store, "other", tmp_path)
    store.put(slot_key("other", 1), b"{half")
    with pytest.raises(StoreError, match="is damaged"):
        collect(store, NOW)
    assert is_whole(store, lost) and not store.exists(LOCK_KEY)


def test_one_at_a_time_and_a_dead_one_is_no_hindrance(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    journal = Journal.acquire(store, "r")
    assert journal.state.lease is not None
    holder = {**journal.state.lease, "pid": os.getpid()}
    store.put(LOCK_KEY, json.dumps(holder).encode())
    with pytest.raises(UserError, match=f"another `recua gc` is at work: process {os.getpid()}"):
        collect(store, NOW)
    store.put(LOCK_KEY, json.dumps({**holder, "process_start": "0"}).encode())
    collect(store, NOW)
    assert not store.exists(LOCK_KEY)


def test_temporary_files_of_dead_writers_go(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    Run(store, "r", tmp_path).end()
    dead = tmp_path / "store" / ".tmp-dead"
    dead.write_bytes(b"12345")
    for policy in (Policy(), NOW):
        assert not [item for item in plan_gc(store, policy).items if item.kind == "temporary files"], "too young"
    old = time.time() - 100
    os.utime(dead, (old, old))
    result = collect(store, NOW)
    assert kinds(result) == {"temporary files": 1} and result.deleted[0].size == 5


def test_a_file_of_an_artifact_is_not_temporary_whatever_its_name(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    run = Run(store, "r", tmp_path)
    attempt, artifact = run.artifact("model", "w")
    file = artifact.path() / ".tmp-a" / ".tmp-b"
    file.parent.mkdir()
    file.write_text("of the user")
    os.utime(file, (1, 1))
    run.commit("f[0]", artifact, attempt)
    run.end()
    collect(store, NOW)
    assert file.exists()


def test_a_lookup_that_began_before_the_marks_is_waited_for(store: Store, tmp_path: Path) -> None:
    """A driver has found an index entry and is slow to commit. gc marks what the entry leads to and must wait."""
    old, new = Run(store, "old", tmp_path), Run(store, "new", tmp_path)
    attempt, shared = old.artifact("shared", "one")
    old.commit("a", shared, attempt)
    old.end()
    marks = DriverMarks(store)
    beat = Heartbeat(new.journal, lambda: None, lambda error: None, acknowledge=marks.acknowledge)
    try:
        marks.begin("a")  # and the index is read
        results: list[GcResult] = []
        policy = Policy(runs=("old",), grace_s=0, patience_s=60)
        thread = threading.Thread(target=lambda: results.append(collect(store, policy)))
        thread.start()
        deadline = time.monotonic() + 60
        while marks.acknowledge() == 0 and not marks._marks.epoch:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not marks.allow({"$artifact": shared.record()}), "a later lookup does not take it"
        assert is_whole(store, shared) and thread.is_alive(), "gc waits for the one under way"
        new.commit("a", shared, reused_from="old")
        marks.end("a")
        thread.join(timeout=60)
    finally:
        beat.close()
    assert results[0].waiting == [] and is_whole(store, shared) and results[0].deleted, "the rest of `old` went"
    assert not read_marks(store).cover(shared.location), "what is needed is unmarked"


def test_a_driver_that_stopped_is_fenced_before_anything_goes(tmp_path: Path) -> None:
    """It holds a lookup from long ago, on a machine that nobody can see: its lease is taken, so it commits nothing."""
    store = FolderStore(tmp_path / "store")
    old, stopped = Run(store, "old", tmp_path), Run(store, "stopped", tmp_path)
    attempt, shared = old.artifact("shared", "one")
    old.commit("a", shared, attempt)
    old.end()
    raw = json.loads(store.get(slot_key("stopped", 1)) or b"")
    raw["records"][0] |= {"machine": "elsewhere", "time": time.time() - 7200, "ttl_s": 0.5}
    store.put(slot_key("stopped", 1), json.dumps(raw).encode())
    result = collect(store, Policy(runs=("old",), grace_s=0, patience_s=20))
    assert result.waiting == [] and not is_whole(store, shared)
    with pytest.raises(StoreError, match="another driver has taken over"):
        stopped.commit("a", shared, reused_from="old")


def test_many_drivers_never_refer_to_what_is_gone(tmp_path: Path) -> None:
    """Drivers look up, dawdle and commit as fast as they can while gc removes old runs without any grace."""
    store = FolderStore(tmp_path / "store")
    seed = int(os.environ.get("SEED", "1"))
    stop, errors = threading.Event(), []
    made: list[Artifact] = []

    def drive(number: int) -> None:
        draw = random.Random(seed * 100 + number)
        try:
            for turn in range(6):
                run = Run(store, f"r{number}-{turn}", tmp_path / f"{number}", created=time.time())
                marks = DriverMarks(store)
                run.journal.ttl_s = 0.05
                beat = Heartbeat(run.journal, lambda: None, errors.append, acknowledge=marks.acknowledge)
                attempt, artifact = run.artifact("made", f"{number} {turn}")
                run.commit("made", artifact, attempt)
                run.index(f"{number}{turn}".ljust(64, "0"), artifact)
                for call in range(3):
                    marks.begin(f"c{call}")
                    key = draw.choice(["", *store.list("index")])
                    raw = store.get(key) if key else None
                    if raw is not None and marks.allow(json.loads(raw)["result"]):
                        found = Artifact.from_record(json.loads(raw)["result"]["$artifact"], None)
                        if store.get(f"{found.location}/manifest.json") is not None:
                            time.sleep(draw.random() / 4)
                            run.commit(f"c{call}", found, reused_from="x")
                            made.append(found)
                    marks.end(f"c{call}")
                beat.close()
                run.end(when=time.time())
        except BaseException as error:
            errors.append(error)

    def clean() -> None:
        try:
            while not stop.is_set():
                collect(store, Policy(keep_runs=6, grace_s=0, patience_s=1.0))
        except BaseException as error:
            errors.append(error)

    drivers = [threading.Thread(target=drive, args=(number,)) for number in range(4)]
    cleaner = threading.Thread(target=clean)
    for thread in [*drivers, cleaner]:
        thread.start()
    for thread in drivers:
        thread.join()
    stop.set()
    cleaner.join()
    assert not errors, f"SEED={seed}: {errors}"
    collect(store, Policy(keep_runs=6, grace_s=0))
    runs = list_runs(store)
    assert len(runs) == 6 and made, "old runs went, and some results were reused"
    for run in runs:
        for step in load_run(store, run.run_id).steps:
            assert is_whole(store, Artifact.from_record(step.result["$artifact"], None)), f"SEED={seed}: {step}"
    assert store.exists(removed_key("r0-0")) and read_journal(store, "r0-0").slot == 0
