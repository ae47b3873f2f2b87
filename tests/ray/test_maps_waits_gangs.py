"""Dynamic graphs on a real local Ray: maps, loops, waits, gangs, cancel."""

import json
import os
import queue
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dynamic_program as program
import pytest
import ray
from click.testing import CliRunner
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from infra.errors import NonDeterminismError, ResourceError, StepError, StepTimeout, UserError
from infra.processes import process_start
from infra.storage import open_store
from tests.helpers import rays
from workflows.cli import main
from workflows.driver import session
from workflows.driver.executor import Cancelled
from workflows.driver.settings import RunSettings
from workflows.graph import Workflow
from workflows.runs.catalog import cancel_run, list_runs, load_run
from workflows.runs.events import Event
from workflows.runs.journal import read_journal


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    with rays.cluster(num_cpus=4) as made:
        yield made


class Bench:
    """One store, one trace folder, and the events of the last run."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.store = open_store(folder / "store")
        self.events: list[Event] = []

    def run(self, workflow: Workflow[..., Any], *args: Any, **settings: Any) -> session.RunResult:
        self.events = []
        chosen = RunSettings(store=self.store.url, backoff_s=0.01, **settings)
        return session.run(workflow, *args, settings=chosen, observers=[self.events.append])

    def kinds(self, kind: str) -> list[str]:
        return [event.call_id for event in self.events if event.kind == kind]

    @property
    def trace(self) -> list[str]:
        return program.traced(self.folder)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_dynamic_maps_over_lists_known_now_later_and_inside_results(bench: Bench) -> None:
    result = bench.run(program.mapping, 5)
    later = [4, 5, 8, 13, 20]
    assert result.value == {
        "later": later,
        "sum": 51,
        "odd": [1, 9],
        "even": [0, 4, 16],
        "now": [1, 4, 81],
        "of a map": [x * x for x in later],
        "none": [],
        "no list at all": [],
    }
    steps = {step.call_id: step for step in load_run(bench.store, result.run_id).steps}
    assert steps["square.map[0]/square[4]"].needs == ("numbers[0]", "square[0]")
    assert steps["square.map[3]/square[2]"].needs == ("square[1]",), "an item's own future"
    assert "square.map[0]" not in steps, "a map has no record of its own"
    again = bench.run(program.mapping, 5, new=True)
    calls = [set(read_journal(bench.store, each.run_id).commits) for each in (result, again)]
    assert again.value == result.value and calls[0] == calls[1] and len(calls[0]) == 24


def test_dynamic_map_of_a_thousand(bench: Bench) -> None:
    result = bench.run(program.wide, 1000)
    assert result.value == sum(x * x for x in range(1000))
    assert len(bench.kinds("committed")) == 1002


def test_dynamic_map_respects_the_cap_on_attempts_in_flight(bench: Bench) -> None:
    assert bench.run(program.crowded, bench.folder, max_in_flight=1).value == [1] * 6


def test_dynamic_map_names_the_call_that_failed_and_goes_on_from_there(bench: Bench) -> None:
    arguments = ([3, 4, 5, -1], [5], bench.folder)
    with pytest.raises(StepError, match=r"^picky.map\[0\]/picky\[2\]: ValueError: 5 is bad"):
        bench.run(program.picking, *arguments)
    assert bench.trace.count("picky 5") == 2, "the map's options are its calls'"
    (Path(bench.folder) / "open").touch()
    done = len(read_journal(bench.store, list_runs(bench.store)[0].run_id).commits)
    assert bench.run(program.picking, *arguments).value == [3, 4, 5, -1]
    assert len(bench.kinds("resumed")) == done and bench.trace.count("picky 3") == 1


def test_dynamic_map_that_may_fail_tells_the_first_failure_in_the_items_order(bench: Bench) -> None:
    [text] = bench.run(program.tolerant, [1, 2, 3], [1, 2, 3], bench.folder).value
    assert text == "picky.map[0]/picky[0]: ValueError: 1 is bad" and len(bench.trace) == 3
    assert bench.run(program.tolerant, [1, 2], [], bench.folder).value == [[1, 2]]


def test_dynamic_map_over_no_list_is_named(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"square.map\[0\]: the items must be a list, and square\[0\] gave a int"):
        bench.run(program.over_no_list)


@pytest.mark.parametrize(
    ("day", "message"),
    [
        ('[[1, 2, 4], "square"]', r"square.map\[0\]/square\[2\] was committed with other inputs \(x 3, now 4\)"),
        ('[[1, 2], "square"]', r"square.map\[0\] had a list of 3 items .* one of 2 now"),
        (
            '[[1, 2, 3], "elsewhere"]',
            r"had committed square.map\[0\]/square\[\d\], .* made square\[elsewhere\], add_all\[elsewhere\] instead",
        ),
    ],
)
def test_dynamic_another_path_names_both(bench: Bench, day: str, message: str) -> None:
    with pytest.raises(StepError):
        bench.run(program.changing, bench.folder)
    (Path(bench.folder) / "day").write_text(day)
    (Path(bench.folder) / "open").touch()
    with pytest.raises(NonDeterminismError, match=message):
        bench.run(program.changing, bench.folder)


def groups() -> list[str]:
    """The placement groups that are there."""
    return [entry["name"] for entry in placement_group_table().values() if entry["state"] != "REMOVED"]


def gone(pid: int) -> bool:
    return process_start(pid) is None


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def all_gone(bench: Bench, me: str = "a") -> None:
    pids = [int(pid) for pid in (Path(bench.folder) / me).read_text().split()]
    assert len(pids) == 7
    wait_for(lambda: all(map(gone, pids)), f"left of {pids}: {[pid for pid in pids if not gone(pid)]}")
    wait_for(lambda: not groups(), "a placement group is left")


def test_dynamic_gang_holds_the_body_and_what_it_starts_and_is_made_anew_for_a_retry(bench: Bench) -> None:
    seen = bench.run(program.gathering, bench.folder).value
    assert len(seen) == 5 and len(set(seen)) == 1
    assert bench.trace.count("together") == 2 and f"first {seen[0]}" not in bench.trace
    wait_for(lambda: not groups(), "a placement group is left")


def test_dynamic_gang_that_finds_no_room_says_so_and_gets_it_later(bench: Bench) -> None:
    def observe(event: Event) -> None:
        if event.kind == "pending":
            pending.append(event)
            (Path(bench.folder) / "go").touch()

    pending: list[Event] = []
    settings = RunSettings(store=bench.store.url)
    assert session.run(program.holding, bench.folder, settings=settings, observers=[observe]).value == ["a", "b"]
    messages = [event.data["message"] for event in pending]
    assert messages and set(messages) == {"waiting for resources: (CPU=1) + (CPU=2), PACK"}
    wait_for(lambda: not groups(), "a placement group is left")


def test_dynamic_gang_that_can_never_be_is_named(bench: Bench) -> None:
    message = r"gathered\[0\] asks for gang=5 x \(CPU=1\), SPREAD, but that is CPU=5 in all, and this cluster has CPU=4"
    with pytest.raises(ResourceError, match=message):
        bench.run(program.too_much, 5)


@contextmanager
def background(bench: Bench, run_id: str, work: Callable[..., Any], *args: Any) -> Iterator[Future[Any]]:
    """`work(*args)`, which drives `run_id`, on a thread; the run is cancelled where the block ends before it."""
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(work, *args)
        finally:
            cancel_run(bench.store, run_id, wait_s=120)


def test_dynamic_gang_says_which_nodes_it_waits_for_and_starts_when_they_come(bench: Bench, cluster: Cluster) -> None:
    messages: queue.SimpleQueue[str] = queue.SimpleQueue()

    def observe(event: Event) -> None:
        if event.kind == "pending":
            messages.put(event.data["message"])

    def drive(name: str) -> str:
        settings = RunSettings(store=bench.store.url, run_id=name, wait_for_nodes=True, lease_s=5.0)
        return str(session.run(program.too_much, 5, settings=settings, observers=[observe]).value)

    wanted = "waits for nodes: it asks for gang=5 x (CPU=1), SPREAD, but that is CPU=5 in all, and this cluster has CPU"
    with background(bench, "impatient", drive, "impatient") as driver:
        assert messages.get(timeout=120).startswith(wanted)
        assert cancel_run(bench.store, "impatient", wait_s=120) == "cancelled"
        with pytest.raises(Cancelled):
            driver.result(timeout=120)
    wait_for(lambda: not groups(), "a placement group is left")
    with background(bench, "patient", drive, "patient") as driver:
        assert messages.get(timeout=120).startswith(wanted)
        node = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        try:
            assert len(driver.result(timeout=120)) > 8
        finally:
            cluster.remove_node(node)
    wait_for(lambda: not groups(), "a placement group is left")


def test_dynamic_timeout_leaves_no_group_no_actor_and_no_process(bench: Bench) -> None:
    for seconds in (15.0, 60.0, 240.0):
        with pytest.raises(StepTimeout, match=r"hold\[0\]"):
            bench.run(program.holding_one, bench.folder, seconds)
        if (Path(bench.folder) / "a").exists():  # what the body starts was there before its time was up
            break
    all_gone(bench)


def test_dynamic_gang_of_a_killed_worker_is_made_anew(bench: Bench) -> None:
    file = Path(bench.folder) / "a"
    driver = drive(bench, "holding_one", bench.folder, 600.0)
    wait_for(file.exists, "the body did not begin")
    first, before = file.read_text(), placement_group_table().keys()
    os.kill(int(first.split()[0]), signal.SIGKILL)
    wait_for(lambda: file.read_text() != first, "there was no second attempt")
    wait_for(lambda: all(gone(int(pid)) for pid in first.split()), f"something of the first attempt is left: {first}")
    assert len(groups()) == 1 and len(placement_group_table().keys() - before) == 1
    (Path(bench.folder) / "go").touch()
    assert result_of(driver) == "a"
    wait_for(lambda: not groups(), "a placement group is left")


@pytest.mark.parametrize("how", ["recua cancel", "Ctrl-C", "SIGTERM", "SIGKILL"])
def test_dynamic_stopped_run_leaves_no_group_no_actor_and_no_process(bench: Bench, how: str) -> None:
    driver = drive(bench, "holding_one", bench.folder, 600.0, lease_s=5.0)
    wait_for((Path(bench.folder) / "a").exists, "the body did not begin")
    assert groups() == ["hold[0]"]
    if how == "recua cancel":
        typed = ["cancel", "r", "--store", bench.store.url]
        wait_for(lambda: CliRunner().invoke(main.main_group, typed).output == "run r is cancelled\n", "it goes on")
    elif how == "Ctrl-C":
        os.killpg(driver.pid, signal.SIGINT)  # what a terminal sends: to everyone in the foreground
    else:
        driver.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
    driver.communicate(timeout=300)
    all_gone(bench)
    assert load_run(bench.store, "r").status == ("interrupted" if how == "SIGKILL" else "cancelled")


def drive(bench: Bench, workflow: str, *args: Any, **settings: Any) -> subprocess.Popen[str]:
    """A driver of its own on the same cluster."""
    address = ray.get_runtime_context().gcs_address
    chosen = json.dumps({"store": bench.store.url, "ray_address": address, "run_id": "r", **settings})
    command = [sys.executable, program.__file__, chosen, workflow, json.dumps(args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def result_of(driver: subprocess.Popen[str]) -> Any:
    """What the driver's run gave, None where it gave nothing; Ray's own words may come between."""
    lines, _ = driver.communicate(timeout=300)
    return json.loads(lines.splitlines()[-1]) if driver.returncode == 0 else None


def test_dynamic_loop_is_killed_half_way_and_leaves_no_memory_behind(bench: Bench) -> None:
    killed = drive(bench, "looping", 400, faults="executor.between-steps:300=kill")
    assert killed.wait() == -signal.SIGKILL
    before = read_journal(bench.store, "r").commits
    assert 200 < len(before) < 600
    settings = RunSettings(store=bench.store.url, run_id="r")
    resumed: list[str] = []
    program.MEMORY.clear()
    tracemalloc.start()
    try:
        observe = [lambda event: resumed.append(event.call_id) if event.kind == "resumed" else None]
        result = session.run(program.looping, 400, settings=settings, observers=observe)
    finally:
        tracemalloc.stop()
    assert result.value == program.looped(400) and sorted(resumed) == sorted(before)
    commits = [record["call"] for record in records(bench, "r") if record["type"] == "commit"]
    assert len(commits) == len(set(commits)) > 800
    objects, memory, _ = zip(*program.MEMORY, strict=True)
    assert len(objects) == 4 and max(objects) < 20, objects
    grown = memory[-1] - memory[-2]  # folder names that the store remembers, at most 256 of the index among them
    assert grown < 100 * 250, f"grown by {grown / 100:.0f} bytes a round; one kept call would be more"


def records(bench: Bench, run_id: str) -> Iterator[dict[str, Any]]:
    """All of a run's journal, slot by slot."""
    for key in bench.store.list(f"runs/{run_id}/journal"):
        yield from json.loads(bench.store.get(key) or b"")["records"]


def test_dynamic_pools_outlive_steps_and_no_run(bench: Bench) -> None:
    endings = {"finish": "finished", "fail": "failed", "cancel": "cancelled", "kill": "interrupted"}
    folders = {ending: Path(bench.folder) / ending for ending in endings}
    drivers = {}
    for ending, folder in folders.items():
        folder.mkdir()
        then = ending if ending in ("finish", "fail") else "hold"
        drivers[ending] = drive(bench, "lending", str(folder), then, run_id=ending, lease_s=5.0)
    for ending in ("cancel", "kill"):
        wait_for((folders[ending] / "hold").exists, f"{ending}: nothing was borrowed", 300)
    drivers["kill"].kill()
    cancel_run(bench.store, "cancel", wait_s=120)
    for ending, driver in drivers.items():
        assert result_of(driver) is (True if ending == "finish" else None), "the second step got another process"
        pids = {int(pid) for file in folders[ending].iterdir() for pid in file.read_text().split()}
        assert len(pids) == 2, "one keeper and one member, whoever borrowed"
        wait_for(lambda pids=pids: all(map(gone, pids)), f"{ending}: the pool is still there")
        assert load_run(bench.store, ending).status == endings[ending]
