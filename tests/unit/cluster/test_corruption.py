"""Silent corruption found by digests and replays; with it the way to the controller's rollback."""

from collections import Counter

import pytest

from cluster.config import ElasticSettings
from cluster.core import messages as m
from cluster.core.state_machine import StateMachine
from cluster.policies.corruption import is_due, judge_digests, replica_to_check
from cluster.policies.rollback import SavedState, after_corruption
from cluster.policies.straggler import decide_straggler, slow_ranks

SETTINGS = ElasticSettings(verify_every=10)


@pytest.mark.parametrize(
    "groups, action, guilty, undecided",
    [
        ([{0: "x", 2: "x"}, {1: "y", 3: "y"}], "go-on", (), ()),
        ([{0: "x", 2: "z", 4: "x"}, {1: "y"}], "roll-back", (2,), ()),
        ([{0: "x", 2: "z"}], "arbitrate", (), (0, 2)),
        ([{0: "x", 2: "z"}, {1: "y", 3: "y", 5: "w"}], "roll-back", (5,), (0, 2)),
        ([{0: "x", 2: "z", 4: "q"}], "arbitrate", (), (0, 2, 4)),
        ([], "go-on", (), ()),
    ],
)
def test_the_minority_is_guilty_and_a_tie_needs_a_third(
    groups: list[dict[int, str]], action: str, guilty: tuple[int, ...], undecided: tuple[int, ...]
) -> None:
    verdict = judge_digests(20, groups)
    assert (verdict.decision.action, verdict.guilty, verdict.undecided) == (action, guilty, undecided)
    assert verdict.decision.key == "elastic.verify_every" and "20" in verdict.decision.reason


def test_every_replica_is_checked_in_its_turn_the_same_for_everyone() -> None:
    checked = [replica_to_check(step, 6) for step in range(10, 3000, 10)]
    assert checked == [replica_to_check(step, 6) for step in range(10, 3000, 10)]
    assert set(Counter(checked)) == set(range(6))
    assert replica_to_check(10, 1) is None
    assert [step for step in range(25) if is_due(step, SETTINGS)] == [10, 20]


def test_a_wrong_rank_is_found_by_replay_and_a_third_and_the_run_goes_back_to_verified_state_without_it() -> None:
    """Rank 2 of four computes wrongly; shards are all different, so only a replay can tell."""
    elastic = ElasticSettings(min_workers=1, max_workers=4, spares=0)
    core = StateMachine(elastic)
    core.handle(m.Tick(), 0)
    workers = [f"w{rank}" for rank in range(4)]
    core.handle(m.WorkersReady({worker: f"n{worker}" for worker in workers}), 1)
    core.handle(m.Joined(1, workers), 2)
    core.handle(m.SnapshotFlushed(1, 50), 50)
    core.handle(m.Progress(1, 100, 1.0), 100)
    answers = {rank: "wrong" if rank == 2 else "right" for rank in range(4)}
    pair = {rank: answers[rank] for rank in (2, 0)}
    first = judge_digests(100, [pair])
    assert first.undecided == (0, 2)
    second = judge_digests(100, [pair | {1: answers[1]}])
    assert second.guilty == (2,)
    rolled = after_corruption(100, second.guilty, [SavedState(50), SavedState(99, verified=False)], 0, elastic)
    assert rolled.decision.action == "roll-back" and rolled.to_step == 50 and rolled.skip is None
    guilty = [workers[rank] for rank in second.guilty]
    commands = core.handle(m.RollBack(1, rolled.to_step, rolled.decision, guilty), 101)
    assert any(isinstance(command, m.Kill) and command.workers == {"w2"} for command in commands)
    commands = core.handle(m.AbortAcked(1, [worker for worker in workers if worker != "w2"]), 102)
    (join,) = [command for command in commands if isinstance(command, m.Join)]
    assert join.restore.step == 50 and "w2" not in join.ranks() and "nw2" in core.roster.unfit


def test_a_rank_that_waits_is_no_straggler_however_long_its_step_takes() -> None:
    """Total step times are equal in a synchronous group: only phases without waiting tell. Rank 1 computes 1.6 s, the
    others 1.0 s and wait 0.6 s for it."""
    phases = {rank: [(1.6, 0.0) if rank == 1 else (1.0, 0.6)] * 16 for rank in range(4)}
    totals = {rank: [sum(step) for step in steps] for rank, steps in phases.items()}
    computing = {rank: [compute for compute, _ in steps] for rank, steps in phases.items()}
    assert slow_ranks(totals, {}, SETTINGS) == ()
    (slow,) = slow_ranks(computing, {1: 2}, SETTINGS)
    assert slow.rank == 1 and slow.ratio == pytest.approx(1.6) and slow.windows == 3
    assert decide_straggler(slow, 4, True, SETTINGS).action == "evict"
    one_slow_step = {rank: [5.0 if step == rank else 1.0 for step in range(16)] for rank in range(4)}
    assert slow_ranks(one_slow_step, {}, SETTINGS) == ()
