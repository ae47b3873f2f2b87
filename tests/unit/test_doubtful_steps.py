"""The state before steps that may have to be undone stays in memory until they have been judged."""

import math
from pathlib import Path

import pytest
import torch

from actors.doubts import Doubts
from cluster.config import ElasticSettings
from cluster.policies.rollback import Doubt, SavedState, doubt_of, judge_step
from cluster.policies.snapshot import SnapshotBook, choose
from engines.snapshots import ShardName, Snapshots, forget, sealed
from engines.snapshots.milestones import Milestones
from engines.snapshots.shard import Piece

NORMAL = [2.0 + 0.1 * (-1) ** step for step in range(10)]
SETTINGS = ElasticSettings(nonfinite_patience=2, spike_patience=3)


@pytest.mark.parametrize("bad", [[math.nan] * 2, [9.0] * 3], ids=["nan", "spike"])
def test_doubtful_is_what_training_may_go_back_to(bad: list[float]) -> None:
    """From the first bad step on, though more of them are waited for; and nothing after a good one."""
    assert doubt_of(NORMAL, 9, SETTINGS) is None and doubt_of([], -1, SETTINGS) is None
    for count in range(1, len(bad) + 1):
        assert doubt_of([*NORMAL, *bad[:count]], 9 + count, SETTINGS) == Doubt(10, sure=count == len(bad))
    found = judge_step([*NORMAL, *bad], 9 + len(bad), [SavedState(10), SavedState(12)], (), 0, SETTINGS)
    assert found.to_step == 10
    assert doubt_of([*NORMAL, bad[0], 2.0], 11, SETTINGS) is None


def test_doubtful_steps_leave_the_state_before_them_in_memory(tmp_path: Path) -> None:
    """However many follow; also through the next generation, and no longer than they are doubtful."""
    milestones, pieces = Milestones(), [Piece.whole("w", torch.zeros(8))]

    def take(generation: int, steps: range, doubtful_at: int) -> None:
        snapshots = Snapshots(tmp_path, "run", generation, 0, 1, milestones=milestones)
        for step in steps:
            snapshots.take(step, pieces, {})
            snapshots.settle()
            if step == doubtful_at:
                milestones.doubtful = step - 1
        snapshots.close()

    def left(generation: int) -> set[int]:
        return {name.step for name in sealed(tmp_path) if name.generation == generation}

    take(1, range(1, 21), doubtful_at=11)
    assert {9, 10, 19, 20} <= left(1) <= {9, 10, 18, 19, 20}
    take(2, range(20, 26), doubtful_at=0)
    forget(tmp_path, before=2, milestones=milestones, until=20)
    assert sealed(tmp_path)[0] == ShardName(1, 9, 0, 1) and left(1) == {9, 10}
    milestones.doubtful = -1
    forget(tmp_path, before=2, milestones=milestones, until=20)
    assert left(1) == set()


def test_doubtful_steps_and_untold_ones_leave_the_state_before_them_in_the_book() -> None:
    book = SnapshotBook()

    def hold(steps: range) -> None:
        for step in steps:
            book.held(step, 1, 1, {"a": [0]})

    book.doubtful = 10
    hold(range(1, 21))
    assert set(book.snapshots) == set(range(9, 21))
    restore, _ = choose(book, 10)
    assert restore is not None and (restore.step, restore.source) == (10, "memory")
    book.doubtful = 21
    hold(range(21, 23))
    assert set(book.snapshots) == {20, 21, 22}


def test_doubtful_steps_are_known_to_a_rank_that_comes_later() -> None:
    """By the losses in its order; what it computes again is not counted twice."""
    milestones = Milestones()
    Doubts(milestones, SETTINGS, [*NORMAL, math.nan], told=111, step=111)
    assert milestones.doubtful == 110
    doubts = Doubts(milestones, SETTINGS, [*NORMAL, math.nan, 2.0], told=112, step=111)
    assert milestones.doubtful == 110
    doubts.saw(110, {"loss": 2.0, "committed": True})
    assert milestones.doubtful == 110
    doubts.saw(111, {"loss": 2.0, "committed": True})
    assert milestones.doubtful == -1
    Doubts(milestones, SETTINGS, [2.0, math.nan], told=200, step=100)
    assert milestones.doubtful == -1, "all that it was told of will be computed again"


def test_doubtful_steps_that_will_be_undone_stay_so_whatever_follows() -> None:
    """Ranks go on until the controller's word reaches them."""
    milestones = Milestones()
    doubts = Doubts(milestones, SETTINGS, NORMAL, told=110, step=110)
    for step, committed in enumerate((False, False, True, True), 110):
        doubts.saw(step, {"loss": 2.0, "committed": committed})
        assert milestones.doubtful == 110, step
    Doubts(milestones, SETTINGS, [*NORMAL, math.nan, math.nan, 2.0], told=113, step=113, sent_to=110)
    assert milestones.doubtful == 110
