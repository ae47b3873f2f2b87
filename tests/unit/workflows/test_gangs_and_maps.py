"""Dynamic graphs without Ray: what can be placed, gangs, maps in plans, and what a long loop leaves in memory."""

import gc
import math
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.capacity import unplaceable
from infra.errors import ConfigError, UserError
from infra.storage import open_store
from workflows.driver.settings import RunSettings
from workflows.graph import Gang, StepContext
from workflows.graph.artifacts import ArtifactSource
from workflows.graph.steps import StepOptions, running, step, workflow
from workflows.launch import plan as planning

FOUR = [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 2.0}]


@pytest.mark.parametrize(
    ("bundles", "strategy", "why"),
    [
        ([{"CPU": 1}] * 8, "PACK", None),
        ([{"CPU": 1}] * 9, "SPREAD", "that is CPU=9 in all, and this cluster has CPU=8"),
        ([{"CPU": 3}] * 2, "SPREAD", None),
        ([{"CPU": 2.5}] * 3, "PACK", "this cluster's nodes can hold 2 such bundles"),
        ([{"CPU": 5}], "PACK", "no node has CPU=5 (the most on one node: CPU=4)"),
        ([{"CPU": 4, "GPU": 3}], "PACK", "no node has CPU=4, GPU=3 (the most on one node: GPU=2)"),
        ([{"CPU": 2}] * 2, "STRICT_PACK", None),
        ([{"CPU": 3}] * 2, "STRICT_PACK", "STRICT_PACK wants CPU=6 on one node, and none has that"),
        ([{"CPU": 1}] * 2, "STRICT_SPREAD", None),
        ([{"CPU": 1}] * 3, "STRICT_SPREAD", "STRICT_SPREAD wants 3 nodes, and 2 can hold such a bundle"),
        ([{"GPU": 1}] * 2, "STRICT_SPREAD", "STRICT_SPREAD wants 2 nodes, and 1 can hold such a bundle"),
        ([{"memory": 2**30}], "PACK", "no node has memory=1GiB"),
        ([{"CPU": 4}, {"GPU": 2}, {"CPU": 4}], "PACK", None),
    ],
)
def test_dynamic_what_can_never_be_placed_is_known(bundles: Any, strategy: str, why: str | None) -> None:
    found = unplaceable(bundles, strategy, FOUR)
    assert found == why or (why is not None and found is not None and found.startswith(why))


def test_dynamic_gangs_are_checked_where_they_are_written() -> None:
    assert str(StepOptions(num_cpus=2, gang=3).whole_gang()) == "3 x (CPU=2), PACK"
    mixed = StepOptions(num_cpus=1, gang=Gang([{"CPU": 1, "GPU": 1}, {"CPU": 4}], "SPREAD")).whole_gang()
    assert str(mixed) == "(CPU=1, GPU=1) + (CPU=4), SPREAD"
    for wrong, message in (
        (lambda: Gang([]), "gang.bundles: there must be at least one"),
        (lambda: Gang([{"CPU": 0}]), r"gang.bundles\[0\]: .* must ask for something"),
        (lambda: Gang([{"CPU": -1}]), r"gang.bundles\[0\]: CPU=-1: must not be negative"),
        (lambda: Gang([{"CPU": 1e-5}]), r"gang.bundles\[0\]: CPU=1e-05: Ray counts in steps of 0.0001"),
        (lambda: Gang([{"CPU": 1}, {"GPU": 1.5}]), r"gang.bundles\[1\]: GPU=1.5: .* whole number"),
        (lambda: StepOptions(gang=True), "gang=True: must be a Gang, a whole number, or None"),
        (lambda: Gang([{"CPU": 1}], "NEAR"), "gang.strategy='NEAR': use one of PACK, SPREAD"),
        (lambda: StepOptions(gang=0), "gang=0: must be at least 1"),
        (lambda: StepOptions(num_cpus=2, gang=Gang([{"CPU": 1}])), r"gang.bundles\[0\] has CPU=1, .* asks for CPU=2"),
        (lambda: StepOptions(num_cpus=0, num_gpus=1, gang=Gang([{"CPU": 1}])), r"gang.bundles\[0\] .* GPU=1"),
    ):
        with pytest.raises(ConfigError, match=message):
            wrong()


