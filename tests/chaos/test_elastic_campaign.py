"""A fixed selection of the elastic campaign: `make chaos` draws further seeds."""

from pathlib import Path

from infra.faults import FaultSchedule
from tests.chaos.elastic_campaign import campaign, summary
from tests.chaos.elastic_schedule import KINDS, PHASES, VALUES, VARIANTS, Fault, Schedule

SELECTED = (
    Fault("kill", "compute", 5, 1, "compute"),
    Fault("spin", "data", 22, 3, "data"),
    Fault("driver", "compute", 30, 2, "compute"),
    Fault("node", "snapshot", 40, 2, "snapshot"),
    Fault("flip", "recovery", 2, 3, "load"),
    Fault("lock", "recovery", 3, 1, "load"),
)


def test_elastic_seeds_reach_every_kind_in_every_phase() -> None:
    schedules = [Schedule.of(seed) for seed in range(600)]
    drawn = {(fault.kind, fault.phase) for schedule in schedules for fault in schedule.faults}
    assert drawn == {(kind, phase) for kind in KINDS for phase in PHASES if kind not in VALUES or phase == "compute"}
    assert [Schedule.of(seed) for seed in range(600)] == schedules
    for schedule in schedules:
        points = {point for point, _ in FaultSchedule.parse(schedule.text).actions}
        assert all(fault.point in points for fault in schedule.faults if fault.kind not in VALUES)


def test_elastic_training_under_selected_faults_ends_like_the_fault_free_one(tmp_path: Path) -> None:
    """Ranks killed, hung in two ways and during a recovery, a damaged shard, a lost node, a killed driver."""
    variant = next(variant for variant in VARIANTS if variant.name == "fsdp")
    with campaign(tmp_path) as made:
        line = made.perform(Schedule(0, variant, shrinks=False, spares=0, s3=False, faults=SELECTED))
    assert not line["violations"] and not line["not_hit"], f"{line}; what was kept is in {tmp_path}"
    assert line["refused_copies"] >= 1, "nobody met the damaged shard"
    assert '"lost": 0' in summary([{**line, "commit": ""}])
