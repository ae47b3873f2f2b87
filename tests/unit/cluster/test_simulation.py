"""The twin: the real controller against a simulated cluster, its fault tables, its pause model, its baseline."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.simulation import controller_cost, main, sensitivity
from cluster.simulation.assumptions import SimulatedCluster
from cluster.simulation.failure_tables import DAY, LLAMA3, RSC, Fault, draw, observed_counts, read_spot_trace
from cluster.simulation.pauses import NCCL_PER_RANK_S, PHASES, fit, fixed, load
from cluster.simulation.restart_baseline import RestartBaseline, baseline_goodput
from cluster.simulation.run import Simulation
from cluster.simulation.sensitivity import crossing, sweep
from cluster.simulation.sensitivity_plot import write_plot
from infra.errors import DataError

SMALL = SimulatedCluster(
    fixed(2.0),
    gpus=64,
    days=0.1,
    tensor_parallel=2,
    pipeline_parallel=1,
    spare_nodes=1,
    step_s=5.0,
    snapshot_stall_s=0.0,
)
"""8 nodes and a spare one; 0.1 days are 8,640 s. No stall, so that sums are simple."""


def strike(at: float, kind: str, place: float = 0.5, replaced: bool = True, deadline: float | None = None) -> Fault:
    return Fault(at, kind, kind, replaced, place, None, deadline)


def test_without_faults_everything_but_the_start_and_the_spares_is_goodput() -> None:
    """64 of 72 ranks compute from second 2 on."""
    outcome = Simulation(SMALL, []).run()
    assert outcome.account.goodput == pytest.approx(64 / 72 * (8640 - 2) / 8640, rel=1e-6)
    assert outcome.steps == (8640 - 2) // 5 and outcome.lost_steps == 0 and outcome.restarts == 0
    assert outcome.account.ledger.unattributed_s == pytest.approx(0, abs=1e-3) and outcome.ended == "running"


def test_one_lost_node_by_hand() -> None:
    """At 1004 s, 4 s past 1000 s: the start took 2 s, so step 200 has run for 2 s and is computed again. Beats stop for
    node_timeout_s; the spare node fills the hole, in one pause of 2 s, and no committed step is lost."""
    outcome = Simulation(SMALL, [strike(1004.0, "node")]).run()
    seconds = outcome.account.ledger.seconds
    detection = SMALL.elastic().node_timeout_s
    assert outcome.lost_steps == 0 and outcome.restarts == 1
    assert outcome.pauses[1] == pytest.approx(detection + 2.0)
    assert seconds["recomputed"] == pytest.approx(64 * 2.0)
    assert seconds["detection"] == pytest.approx(56 * detection)
    (_, pause) = outcome.decisions
    assert pause.action == "replace" and pause.key == "elastic.spares" and pause.lost_steps == 0
    assert outcome.account.ledger.unattributed_s == pytest.approx(0, abs=1e-3)


def test_a_fault_before_the_newest_snapshot_is_acknowledged_costs_exactly_one_committed_step() -> None:
    """Step 200 ends at 1002 s; its copies are acknowledged half a second later."""
    outcome = Simulation(SMALL, [strike(1002.2, "process")]).run()
    assert outcome.lost_steps == 1 and outcome.decisions[1].lost_steps == 1
    assert Simulation(SMALL, [strike(1002.7, "process")]).run().lost_steps == 0


def test_a_noticed_preemption_loses_no_step_and_recomputes_nothing() -> None:
    outcome = Simulation(SMALL, [strike(1004.0, "notice", deadline=1124.0)]).run()
    assert outcome.lost_steps == 0 and outcome.restarts >= 1
    assert outcome.account.ledger.seconds["recomputed"] == 0


def test_without_spares_it_shrinks_and_grows_back() -> None:
    cluster = replace(SMALL, spare_nodes=0)
    outcome = Simulation(cluster, [strike(1004.0, "node")]).run()
    assert [pause.action for pause in outcome.decisions][1:] == ["shrink", "replace"]
    assert outcome.decisions[1].ranks == 56 and outcome.decisions[2].ranks == 64
    assert outcome.account.absent_s == pytest.approx(8 * cluster.node_replacement_s, rel=0.01)


def test_corruption_goes_back_to_the_last_verified_state_and_counts_apart() -> None:
    outcome = Simulation(SMALL, [strike(1004.0, "corruption", place=0.0)]).run()
    assert outcome.lost_steps == 0
    assert 0 < outcome.rolled_back_steps <= 2 * SMALL.flush_every
    assert [pause.rolled_back for pause in outcome.decisions] == [False, True]


def test_fifty_faults_of_every_kind_leave_no_second_unclaimed() -> None:
    faults = [fault for seed in range(6) for fault in draw(LLAMA3, 64 * 40, 54 * 0.4, seed, exact=False)]
    spread = sorted(
        replace(fault, time=fault.time % 8640, deadline=fault.deadline and fault.time % 8640 + 600) for fault in faults
    )
    assert {fault.kind for fault in spread} >= {"process", "node", "hang"} and len(spread) > 50
    outcome = Simulation(replace(SMALL, node_replacement_s=30, process_warm_s=5), spread).run()
    account = outcome.account
    assert account.ledger.unattributed_s == pytest.approx(0, abs=1)
    assert outcome.ended == "running" and account.goodput > 0.3
    assert outcome.lost_steps <= len(spread) and min(account.ledger.seconds.values()) > -1e-6
    assert outcome.lost_steps == sum(pause.lost_steps for pause in outcome.decisions if not pause.rolled_back)
    again = Simulation(replace(SMALL, node_replacement_s=30, process_warm_s=5), spread).run()
    assert again.account == account


def test_the_published_tables_add_up() -> None:
    assert sum(cause.count for cause in LLAMA3.causes) == 466
    assert sum(cause.count for cause in LLAMA3.causes if cause.kind != "notice") == 419
    assert observed_counts(draw(LLAMA3, 16384, 54, 1))["GPU"] == 148
    per_1000_node_days = sum(cause.count for cause in RSC.causes) / (16384 / 8 * 54) * 1000
    assert per_1000_node_days == pytest.approx(6.5)
    half = draw(LLAMA3, 8192, 54, 1)
    assert 225 <= len(half) <= 241 and half == sorted(half) and draw(LLAMA3, 8192, 54, 1) == half


def test_spot_traces_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"time": 50, "node": 3, "event": "notice", "deadline": 170}, {"time": 9, "node": 1, "event": "lost"}]
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    faults, covered = read_spot_trace(trace)
    assert [fault.kind for fault in faults] == ["node", "notice"] and covered == 50
    for line, complaint in (("{}", ":1: not a trace event"), ("", "no event")):
        trace.write_text(line)
        with pytest.raises(DataError, match=complaint):
            read_spot_trace(trace)


def test_the_pause_model_is_fitted_robustly() -> None:
    """2 + 3 log2(n) with one wild row."""
    rows = [{"ranks": n, "form_s": 2 + 3 * k} for k, n in enumerate((1, 2, 4, 8, 16))]
    model = fit([*rows, {"ranks": 8, "form_s": 500.0}])
    assert model.phase_s("form_s", 16384) == pytest.approx(2 + 3 * 14, rel=0.15)
    assert model.join_s(16384) == pytest.approx(model.phase_s("form_s", 16384) + 1.0 + NCCL_PER_RANK_S * 16384)
    assert "6 pauses measured at 1 to 16 ranks" in model.source
    with pytest.raises(DataError, match="two group sizes"):
        fit(rows[:1])


def test_the_measured_pauses_of_this_repository_can_be_fitted_and_say_how_they_were_made() -> None:
    tree = json.loads(main.PAUSES.read_text())
    assert tree["command"].startswith("python -m bench.pauses") and "cores" in tree["machine"]
    model = load(main.PAUSES)
    assert min(model.measured_at) <= 2 and max(model.measured_at) >= 16
    assert all(model.phase_s(phase, 8) > 0 for phase in PHASES if phase != "restore_s")


def test_the_restart_baseline_by_hand() -> None:
    """One hang at 5000 s: last checkpoint, watchdog, relaunch."""
    baseline = RestartBaseline(hang_detection_s=100, relaunch_s=50, load_s=48, checkpoint_stall_s=10)
    interval = baseline.interval_s(1, 8640)
    cycle = interval + 10
    up = 5000 - 100
    share = interval / cycle
    useful = (up - up % cycle) * share + (8640 - (5000 + 100 + 100)) * share
    found = baseline_goodput(SMALL, [strike(5000.0, "hang")], baseline)
    assert found == pytest.approx(useful * 64 / (8640 * 72))


def test_the_crossing_of_098_and_the_plot(tmp_path: Path) -> None:
    assert crossing({0.0: 0.99, 10.0: 0.97}) == pytest.approx(5.0)
    assert crossing({0.0: 0.97}) is None and crossing({0.0: 0.99}) is None
    one = replace(SMALL, gpus=512, spare_nodes=0, days=0.05)
    found = sweep(one, [strike(1000.0, "node"), strike(3000.0, "node")], (0.0, 100.0))
    assert [value for _, value in found.points] == sorted((value for _, value in found.points), reverse=True)
    assert (
        found.pause_at_98 is not None
        and abs(sensitivity.goodput_at(found.pause_at_98, one, [strike(1000.0, "node"), strike(3000.0, "node")]) - 0.98)
        < 2e-3
    )
    page = tmp_path / "sensitivity.html"
    write_plot(page, found, (5.0, 0.985), 0.9, "64 GPUs <& more>", ["note"])
    drawn = page.read_text().rpartition("Plotly.newPlot")[2]
    assert "SIMULATED" in drawn and "0.98 is lost at" in drawn and "& more>" not in drawn
    assert "pause model: 5.0 s, 0.9850" in drawn and "restart from storage: 0.9000" in drawn


def test_the_controller_s_own_cost_is_measured_at_any_size() -> None:
    small, large = controller_cost.measure_sizes((8, 4096))
    for cost in (small, large):
        assert 0 < cost.decision_s <= cost.recovery_s and cost.snapshot_s > 0 and cost.beat_s > 0
    assert large.recovery_s > small.recovery_s


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--gpus", "1024", "--days", "2", "--processes", "1"]
    assert main.main([*size, "--quick", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["simulated"].startswith("a cluster twin: no hardware")
    assert 0 < result["baseline_goodput"] < result["goodput"] < 1
    assert set(result) >= {"lost_steps", "restarts", "assumptions"} and result["steps"] == pytest.approx(
        2 * DAY / 6.2, rel=0.05
    )
    assert "MegaScale" in result["assumptions"]["nccl"] and "Llama 3" in result["assumptions"]["failures"]
    assert main.main([*size, "--quick"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("SIMULATED") and "assumptions" in text and "cluster.step_s: 6.2" in text
    assert main.main(["--gpus", "100"]) == 2
    assert "--gpus 100" in capsys.readouterr().err
    assert main.main(["--failures", "nope"]) == 2
    assert main.main([*size, "--quick", "--pauses", str(tmp_path / "none")]) == 2
    assert "python -m bench.pauses" in capsys.readouterr().err