def train() -> None: ...


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": math.nan}, "timeout=nan: must be a finite number"),
        ({"timeout": -math.inf}, "timeout=-inf: must be a finite number"),
        ({"timeout": -1}, "timeout=-1: must be positive seconds, or None"),
        ({"timeout": 0}, "timeout=0: must be positive seconds, or None"),
        ({"timeout": True}, "timeout=True: must be a finite number"),
        ({"timeout": "60"}, "timeout='60': must be a finite number"),
        ({"num_cpus": 0.00001}, "num_cpus=1e-05: Ray counts in steps of 0.0001"),
        ({"num_cpus": math.nan}, "num_cpus=nan: must be a finite number"),
        ({"num_cpus": 10**400}, "num_cpus=1000"),
        ({"num_cpus": "2"}, "num_cpus='2': must be a finite number"),
        ({"num_gpus": 1.5}, "num_gpus=1.5: more than one GPU must be a whole number of them"),
        ({"num_gpus": -1}, "num_gpus=-1: must not be negative"),
        ({"retries": 1.5}, "retries=1.5: must be a whole number"),
        ({"retries": math.inf}, "retries=inf: must be a whole number"),
        ({"memory": "infGiB"}, "memory='infGiB' is not a size; write it as"),
        ({"memory": "-1GiB"}, "memory='-1GiB' is not a size; write it as"),
        ({"memory": 1.5}, "memory=1.5: must be a whole number"),
    ],
)
def test_dynamic_impossible_options_are_refused_where_the_step_is_defined(options: Any, message: str) -> None:
    for define in (lambda: step(**options)(train), lambda: step(train).options(**options)):
        with pytest.raises(ConfigError, match=f"^step train: {re.escape(message)}"):
            define()


@pytest.mark.parametrize("timeout", [None, math.inf, 1e10, 10**40])
def test_dynamic_an_endless_timeout_is_none(timeout: Any) -> None:
    assert StepOptions(timeout=timeout).timeout is None
    assert StepOptions(timeout=np.float32(2)).timeout == 2.0  # a number of another library travels as JSON


@step
def listed(count: int) -> list[int]:
    return list(range(count))


@step(gang=2)
def doubled(x: int, plus: int = 0) -> int:
    return 2 * x + plus


@step
def added(parts: list[int]) -> int:
    return sum(parts)


@workflow
def planned(count: int) -> Any:
    known = doubled.map([1, 2], plus=listed(1))
    later = doubled.map(listed(count))
    added(known)
    return added(later)


@workflow
def doubles() -> Any:
    return doubled.options(name="final")(1)


def test_dynamic_a_plan_shows_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from workflows.cli.tables import show_plan

    plan = planning.plan(planned, 3, settings=RunSettings(store=str(tmp_path)))
    assert [(call.call_id, call.status) for call in plan.calls] == [
        ("listed[0]", "would run"),
        ("doubled.map[0]", "2 calls"),
        ("doubled.map[0]/doubled[0]", "would run"),
        ("doubled.map[0]/doubled[1]", "would run"),
        ("listed[1]", "would run"),
        ("doubled.map[1]", "known at run time"),
        ("added[0]", "would run"),
        ("added[1]", "would run"),
    ]
    assert plan.calls[2].needs == ("listed[0]",) and plan.calls[5].needs == ("listed[1]",)
    assert plan.calls[6].needs == ("doubled.map[0]",) and plan.calls[2].gang == "2 x (CPU=1), PACK"
    assert not plan.warnings
    show_plan(plan)
    assert "gang of 2 x (CPU=1), PACK" in capsys.readouterr().out


