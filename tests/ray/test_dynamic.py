"""Dynamic graphs on a real local Ray: maps, loops, waits, gangs, cancel."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dynamic_program as program
import pytest
import ray

from infra.errors import NonDeterminismError, StepError, UserError
from infra.storage import open_store
from workflows import session
from workflows.config import RunSettings
from workflows.events import Event
from workflows.graph import Workflow
from workflows.journal import read_journal
from workflows.runs import list_runs, load_run


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
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
