"""A fixed selection of the elastic campaign: `make chaos` draws further seeds."""

from collections import Counter
from pathlib import Path

import pytest

from infra.fault_injection import FaultSchedule
from tests.chaos.elastic_campaign import campaign, summary
from tests.chaos.elastic_schedule import CELLS, HANDS, VALUES, VARIANTS, Fault, Schedule

SELECTED = (
    Fault("kill", "compute", 5, 1, "compute"),
    Fault("spin", "data", 22, 3, "data"),
    Fault("driver", "compute", 30, 2, "compute"),
    Fault("node", "snapshot", 40, 2, "snapshot"),
    Fault("flip", "recovery", 2, 3, "load"),
    Fault("lock", "recovery", 3, 1, "load"),
)


def test_elastic_seeds_reach_every_kind_in_every_phase() -> None:
    """Equally often, and no two faults of a run at one point."""
    decks = 40
    schedules = [Schedule.of(seed) for seed in range(decks * HANDS)]
    drawn = Counter((fault.kind, fault.phase) for schedule in schedules for fault in schedule.faults)
    assert drawn == dict.fromkeys(CELLS, decks)
    assert [Schedule.of(seed) for seed in range(decks * HANDS)] == schedules
    for schedule in schedules:
        points = {point for point, _ in FaultSchedule.parse(schedule.text).actions}
        assert all(fault.point in points for fault in schedule.faults if fault.kind not in VALUES)
        assert len(points) == sum(len(fault.entries()) for fault in schedule.faults) - _shared(schedule)
        assert sum(fault.kind in VALUES for fault in schedule.faults) <= 1


def _shared(schedule: Schedule) -> int:
    """Two faults that are silent wait for their verdict together."""
    return max(0, sum(fault.kind in ("weights", "answer") for fault in schedule.faults) - 1)


def test_elastic_training_under_selected_faults_ends_like_the_fault_free_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks killed, hung in two ways and during a recovery, a damaged shard, a lost node, a killed driver; always at
    full size, so every bit has to be right."""
    monkeypatch.setenv("PATIENCE", "2")
    variant = next(variant for variant in VARIANTS if variant.name == "fsdp")
    with campaign(tmp_path, s3=False) as made:
        line = made.perform(Schedule(0, variant, shrinks=False, spares=1, s3=False, faults=SELECTED))
    assert not line["violations"] and not line["not_hit"], f"{line}; what was kept is in {tmp_path}"
    assert line["refused_copies"] >= 1, "nobody met the damaged shard"
    assert '"lost": 0' in summary([{**line, "commit": ""}])
