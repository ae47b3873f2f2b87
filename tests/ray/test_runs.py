"""The durable graph on a real local Ray."""

import importlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graph_program as program
import pytest

from infra.errors import NodeLost, NonDeterminismError, ResourceError, StepError, StepTimeout, UserError
from infra.processes import process_start
from infra.storage import open_store
from tests.helpers.rays import local_ray
from workflows.driver import session
from workflows.driver.executor import Cancelled
from workflows.driver.settings import RunSettings
from workflows.graph import Workflow
from workflows.launch import plan as planning
from workflows.runs.catalog import cancel_run, find_steps, list_runs, load_run, read_log
from workflows.runs.events import Event
from workflows.runs.journal import read_journal
from workflows.runs.signals import reply


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray(num_cpus=2):
        yield


class Bench:
    """One store, one trace folder, and the events of the last run."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.store = open_store(folder / "store")
        self.events: list[Event] = []

    def settings(self, **settings: Any) -> RunSettings:
        return RunSettings(store=self.store.url, backoff_s=0.01, **settings)

    def run(self, workflow: Workflow[..., Any], *args: Any, **settings: Any) -> session.RunResult:
        self.events = []
        return session.run(workflow, *args, settings=self.settings(**settings), observers=[self.events.append])

    def kinds(self, kind: str) -> list[str]:
        return [event.call_id for event in self.events if event.kind == kind]

    @property
    def trace(self) -> list[str]:
        return program.traced(self.folder)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def gone(pid: int) -> bool:
    return process_start(pid) is None


def wait_gone(*pids: int) -> None:
    deadline = time.monotonic() + 20
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still alive: {[pid for pid in pids if not gone(pid)]}"
        time.sleep(0.02)


def test_a_worker_that_cannot_be_as_it_was_is_given_up_without_a_failure(bench: Bench) -> None:
    (worker, child), before, after = bench.run(program.leaving).value
    assert gone(child) and after[0] != worker and after[1] == before[1]
    assert not bench.kinds("retry"), "to its driver that is no lost process"
    [warning] = [event.data["message"] for event in bench.events if event.kind == "warning"]
    assert warning == f"attempt 1: process {child} (sleep 600) outlived its step and was ended"


def test_edges_inside_containers_and_a_finished_run(bench: Bench) -> None:
    first = bench.run(program.summing, bench.folder)
    assert first.value == 10 and not first.already_finished
    assert sorted(bench.trace) == ["number 1", "number 2", "number 3", "total"]
    again = bench.run(program.summing, bench.folder)
    assert again.value == 10 and again.already_finished and len(bench.trace) == 4


def test_the_journal_keeps_the_edges(bench: Bench) -> None:
    run = bench.run(program.summing, bench.folder)
    state = read_journal(bench.store, run.run_id)
    edges = {"total[0]": ["number[0]", "number[1]", "number[2]"]}
    assert {call: record["needs"] for call, record in state.commits.items() if "needs" in record} == edges
    assert {call: starts[0]["needs"] for call, starts in state.starts.items() if "needs" in starts[0]} == edges


def test_branches_run_at_the_same_time(bench: Bench) -> None:
    assert bench.run(program.branches, bench.folder).value == ["a", "b"]


def test_python_decides_on_results(bench: Bench) -> None:
    assert bench.run(program.doubling, bench.folder, 20).value == 32
    assert bench.trace == [f"number {x}" for x in (1, 2, 4, 8, 16)]


def test_a_failed_run_goes_on_where_it_stopped(bench: Bench) -> None:
    with pytest.raises(StepError):
        bench.run(program.gate, bench.folder)
    run = load_run(bench.store, list_runs(bench.store)[0].run_id)
    assert run.status == "failed" and [step.status for step in run.steps] == ["committed", "failed"]
    (Path(bench.folder) / "open").touch()
    assert bench.run(program.gate, bench.folder).value == 8
    assert bench.kinds("resumed") == ["number[0]"]
    assert bench.trace == ["number 7", "guarded", "hook", "guarded", "hook"], "hooks run however a run ends"
    run = load_run(bench.store, run.run_id)
    assert run.status == "finished" and run.drivers == 2 and len(run.steps[1].attempts) == 2 and run.result == 8


def test_the_users_error_comes_first_and_without_our_frames(bench: Bench) -> None:
    with pytest.raises(StepError, match=r"guarded\[0\]: ValueError: the gate is closed") as caught:
        bench.run(program.gate, bench.folder)
    text = caught.value.user_traceback
    frames = [line for line in text.splitlines() if line.strip().startswith("File ")]
    assert len(frames) == 1 and "graph_program.py" in frames[0] and text.endswith("ValueError: the gate is closed\n")
    assert bench.trace.count("guarded") == 1, "not retried"


def test_retries_of_the_user_and_of_the_platform_are_apart(bench: Bench) -> None:
    assert bench.run(program.one, "third_time", bench.folder).value == 3
    assert bench.run(program.one, "crash", bench.folder, 2).value == 3
    assert len(bench.kinds("retry")) == 2
    with pytest.raises(NodeLost, match=r"crash\[0\]"):
        bench.run(program.one, "crash", bench.folder, 100, system_retries=1)
    assert bench.trace.count("crash") == 5


def test_detached_attempts_that_ran_for_long_are_not_counted_with_those_before(bench: Bench) -> None:
    with pytest.raises(NodeLost, match=r"crash_late\[0\]"):
        bench.run(program.one, "crash_late", bench.folder, 2, system_retries=0)
    assert bench.run(program.one, "crash_late", bench.folder, 3, system_retries=1, retry_window_s=0).value == 4


def test_a_timeout_ends_the_step_and_its_children(bench: Bench) -> None:
    with pytest.raises(StepTimeout, match=r"endless\[0\].*timeout of 1 s"):
        bench.run(program.one, "endless", bench.folder)
    wait_gone(*map(int, (Path(bench.folder) / "pids").read_text().split()))


def test_a_failure_elsewhere_is_not_waited_out(bench: Bench) -> None:
    with pytest.raises(StepError, match="the gate is closed"):
        bench.run(program.impatient, bench.folder)
    wait_gone(*map(int, (Path(bench.folder) / "pids").read_text().split()))


def test_a_failure_can_be_handled(bench: Bench) -> None:
    assert bench.run(program.tolerant, bench.folder).value == "StepError"


def test_a_request_that_can_never_be_met_is_named(bench: Bench) -> None:
    with pytest.raises(ResourceError, match=r"greedy\[0\] asks for num_gpus=1000, but no node has more than"):
        bench.run(program.one, "greedy")


def test_equal_steps_are_reused_across_runs(bench: Bench) -> None:
    bench.run(program.doubling, bench.folder, 20)
    assert bench.run(program.doubling, bench.folder, 40).value == 64
    assert len(bench.kinds("reused")) == 5 and bench.kinds("committed") == ["number[5]"]
    fresh = bench.run(program.doubling, bench.folder, 40, new=True)
    assert fresh.run_id.endswith("-2") and len(bench.kinds("committed")) == 6
    assert bench.run(program.doubling, bench.folder, 40).run_id == fresh.run_id, "the newest run of a recipe is its run"


def test_rerun_repeats_one_step_and_keeps_what_still_fits(bench: Bench) -> None:
    bench.run(program.summing, bench.folder)
    again = bench.run(program.summing, bench.folder, rerun=("number",))
    assert again.value == 10 and not again.already_finished
    assert len(bench.kinds("committed")) == 3 and bench.kinds("reused") == ["total[0]"], "equal inputs, equal result"


def test_a_plan_runs_nothing(bench: Bench) -> None:
    def plan(workflow: Workflow[..., Any], *args: Any) -> planning.Plan:
        return planning.plan(workflow, bench.folder, *args, settings=bench.settings())

    before = plan(program.doubling, 20)
    assert [(call.call_id, call.status) for call in before.calls] == [("number[0]", "would run")]
    assert before.unknown_after == "number[0]" and bench.trace == [] and list_runs(bench.store) == []
    whole = plan(program.summing)
    assert len(whole.calls) == 4 and whole.unknown_after is None and whole.calls[3].needs[0] == "number[0]"
    bench.run(program.doubling, bench.folder, 20)
    after = plan(program.doubling, 40)
    assert [call.status for call in after.calls] == ["reusable"] * 5 + ["would run"]
    assert {call.status for call in plan(program.doubling, 20).calls} == {"committed"}


@pytest.mark.parametrize(
    ("file", "message"),
    [("changed", r"number\[0\] was committed with other inputs"), ("other", None)],
)
def test_another_path_is_an_error_that_names_both(bench: Bench, file: str, message: str | None) -> None:
    with pytest.raises(StepError):
        bench.run(program.wandering, bench.folder)
    (Path(bench.folder) / file).touch()
    if message is None:  # a new call is no contradiction
        assert bench.run(program.wandering, bench.folder).value == 1
        return
    with pytest.raises(NonDeterminismError, match=message):
        bench.run(program.wandering, bench.folder)


def test_another_step_under_a_committed_id_is_named(bench: Bench) -> None:
    with pytest.raises(StepError):
        bench.run(program.gate, bench.folder)
    run_id = list_runs(bench.store)[0].run_id
    key = f"runs/{run_id}/journal/00000002.json"
    raw = bench.store.get(key)
    assert raw is not None
    bench.store.put(key, raw.replace(b'"graph_program:number"', b'"graph_program:renamed"'))
    with pytest.raises(NonDeterminismError, match="committed as graph_program:renamed and is now graph_program:number"):
        bench.run(program.gate, bench.folder)


def test_a_run_id_of_another_recipe_is_refused(bench: Bench) -> None:
    bench.run(program.doubling, bench.folder, 4, run_id="mine")
    with pytest.raises(NonDeterminismError, match="4, now 8"):
        bench.run(program.doubling, bench.folder, 8, run_id="mine")


def test_changed_code_warns_and_keeps_the_committed_result(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StepError):
        bench.run(program.gate, bench.folder)
    from workflows.identity.fingerprint import Fingerprinter

    of = Fingerprinter.of

    def edited(self: Fingerprinter, function: Any, libraries: Any = ()) -> Any:
        found = of(self, function, libraries)
        parts = {**found.parts, "graph_program:trace": "edited"}
        return type(found)("another", parts, found.libraries)

    monkeypatch.setattr(Fingerprinter, "of", edited)
    (Path(bench.folder) / "open").touch()
    assert bench.run(program.gate, bench.folder).value == 8
    warnings = [(event.call_id, event.data["message"]) for event in bench.events if event.kind == "warning"]
    assert [call for call, _ in warnings] == ["number[0]"] and "graph_program:trace" in warnings[0][1]


def test_logs_progress_artifacts_and_scratch(bench: Bench) -> None:
    result = bench.run(program.speaking, bench.folder)
    assert result.value == "words"
    progress = [event.data["metrics"] for event in bench.events if event.kind == "progress"]
    assert progress[0] == {"loss": 0.5} and progress[-1] == {"loss": 0.25}
    step = find_steps(load_run(bench.store, result.run_id), "talk")[0]
    log = read_log(bench.store, result.run_id, step.attempts[-1])
    assert log.splitlines() == ["to standard output", "from a child", "a line"]
    assert not Path(bench.trace[0]).exists(), "scratch is removed"
    assert step.result["$artifact"]["meta"] == {"count": 1} and step.seconds is not None and step.node
    with pytest.raises(UserError, match=r"no step 'tolk'; did you mean talk\[0\]"):
        find_steps(load_run(bench.store, result.run_id), "tolk")


def test_a_body_may_use_ray_itself(bench: Bench) -> None:
    assert bench.run(program.one, "with_actor").value == 2


def test_cancelling_stops_the_driver_and_its_steps(bench: Bench) -> None:
    caught: list[BaseException] = []

    def drive() -> None:
        try:
            workflow_settings = bench.settings(run_id="long", lease_s=2.0)
            session.run(program.one, "endless", bench.folder, settings=workflow_settings)
        except BaseException as error:
            caught.append(error)

    body = program.endless.default
    object.__setattr__(program.endless, "default", type(body)(timeout=600))
    try:
        thread = threading.Thread(target=drive)
        thread.start()
        deadline = time.monotonic() + 60
        while not (Path(bench.folder) / "pids").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert load_run(bench.store, "long").status == "running"
        assert cancel_run(bench.store, "long") == "cancelled"
        thread.join(timeout=30)
    finally:
        object.__setattr__(program.endless, "default", body)
    assert isinstance(caught[0], Cancelled)
    wait_gone(*map(int, (Path(bench.folder) / "pids").read_text().split()))


def test_every_call_has_exactly_one_commit_record(bench: Bench) -> None:
    result = bench.run(program.summing, bench.folder)
    commits: list[str] = []
    for key in bench.store.list(f"runs/{result.run_id}/journal"):
        raw = bench.store.get(key)
        assert raw is not None
        commits += [record["call"] for record in json.loads(raw)["records"] if record["type"] == "commit"]
    assert sorted(commits) == ["number[0]", "number[1]", "number[2]", "total[0]"]
    assert not any("secret" in key.lower() for key in os.listdir(bench.folder))


STORED = Path(__file__).resolve().parent.parent / "fixtures" / "stored_runs"


@pytest.fixture
def stored(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program of the runs that an older version stored; `bench` gets a copy of their store."""
    shutil.copytree(STORED / "store", bench.store.url)
    monkeypatch.syspath_prepend(str(STORED))
    return importlib.import_module("stored_flow")


def test_a_run_that_an_older_version_left_unfinished_resumes(bench: Bench, stored: Any) -> None:
    assert load_run(bench.store, "unfinished").status == "interrupted"
    reply(bench.store, "unfinished", "labels", "event", ["a", "b"], "somebody")
    result = bench.run(stored.unfinished, run_id="unfinished")
    assert result.value == "4.5 HIGH/HIGH/HIGH/HIGH a-b yes"
    assert bench.kinds("committed") == ["event[labels]", "publish[0]"]
    assert not bench.kinds("warning")


def test_results_of_an_older_version_are_reused(bench: Bench, stored: Any) -> None:
    old = bench.run(stored.finished, run_id="finished")
    assert old.already_finished and old.value == {"mean": 8 / 3, "rows": 4}
    assert bench.run(stored.finished, run_id="second").value == old.value
    if sys.version_info[:2] == (3, 11):  # the version of Python is part of every key
        assert bench.kinds("committed") == []