def test_dynamic_a_step_to_rerun_that_is_never_called_is_named(tmp_path: Path) -> None:
    def warnings(*rerun: str) -> Any:
        return planning.plan(doubles, settings=RunSettings(store=str(tmp_path), rerun=rerun)).warnings

    assert not warnings("doubled", "doubled[final]")
    assert warnings("double", "doubled[0]", "doubled") == (
        "--rerun double: this run calls no step of that name",
        "--rerun doubled[0]: this run calls no step of that name",
    )


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"a": 1}, r"doubled.map: the items must be a list or the Future of one, not a dict; write list\(...\)"),
        ("text", "not a str"),
        (3, "not a int$"),
        ((x for x in [1]), r"not a generator; write list\(...\)"),
    ],
)
def test_dynamic_items_that_are_no_list_are_refused_at_once(tmp_path: Path, items: Any, message: str) -> None:
    @workflow
    def wrong() -> None:
        doubled.map(items)

    wrong.__dict__["name"] = "tests:wrong"
    with pytest.raises(UserError, match=message):
        planning.plan(wrong, settings=RunSettings(store=str(tmp_path), run_id="r"))
    with pytest.raises(UserError, match="outside a @workflow"):
        doubled.map([1])


class Forgetful:
    """A Runtime that keeps nothing, so that what is left is the graph layer's own."""

    run_id = "r"

    def call(self, call_id: str, *_: Any) -> object:
        return None

    def map(self, call_id: str, *_: Any) -> object:
        return None

    def result(self, call_id: str) -> int:
        return 1

    def done(self, call_id: str) -> bool:
        return True

    def on_end(self, hook: Any) -> None: ...


@workflow
def round_of_two(x: int) -> int:
    return doubled(x).result() + sum(doubled.map([x]).result() for _ in range(1))


def test_dynamic_the_graph_layer_keeps_nothing_of_a_loop() -> None:
    def rounds(count: int) -> None:
        for x in range(count):
            if doubled(x).result() > 0:
                round_of_two(x)
            else:
                added([x])

    with running(Forgetful()):  # type: ignore[arg-type]
        rounds(10)
        gc.collect()
        tracemalloc.start()
        rounds(100)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        rounds(1000)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    assert grown < 8 * 1000, f"{grown / 1000:.1f} bytes per round"


def test_dynamic_names_and_ordinals_never_meet() -> None:
    with running(Forgetful()):  # type: ignore[arg-type]
        doubled(1)
        with pytest.raises(UserError, match=r"two calls are named doubled\[0\]"):
            doubled.options(name="0")(1)
        doubled.options(name="1")(1)
        with pytest.raises(UserError, match=r"two calls are named doubled\[1\]"):
            doubled(1)
        assert doubled.options(name="x").map([1]).call_id == "doubled.map[x]"
        with pytest.raises(UserError, match=r"two calls are named doubled.map\[x\]"):
            doubled.options(name="x").map([1])


def context_of(tmp_path: Path, send: Callable[[dict[str, Any]], None] = print) -> StepContext:
    store, source = open_store(tmp_path), ArtifactSource(str(tmp_path), "")
    return StepContext(
        run_id="r",
        call_id="doubled[0]",
        attempt=1,
        attempt_id="a",
        scratch_path=tmp_path,
        store=store,
        source=source,
        send=send,
        on_file=print,
    )


def test_dynamic_a_body_without_a_gang_has_no_group(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    with pytest.raises(UserError, match=r"doubled\[0\] has no placement group: ask for one with @step\(gang=...\)"):
        context.placement_group()


def test_dynamic_progress_takes_numbers_of_other_libraries_and_refuses_what_is_none(tmp_path: Path) -> None:
    sent: list[Any] = []
    told = context_of(tmp_path, sent.append)
    told.progress(np.int64(10), np.int32(10), loss=np.float32(0.5), kl=math.nan)
    assert sent[-1]["done"] == sent[-1]["total"] == 10 and sent[-1]["metrics"]["loss"] == 0.5
    assert all(type(value) is float for value in [sent[-1]["done"], sent[-1]["total"], *sent[-1]["metrics"].values()])
    told._last_progress = 0.0
    told.progress(1, math.inf)
    assert (sent[-1]["done"], sent[-1]["total"]) == (1, None), "an endless total is an unknown one"
    for wrong, message in (
        ((math.inf,), "done=inf: must be finite"),
        ((math.nan, 3), "done=nan: must be finite"),
        ((None,), "done=None: must be one number"),
        ((1, "many"), "total='many': must be one number"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            told.progress(*wrong)
    with pytest.raises(UserError, match=r"^loss=None: must be one number$"):
        told.progress(1, 2, loss=None)  # type: ignore[arg-type]
