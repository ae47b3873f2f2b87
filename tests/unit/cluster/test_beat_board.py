"""The board of beats: silence, progress, stopped processes, hangs judged by the run's own step time."""

import pytest

from cluster.config import ElasticSettings
from cluster.core.beat_board import BeatBoard
from cluster.policies.hang import RankProgress


@pytest.fixture
def board() -> BeatBoard:
    made = BeatBoard(ElasticSettings(hang_factor=5, hang_floor_s=2, node_timeout_s=2.5, pulse_timeout_s=1))
    made.begin(1, 0.0)
    return made


def beacon(rank: int, step: int, now: float, phase: str = "collective", collectives: int = 0) -> RankProgress:
    return RankProgress(rank, step, phase, collectives, now, now)


def test_a_silent_node_is_named_once_until_it_beats_again(board: BeatBoard) -> None:
    board.beat("n0", 1, [], 0.0)
    board.beat("n1", 1, [], 2.0)
    assert board.silent_nodes(2.5) == [] and board.silent_nodes(2.6) == ["n0"]
    assert board.silent_nodes(2.7) == []
    board.beat("n0", 1, [], 3.0)
    assert board.silent_nodes(6.0) == ["n1", "n0"]


def test_step_times_come_from_progress_and_skipped_beats_are_averaged(board: BeatBoard) -> None:
    for now, step in ((1.0, 0), (2.0, 1), (3.0, 2), (7.0, 4)):
        board.beat("n0", 1, [beacon(0, step, now)], now)
    assert list(board.step_times) == [1.0, 1.0, 2.0] and board.step_s == 1.0


def test_a_hang_is_five_of_the_run_s_own_steps_without_a_step_or_a_collective(board: BeatBoard) -> None:
    for step in range(4):
        board.beat("n0", 1, [beacon(0, step, step, collectives=step), beacon(1, step, step, collectives=step)], step)
    stuck = [beacon(0, 3, 3.0, collectives=4), beacon(1, 3, 3.0, "compute", 3)]
    board.beat("n0", 1, stuck, 4.0)
    assert board.judge(8.9)[0].action == "wait"
    board.beat("n0", 1, [RankProgress(b.rank, b.step, b.phase, b.collectives, b.entered_at, 9.2) for b in stuck], 9.2)
    decision, suspects = board.judge(9.2)
    assert decision.action == "hang" and decision.key == "elastic.hang_factor"
    assert suspects is not None and suspects.ranks == (1,) and "busy" in suspects.sign


def test_a_stopped_process_is_seen_at_once_and_beacons_of_another_generation_are_not(board: BeatBoard) -> None:
    old = RankProgress(2, 5, "compute", 1, 0.0, 0.0)
    assert board.beat("n0", 1, [old, beacon(3, 5, 1.5)], 1.5) == (2,)
    assert board.beat("n0", 0, [old], 1.6) == ()
    board.begin(2, 2.0)
    assert board.ranks == {} and board.newest_step == -1
