"""What the recovery benchmark says of a run, on made-up times; and that it kills whom it means to."""

import signal
import subprocess
import sys
import time

import pytest

from bench.recovery.course import QUIET_STEPS, Course, Kill, Step
from bench.recovery.job import RANKS


def test_peers_a_gap_is_beyond_the_usual_step_and_growing_back_is_told_apart() -> None:
    course = Course(1)
    whole = [Step(float(number), number, RANKS) for number in range(10)]  # one a second, the last at 9 s
    smaller = [Step(12.5, 10, RANKS - 1), Step(14.0, 11, RANKS - 1)]  # 3.5 s, then slower by half
    again = [Step(17.0, 12, RANKS), Step(18.0, 13, RANKS)]  # growing back takes 3 s
    course.steps, course.kills = [*whole, *smaller, *again], [Kill(9.6, 2)]
    assert course.usual_s() == pytest.approx(1.0)
    (outcome,) = course.outcomes()
    assert outcome["rank"] == 2 and outcome["gap_s"] == pytest.approx(2.5)
    assert outcome["gaps_s"] == pytest.approx(2.5 + 2.0)
    assert outcome["back_s"] == pytest.approx(17.0 - 9.6) and outcome["steps_meanwhile"] == 2


def test_peers_each_kill_has_its_own_gap() -> None:
    course = Course(2)
    times = [0.0, 1.0, 2.0, 5.0, 6.0, 7.0, 12.0, 13.0]  # all started anew, after 3 s and after 5 s
    course.steps = [Step(at, number, RANKS) for number, at in enumerate(times)]
    course.kills = [Kill(2.6, 0), Kill(7.6, 1)]
    assert [outcome["gap_s"] for outcome in course.outcomes()] == [pytest.approx(2.0), pytest.approx(4.0)]
    assert [outcome["steps_meanwhile"] for outcome in course.outcomes()] == [0, 0]


def test_peers_a_step_that_is_computed_again_is_no_progress() -> None:
    course = Course(1)
    for number, at in ((1, 1.0), (2, 2.0), (2, 9.0), (1, 9.5), (3, 10.0)):
        course.step(number, at, {}, ranks=RANKS)
    assert [step.time for step in course.steps] == [1.0, 2.0, 10.0]


def test_peers_the_next_rank_is_killed_once_the_whole_group_has_trained_for_a_while() -> None:
    children = [subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) for _ in range(2)]
    try:
        course, pids = Course(2), {rank: child.pid for rank, child in enumerate(children)}
        start = time.time() - 1000
        for number in range(QUIET_STEPS):
            course.step(number, start + number, pids, ranks=RANKS)
        course.step(QUIET_STEPS, start + QUIET_STEPS, pids, ranks=RANKS - 1)  # smaller: begin again
        for number in range(QUIET_STEPS + 1, 2 * QUIET_STEPS + 2):
            assert not course.kills
            course.step(number, start + number, pids, ranks=RANKS)
        assert children[0].wait(timeout=60) == -signal.SIGKILL and children[1].poll() is None
        deadline = time.monotonic() + 60
        while not course.kills and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [kill.rank for kill in course.kills] == [0]
        for number in range(2 * QUIET_STEPS + 2, 3 * QUIET_STEPS + 3):
            course.step(number, start + number, pids, ranks=RANKS, ready=number != 2 * QUIET_STEPS + 2)
        assert children[1].poll() is None, "no spare yet"
        course.step(3 * QUIET_STEPS + 3, start + 3 * QUIET_STEPS + 3, pids, ranks=RANKS)
        assert children[1].wait(timeout=60) == -signal.SIGKILL
    finally:
        for child in children:
            child.kill()
            child.wait()
