"""Policies of elastic training: each decision by hand, and every key that a decision names is a setting."""

import math
import re
from pathlib import Path

import pytest

from cluster.config import ElasticSettings
from cluster.policies.drain import DrainView, decide_drain, leave_by
from cluster.policies.failure import AdoptionView, FailureView, decide_adoption, decide_failure
from cluster.policies.hang import Joining, RankProgress, decide_hang, decide_join, stall_limit_s, suspects
from cluster.policies.layout import mend
from cluster.policies.network import aside_s, stand_aside
from cluster.policies.quarantine import BurnIn, decide_burn_in, decide_history, decide_prediction
from cluster.policies.rollback import (
    DataWindow,
    SavedState,
    after_corruption,
    batch_of,
    judge_step,
    leave_out,
    spike_score,
)
from cluster.policies.scaling import GrowthView, decide_growth, workers_to_order
from cluster.policies.snapshot import SnapshotBook, choose, place_replicas
from cluster.policies.straggler import SlowRank, decide_straggler, slow_ranks
from infra.config import validate
from infra.errors import ConfigError

FOUR_TP2 = ElasticSettings(min_workers=4, max_workers=8, tensor_parallel=2)
NODES = {f"w{i}": f"n{i // 2}" for i in range(12)}
BLOCKS = (("w0", "w1"), ("w2", "w3"), ("w4", "w5"), ("w6", "w7"))


