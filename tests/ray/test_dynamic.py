"""Dynamic graphs on a real local Ray: maps, loops, waits, gangs, cancel."""

import json
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dynamic_program as program
import pytest
import ray
from ray.util.placement_group import placement_group_table

from infra.errors import NonDeterminismError, ResourceError, StepError, StepTimeout, UserError
from infra.storage import open_store
from workflows import session
from workflows.config import RunSettings
from workflows.events import Event
from workflows.executor import Cancelled
from workflows.graph import Workflow
from workflows.journal import read_journal
from workflows.runs import cancel_run, list_runs, load_run


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


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
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def all_gone(bench: Bench, me: str = "a") -> None:
    pids = [int(pid) for pid in (Path(bench.folder) / me).read_text().split()]
    assert len(pids) == 6
    wait_for(lambda: all(map(gone, pids)), f"left of {pids}: {[pid for pid in pids if not gone(pid)]}", 30)
    wait_for(lambda: not groups(), "a placement group is left", 30)


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
    assert messages == ["waiting for resources: (CPU=1) + (CPU=2), PACK"]
    wait_for(lambda: not groups(), "a placement group is left")


def test_dynamic_gang_that_can_never_be_is_named(bench: Bench) -> None:
    message = r"hold\[0\] asks for gang=5 x \(CPU=1\), SPREAD, but that is CPU=5 in all, and this cluster has CPU=4"
    with pytest.raises(ResourceError, match=message):
        bench.run(program.too_much, 5)


def test_dynamic_timeout_leaves_no_group_no_actor_and_no_process(bench: Bench) -> None:
    with pytest.raises(StepTimeout, match=r"hold\[0\]"):
        bench.run(program.holding_one, bench.folder, 8.0)
    all_gone(bench)


def test_dynamic_cancel_leaves_no_group_no_actor_and_no_process(bench: Bench) -> None:
    with ThreadPoolExecutor(1) as pool:
        driver = pool.submit(bench.run, program.holding_one, bench.folder, 600.0, run_id="r", lease_s=5.0)
        wait_for((Path(bench.folder) / "a").exists, "the body did not begin")
        assert cancel_run(bench.store, "r") == "cancelled"
        with pytest.raises(Cancelled):
            driver.result(timeout=30)
    all_gone(bench)


def test_dynamic_killed_driver_leaves_no_group_no_actor_and_no_process(bench: Bench) -> None:
    driver = drive(bench, "holding_one", bench.folder, 600.0)
    wait_for((Path(bench.folder) / "a").exists, "the body did not begin")
    assert groups() == ["hold[0]"]
    driver.kill()
    driver.wait()
    all_gone(bench)


def drive(bench: Bench, workflow: str, *args: Any, **settings: Any) -> subprocess.Popen[str]:
    """A driver of its own on the same cluster."""
    address = ray.get_runtime_context().gcs_address
    chosen = json.dumps({"store": bench.store.url, "ray_address": address, "run_id": "r", **settings})
    command = [sys.executable, program.__file__, chosen, workflow, json.dumps(args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_dynamic_thousand_rounds_are_killed_half_way_and_leave_no_memory_behind(bench: Bench) -> None:
    killed = drive(bench, "looping", 1000, faults="executor.between-steps:700=kill")
    assert killed.wait() == -signal.SIGKILL
    done = len(read_journal(bench.store, "r").commits)
    assert 400 < done < 1400
    resumed = 0

    def observe(event: Event) -> None:
        nonlocal resumed
        resumed += event.kind == "resumed"

    settings = RunSettings(store=bench.store.url, run_id="r")
    program.MEMORY.clear()
    tracemalloc.start()
    try:
        result = session.run(program.looping, 1000, settings=settings, observers=[observe])
    finally:
        tracemalloc.stop()
    assert result.value == program.looped(1000) and resumed == done
    objects, memory = zip(*program.MEMORY, strict=True)
    assert len(objects) == 10 and max(objects) < 20, objects
    grown = memory[-1] - memory[-3]  # folder names that the store remembers, at most 256 of the index among them
    assert grown < 200 * 250, f"grown by {grown / 200:.0f} bytes a round; one kept call would be more"
