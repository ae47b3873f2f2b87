"""The state before steps that may have to be undone stays in memory until they have been judged."""

import errno
import math
import os
from pathlib import Path

import pytest
import torch

from actors.pretrain.loss_doubts import LossDoubts
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
        assert doubt_of([*NORMAL, *bad[:count]], 9 + count, SETTINGS) == Doubt(10, 9 + count, sure=count == len(bad))
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


def test_doubtful_steps_end_no_run_where_memory_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for what is always kept, and for no more: the state before them has to go."""
    milestones, pieces = Milestones(), [Piece.whole("w", torch.zeros(8))]
    snapshots = Snapshots(tmp_path, "run", 1, 0, 1, milestones=milestones)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in range(1, 9):
        snapshots.take(step, pieces, {})
        snapshots.settle()
        if step == 3:
            milestones.doubtful = 2
            monkeypatch.setattr(os, "posix_fallocate", full)
    snapshots.close()
    assert [name.step for name in sealed(tmp_path)] == [6, 7, 8]


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
    """By the losses that are kept with the state."""
    milestones = Milestones()
    doubts = LossDoubts(milestones, SETTINGS)
    doubts.begin([*NORMAL, math.nan], 111)
    assert milestones.doubtful == 110
    doubts.saw([*NORMAL, math.nan, 2.0], 112)
    assert milestones.doubtful == -1
    doubts.begin([], 0)
    assert milestones.doubtful == -1


def test_doubtful_steps_that_will_be_undone_stay_so_whatever_follows() -> None:
    """Ranks go on until the controller's word reaches them; a new one knows it from the losses; and it ends with the
    return to the state before."""
    milestones, losses = Milestones(), list(NORMAL)
    doubts = LossDoubts(milestones, SETTINGS)
    doubts.begin(losses, 110)
    for step, loss in enumerate((math.nan, math.nan, 2.0, 2.0), 111):
        losses.append(loss)
        doubts.saw(losses, step)
        assert milestones.doubtful == 110, step
    fresh = Milestones()
    LossDoubts(fresh, SETTINGS).begin(losses, 114)
    assert fresh.doubtful == 110
    doubts.begin(losses, 114)
    assert milestones.doubtful == 110
    doubts.begin(NORMAL, 110)
    assert milestones.doubtful == -1