def test_every_key_that_a_decision_names_is_a_setting(repository: Path) -> None:
    text = "".join(path.read_text() for path in (repository / "cluster").rglob("*.py"))
    named = set(re.findall(r'key\("(\w+)"\)', text)) | set(re.findall(r"elastic\.(\w+)", text))
    assert (
        {"min_workers", "spares", "growth_must_pay", "snapshot_replicas"} <= named <= set(ElasticSettings.model_fields)
    )


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"min_workers": 3, "max_workers": 4, "tensor_parallel": 2}, "min_workers 3 must be a multiple of .* = 2"),
        ({"min_workers": 4, "max_workers": 2}, "min_workers 4 exceeds max_workers 2"),
        ({"min_worker": 1}, "did you mean min_workers"),
    ],
)
def test_settings_that_cannot_work_are_refused(given: dict[str, int], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        validate(given, ElasticSettings)


@pytest.mark.parametrize(
    ("lost", "damaged", "after", "faults", "restore", "action", "name"),
    [
        (1, 1, 4, 1, "memory", "replace", "spares"),
        (1, 1, 3, 1, "memory", "shrink", "min_workers"),
        (3, 2, 2, 1, "memory", "shrink", "min_workers"),
        (5, 3, 1, 1, "memory", "wait", "min_workers"),
        (8, 4, 0, 1, "storage", "wait", "min_workers"),
        (8, 4, 4, 1, "storage", "replace", "spares"),
        (8, 4, 4, 1, "nowhere", "fail", "snapshot_replicas"),
        (1, 1, 4, 9, "memory", "fail", "max_faults_without_progress"),
    ],
)
def test_failure_by_extent(
    lost: int, damaged: int, after: int, faults: int, restore: str, action: str, name: str
) -> None:
    decision = decide_failure(FailureView("n1 died", lost, damaged, 4, after, faults, restore), FOUR_TP2)
    assert (decision.action, decision.key) == (action, f"elastic.{name}")
    assert "n1 died" in decision.reason


def test_a_restarted_controller_adopts_only_a_whole_group() -> None:
    assert decide_adoption(AdoptionView(7, 8, 8, 0), FOUR_TP2).action == "adopt"
    assert decide_adoption(AdoptionView(7, 8, 7, 0), FOUR_TP2).action == "re-form"
    assert decide_adoption(AdoptionView(7, 8, 8, 1), FOUR_TP2).action == "re-form"
    assert decide_adoption(AdoptionView(0, 0, 0, 0), FOUR_TP2).action == "start"


def test_a_hole_is_filled_in_place_and_the_others_keep_theirs() -> None:
    assert mend(BLOCKS, {"w3"}, {"w8"}, NODES, 2, 4) == (("w0", "w1"), ("w2", "w8"), ("w4", "w5"), ("w6", "w7"))


def test_without_a_spare_two_half_blocks_make_one_and_the_rest_waits() -> None:
    assert mend(BLOCKS, {"w0", "w3"}, set(), NODES, 2, 4) == (("w2", "w1"), ("w4", "w5"), ("w6", "w7"))
    assert mend(BLOCKS, {"w0", "w3", "w4"}, set(), NODES, 2, 4) == (("w2", "w1"), ("w6", "w7"))


def test_the_spare_goes_to_the_block_with_the_fewest_holes() -> None:
    blocks = (("w0", "w1", "w2", "w3"), ("w4", "w5", "w6", "w7"))
    assert mend(blocks, {"w0", "w1", "w7"}, {"w8"}, NODES, 4, 2) == (("w4", "w5", "w6", "w8"),)


def test_a_new_block_spans_few_nodes() -> None:
    pool = {"w1", "w4", "w5", "w7"}
    assert mend((), set(), pool, NODES, 2, 1) == (("w4", "w5"),)


def test_orders_cover_group_and_spares() -> None:
    settings = ElasticSettings(max_workers=8, spares=2)
    assert [workers_to_order(a, b, settings) for a, b in ((0, 0), (7, 2), (8, 2), (11, 0))] == [10, 1, 0, 0]


@pytest.mark.parametrize(
    ("view", "action", "name"),
    [
        (GrowthView(3, 4, 0.5, 3600), "grow", "max_workers"),
        (GrowthView(4, 4, 0.5, 3600), "keep", "max_workers"),
        (GrowthView(127, 128, 40, 5000), "keep", "growth_must_pay"),  # 1 x 5000 s gained, 127 x 40 s paid
        (GrowthView(127, 128, 40, 5100), "grow", "max_workers"),
    ],
)
def test_growth_must_pay(view: GrowthView, action: str, name: str) -> None:
    decision = decide_growth(view, ElasticSettings(max_workers=256))
    assert (decision.action, decision.key) == (action, f"elastic.{name}")


def beacon(rank: int, phase: str = "collective", collectives: int = 10, pulse_at: float = 100.0) -> RankProgress:
    return RankProgress(rank, 5, phase, collectives, 90.0, pulse_at)


@pytest.mark.parametrize(
    ("beacons", "ranks", "sign"),
    [
        ([beacon(0), beacon(1, pulse_at=98.0), beacon(2, "compute")], (1,), "pulse stands still"),
        ([beacon(0), beacon(1), beacon(2, "compute", 9)], (2,), "busy while the others wait"),
        ([beacon(0), beacon(1, collectives=9), beacon(2)], (1,), "behind in collectives"),
        ([beacon(0), beacon(1)], (), "all wait in the same collective"),
    ],
)
def test_suspects_of_a_hang(beacons: list[RankProgress], ranks: tuple[int, ...], sign: str) -> None:
    found = suspects(beacons, 100.5, ElasticSettings())
    assert (found.ranks, found.sign) == (ranks, sign)


JOINED = Joining(9, math.inf, "collective", 99)


@pytest.mark.parametrize(
    ("ranks", "blamed", "sign"),
    [
        ([Joining(0, 7, "wait", 11), Joining(1, 6, "load", 11)], (1,), "busy"),
        ([Joining(0, 7, "wait", 11), Joining(1, 6, "load", 9)], (), ""),  # it gets on, piece by piece
        ([Joining(0, 7, "wait", 11), Joining(1, 6, "fetch", 50)], (), ""),  # a slow store
        ([Joining(0, 1, "form", 11), Joining(1, 0, "join", 11), Joining(2, 1, "form", 11)], (1,), "busy"),
        ([Joining(0, 2, "form", 11), Joining(1, 2, "form", 11)], (), ""),  # nobody can tell which of them
        ([Joining(0, 4, "build", 1), Joining(1, 3, "form", 11), Joining(2, 5, "load"), JOINED], (1,), "has not left"),
        ([Joining(0, 3, "form", 11), Joining(1, 3, "form", 11), JOINED], (), ""),  # one of them waits for the other
        ([Joining(0, 3, "form", 11), Joining(1, 2, "build", 5), JOINED], (), ""),  # it waits for one that gets on
        ([Joining(0, 6, "load", 11), Joining(1, 6, "load", 11)], (), ""),  # nobody waits
        ([Joining(0, 6, "load", 11), Joining(1, 6, "load", 11), JOINED], (), ""),  # most of them: not their fault
        ([Joining(0, 6, "load", 11), Joining(1, 6, "build", 11), JOINED, JOINED], (0, 1), "busy"),
        ([Joining(0, 1, "form", 11), Joining(1, -1)], (), ""),  # it has not heard the order yet
        ([Joining(0, 6, "load", 99)], (), ""),
        ([], (), ""),
    ],
)  # fmt: skip
def test_who_hangs_on_the_way_into_a_generation(ranks: list[Joining], blamed: tuple[int, ...], sign: str) -> None:
    decision, found = decide_join(ranks, ElasticSettings(join_stall_s=10))
    assert found.ranks == blamed and found.sign.startswith(sign)
    assert (decision.action, decision.key) == ("hang" if blamed else "wait", "elastic.join_stall_s")


def test_a_hang_is_measured_in_the_runs_own_steps() -> None:
    settings = ElasticSettings(hang_factor=5, hang_floor_s=2, first_step_grace_s=120)
    assert [stall_limit_s(times, settings) for times in ([], [0.1], [1, 3, 2])] == [120, 2, 10]
    assert decide_hang(11, [2], settings).action == "hang"
    assert decide_hang(11, [], settings).action == "wait"
    assert [decide_hang(1, t, settings).key.split(".")[1] for t in ([], [0.1], [2])] == [
        "first_step_grace_s",
        "hang_floor_s",
        "hang_factor",
    ]


def test_a_slow_rank_is_found_by_computing_time_then_reported_then_evicted() -> None:
    settings = ElasticSettings(straggler_window=4, straggler_ratio=1.25, straggler_evict_after=2)
    times = {0: [1.0, 1.0, 9.0, 1.0], 1: [1.0] * 4, 2: [1.5] * 4, 3: [1.0]}
    assert slow_ranks(times, {2: 1}, settings) == (SlowRank(2, 1.5, 2),)
    assert decide_straggler(SlowRank(2, 1.5, 1), 4, True, settings).action == "report"
    assert decide_straggler(SlowRank(2, 1.5, 2), 4, True, settings).action == "evict"
    assert decide_straggler(SlowRank(2, 1.5, 2), 4, False, settings).key == "elastic.spares"


NORMAL = [2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0]


def test_spikes_are_scored_robustly() -> None:
    """Median 2.0, median deviation 0.1: 2.74 is 5 robust sigmas; one wild outlier in the past changes nothing."""
    assert spike_score([*NORMAL, 2.0 + 5 * 0.14826], 64) == pytest.approx(5)
    assert spike_score([1e9, *NORMAL, 2.0 + 5 * 0.14826], 64) == pytest.approx(5, rel=0.01)
    assert spike_score([2.0, 90.0], 64) == 0
    assert spike_score([2.0] * 20 + [2.001], 64) < 1


def test_one_nan_is_skipped_two_roll_back_and_leave_their_batches_out() -> None:
    settings, saved = ElasticSettings(nonfinite_patience=2), [SavedState(8), SavedState(10), SavedState(12)]
    assert judge_step([*NORMAL, math.nan], 10, saved, (), 0, settings).decision.action == "skip-update"
    found = judge_step([*NORMAL, math.nan, math.nan], 11, saved, (), 0, settings)
    assert (found.decision.action, found.to_step, found.skip) == ("roll-back", 10, DataWindow(10, 11))
    later = judge_step([*NORMAL, math.nan, math.nan], 11, [SavedState(8)], (DataWindow(3, 4),), 1, settings)
    assert (later.to_step, later.skip) == (8, DataWindow(12, 13))  # steps 8 and 9 take their own batches again


def test_a_lasting_spike_rolls_back_to_before_it_and_a_short_one_passes() -> None:
    settings, saved = ElasticSettings(spike_patience=3), [SavedState(9), SavedState(11)]
    assert judge_step([*NORMAL, 9.0, 9.0], 11, saved, (), 0, settings).decision.action == "go-on"
    found = judge_step([*NORMAL, 9.0, 9.0, 9.0], 12, saved, (), 0, settings)
    assert (found.decision.key, found.to_step, found.skip) == ("elastic.spike_patience", 9, DataWindow(10, 12))
    assert judge_step([*NORMAL, 9.0, 9.0, 9.0], 12, saved, (), 10, settings).decision.key == "elastic.max_rollbacks"
    assert judge_step([*NORMAL, 9.0, 9.0, 9.0], 12, [SavedState(11)], (), 0, settings).decision.action == "fail"


def test_corruption_goes_back_to_a_verified_state_and_drops_no_data() -> None:
    saved = [SavedState(6), SavedState(8, verified=False)]
    found = after_corruption(8, (3,), saved, 0, ElasticSettings())
    assert (found.decision.action, found.to_step, found.skip) == ("roll-back", 6, None)


def test_batches_left_out_are_exactly_the_windows() -> None:
    skipped = leave_out(leave_out((), DataWindow(5, 6)), DataWindow(2, 2))
    assert [batch_of(step, skipped) for step in range(6)] == [0, 1, 3, 4, 7, 8]
    assert leave_out(skipped, DataWindow(4, 8)) == (DataWindow(2, 2), DataWindow(4, 8))


@pytest.mark.parametrize(
    ("now", "covered", "action"),
    [(0, True, "leave-at-boundary"), (0, False, "hold"), (114, False, "leave-at-boundary"), (117, False, "leave-now")],
)
def test_drain_leaves_as_late_as_is_safe(now: float, covered: bool, action: str) -> None:
    view = DrainView("n1", now, deadline=120, step_s=2, pause_s=0.5, covered=covered)
    settings = ElasticSettings(drain_margin_s=1.5)
    assert leave_by(view, settings) == 114
    assert decide_drain(view, settings).action == action


def test_burn_in_verdicts() -> None:
    fleet = [BurnIn(f"n{i}", True, True, 100.0, {"peer": 10.0}) for i in range(3)]
    verdicts = {
        decide_burn_in(result, fleet, ElasticSettings()).action
        + " "
        + decide_burn_in(result, fleet, ElasticSettings()).key
        for result in (
            BurnIn("ok", True, True, 80.0, {"peer": 9.0}),
            BurnIn("wrong", False, True, 100.0, {}),
            BurnIn("slow", True, True, 60.0, {}),
            BurnIn("cut off", True, True, 100.0, {"peer": 4.0}),
        )
    }
    assert verdicts == {
        "accept elastic.burn_in_speed_ratio",
        "quarantine none",
        "quarantine elastic.burn_in_speed_ratio",
        "quarantine elastic.burn_in_bandwidth_ratio",
    }


def test_repeated_faults_and_predictions_take_a_node_out() -> None:
    settings = ElasticSettings(quarantine_faults=2, quarantine_window_s=100, predicted_risk=0.5)
    assert decide_history("n1", [0, 950], 1000, settings).action == "accept"
    assert decide_history("n1", [910, 950], 1000, settings).action == "quarantine"
    assert decide_prediction("n1", 0.6, "ECC errors rise", settings).action == "drain"
    assert decide_prediction("n1", 0.4, "", settings).action == "watch"


def ring(nodes: int) -> dict[str, set[int]]:
    """Each node holds its own shard and its neighbour's."""
    return {f"n{i}": {i, (i + 1) % nodes} for i in range(nodes)}


def test_the_newest_snapshot_whose_shards_all_survive() -> None:
    book = SnapshotBook()
    assert choose(book)[0] is None
    for step in (4, 5, 6):
        book.held(step, 4, 1, ring(4))
    assert sorted(book.snapshots) == [5, 6], "k and k-1 are kept"
    book.held(7, 4, 1, {"n0": {0, 1}, "n1": {1, 2}})
    restore, decision = choose(book)
    assert restore is not None and (restore.step, restore.source) == (6, "memory")
    assert decision.reason == "snapshot 7 lacks 1 of 4 shards, snapshot 6 is whole"
    book.drop_nodes(["n1"])
    assert choose(book)[0] == restore, "one node of a ring may go"
    book.drop_nodes(["n2"])
    assert choose(book)[0] is None, "shard 2 had its copies on n1 and n2"


def test_storage_is_the_last_resort_and_may_fill_in() -> None:
    book = SnapshotBook()
    book.flushed |= {3}
    book.held(5, 4, 1, ring(4))
    book.drop_nodes(["n0", "n3"])
    restore, _ = choose(book)
    assert restore is not None and (restore.step, restore.source) == (3, "storage")
    book.flushed |= {5}
    restore, _ = choose(book)
    assert restore is not None and (restore.step, restore.source) == (5, "memory")


def test_a_discarded_future_does_not_count() -> None:
    book = SnapshotBook()
    for step in (5, 6):
        book.held(step, 4, 1, ring(4))
    before = choose(book, newest_trusted=5)[0]
    book.truncate(5)
    assert choose(book)[0] == before and before is not None and before.step == 5
    book.held(6, 3, 2, ring(3))
    book.held(6, 4, 1, ring(4))
    assert book.snapshots[6].world_size == 3, "a late word of the older generation is ignored"


def test_copies_lie_on_other_nodes_evenly() -> None:
    nodes = ["a", "a", "b", "b", "c", "c"]
    assert place_replicas(nodes, 1) == {"a": {0, 1, 4, 5}, "b": {0, 1, 2, 3}, "c": {2, 3, 4, 5}}
    assert place_replicas(["a", "b"], 3) == {"a": {0, 1}, "b": {0, 1}}
    assert place_replicas(["a", "a"], 1) == {"a": {0, 1}}


@pytest.mark.parametrize(
    ("ways", "out"),
    [
        ([("b", "a"), ("c", "b")], ("b",)),
        ([("a", "b")], ("b",)),
        ([("b", "a"), ("a", "b")], ("b",)),
        ([("a", "b"), ("a", "c")], ("a",)),
        ([("a", "b"), ("c", "d")], ("d", "b")),
        ([("b", "b")], ("b",)),
        ([("a", "a"), ("c", "c"), ("b", "c")], ("c", "a")),
        ([], ()),
    ],
)
def test_without_the_nodes_left_out_all_others_reach_each_other(
    ways: list[tuple[str, str]], out: tuple[str, ...]
) -> None:
    assert stand_aside(ways, "abcd") == out


def test_who_stands_aside_is_tried_again_ever_more_seldom() -> None:
    waits = [aside_s(times, ElasticSettings()) for times in (1, 2, 3, 9, 1000)]
    assert waits == [10, 20, 40, 1800, 1800]
