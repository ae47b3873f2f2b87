"""Slow ranks: what counts as a rank's own computing, and what follows from windows of it."""

import threading
import time

from cluster.config import ElasticSettings
from cluster.core import messages as m
from cluster.core.state_machine import StateMachine
from cluster.goodput.own_time import OwnTime
from cluster.guard.stragglers import Straggler, StragglerWatch
from tests.helpers.guarded_group import running

SETTINGS = ElasticSettings(max_workers=4, spares=1, straggler_window=4, straggler_evict_after=2)


def window(watch: StragglerWatch, core: StateMachine, first: int, own: list[float]) -> list[Straggler]:
    """Four steps from `first` on, in which rank r computes own[r] seconds each."""
    for step in range(first, first + 5):
        for rank, seconds in enumerate(own):
            watch.saw(rank, step, step * seconds)
    return list(watch.judge(core))


def test_guard_slow_rank_is_reported_once_and_then_evicted_with_its_node() -> None:
    core = running(SETTINGS, ["a", "b", "c", "d", "e"])
    watch = StragglerWatch(SETTINGS)
    watch.begin()
    assert window(watch, core, 0, [0.1, 0.1, 0.11, 0.1]) == []
    (found,) = window(watch, core, 10, [0.1, 0.1, 0.2, 0.1])
    assert (found.worker, found.decision.action) == ("w2", "report") and found.slow.ratio > 1.9
    (found,) = window(watch, core, 20, [0.1, 0.1, 0.2, 0.1])
    assert (found.decision.action, found.unfit) == ("evict", True)
    assert found.decision.key == "elastic.straggler_evict_after"
    commands = core.handle(m.Evict([found.worker], found.decision, found.unfit), 3)
    assert any(isinstance(command, m.StopAtBoundary) for command in commands) and "c" in core.roster.unfit
    assert window(watch, core, 30, [0.1, 0.1, 0.2, 0.1]) == [], "it leaves already"


def test_guard_slow_rank_stays_where_nothing_takes_its_place() -> None:
    core = running(SETTINGS.model_copy(update={"spares": 0, "min_workers": 4}), ["a", "b", "c", "d"])
    watch = StragglerWatch(core.settings)
    watch.begin()
    found = [one for first in range(0, 60, 10) for one in window(watch, core, first, [0.1, 0.1, 0.9, 0.1])]
    assert [(one.decision.action, one.decision.key) for one in found] == [
        ("report", "elastic.straggler_evict_after"),
        ("report", "elastic.spares"),
    ], "each is said once"


def test_guard_losing_a_block_must_be_worth_it() -> None:
    """Three ranks instead of four take 4/3 as long: a rank that is slower than that may go without a spare."""
    for ratio, action in ((1.3, "report"), (1.5, "evict")):
        core = running(SETTINGS.model_copy(update={"spares": 0}), ["a", "b", "c", "d"])
        watch = StragglerWatch(core.settings)
        watch.begin()
        found = [one for first in (0, 10) for one in window(watch, core, first, [0.1, 0.1, 0.1 * ratio, 0.1])]
        assert found[-1].decision.action == action


def test_guard_on_one_node_only_the_process_goes() -> None:
    core = running(SETTINGS, ["a"] * 5)
    watch = StragglerWatch(core.settings)
    watch.begin()
    found = [one for first in (0, 10) for one in window(watch, core, first, [0.1, 0.3, 0.1, 0.1])]
    assert (found[-1].decision.action, found[-1].unfit) == ("evict", False)


def test_guard_stages_of_a_pipeline_are_compared_with_their_like() -> None:
    settings = ElasticSettings(max_workers=6, min_workers=2, pipeline_parallel=2, spares=0, straggler_window=4)
    core = running(settings, ["a", "b", "c", "d", "e", "f"])
    watch = StragglerWatch(settings)
    watch.begin()
    assert window(watch, core, 0, [0.1, 0.3] * 3) == [], "the second stage is larger, not slower"
    (found,) = window(watch, core, 10, [0.1, 0.3, 0.1, 0.3, 0.2, 0.3])
    assert found.worker == core.blocks[2][0]


def test_guard_a_beat_that_tells_of_many_steps_counts_as_so_many() -> None:
    core = running(SETTINGS, ["a", "b", "c", "d", "e"])
    watch = StragglerWatch(SETTINGS)
    watch.begin()
    for rank in range(4):
        watch.saw(rank, 0, 0.0)
        watch.saw(rank, 100, 30.0 if rank == 3 else 10.0)
    (found,) = watch.judge(core)
    assert found.worker == "w3"


def test_guard_own_time_is_what_a_rank_computes_and_fetches_not_what_it_waits_for() -> None:
    own = OwnTime()
    own.begin()
    end = time.thread_time() + 0.05
    while time.thread_time() < end:
        pass
    own.fetched()
    before = own.end()
    threading.Event().wait(0.3)
    assert before >= 0.05 and own.end() - before < 0.2, "waiting for others does not count"
    own.begin()
    threading.Event().wait(0.1)
    own.fetched()
    assert own.end() > 0.05, "waiting for data does"
    gpu = OwnTime(beside=True)
    gpu.begin()
    threading.Event().wait(0.1)
    assert gpu.end(waited_s=0.04) >= 0.06, "a GPU computes while its thread sleeps"
