"""A cluster twin: the controller's own code and policies against a simulated cluster, under published failure counts.

    python -m cluster.simulation --gpus 16384 --days 54 --failures llama3 --json
    python -m cluster.simulation --failures rsc --plot sensitivity.html
    python -m cluster.simulation --failures trace.jsonl --gpus 512 --tensor-parallel 8 --pipeline-parallel 1

No hardware is involved: `goodput`, `lost_steps`, `restarts`, `baseline_goodput` and `pause_at_98` are simulated, with
every assumption printed beside them. `controller_cost` is measured here and now. `--json`: one object, the last line.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.simulation import controller_cost, sensitivity
from cluster.simulation.assumptions import SimulatedCluster, SimulatedRun
from cluster.simulation.failure_tables import DAY, TABLES, Fault, draw, observed_counts, read_spot_trace
from cluster.simulation.pauses import NCCL_SOURCE, RESTORE_SOURCE, load
from cluster.simulation.restart_baseline import RestartBaseline, baseline_goodput
from cluster.simulation.run import Simulation
from infra.errors import RecuaError, UserError

PAUSES = Path(__file__).with_name("measured_pauses.json")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m cluster.simulation", description=__doc__.split("\n\n")[0])
    made.add_argument("--gpus", type=int, default=16384)
    made.add_argument("--days", type=float, help="simulated days  [default: 54, or what a trace covers]")
    made.add_argument("--failures", default="llama3", help="llama3, rsc, or a spot trace (JSON lines)  [llama3]")
    made.add_argument("--poisson", action="store_true", help="random numbers of faults instead of the published counts")
    made.add_argument("--seed", type=int, default=0, help="of the faults' times and places")
    made.add_argument("--tensor-parallel", type=int, default=8)
    made.add_argument("--pipeline-parallel", type=int, default=16)
    made.add_argument("--spare-nodes", type=int, default=4)
    made.add_argument("--step-s", type=float, default=6.2, help="a fault-free step at full size")
    made.add_argument("--pauses", type=Path, default=PAUSES, help="measured pauses that the pause model is fitted to")
    made.add_argument("--quick", action="store_true", help="no sensitivity, no controller cost")
    made.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1), help="for the sensitivity")
    made.add_argument("--plot", type=Path, metavar="FILE", help="write the sensitivity as an HTML page")
    made.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return made


def simulate(given: argparse.Namespace) -> tuple[dict[str, Any], SimulatedRun]:
    """The result as JSON, and the simulated run behind it.

    Raises:
        UserError: settings that cannot be simulated. DataError: trace or pauses that cannot be read.
    """
    faults, days, source = _faults(given)
    block = given.tensor_parallel * given.pipeline_parallel
    if given.gpus < block or given.gpus % block or given.gpus % 8:
        raise UserError(
            f"--gpus {given.gpus}: a whole number of blocks of {block} (--tensor-parallel x ...) and of nodes of 8"
        )
    if not given.pauses.exists():
        raise UserError(f"--pauses {given.pauses}: no such file; measure with `python -m bench.pauses --output FILE`")
    model = load(given.pauses)
    cluster = SimulatedCluster(
        model, given.gpus, days, 8, given.tensor_parallel, given.pipeline_parallel, given.spare_nodes, given.step_s
    )
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    say(f"simulating {given.gpus} GPUs for {days:g} days under {len(faults)} faults ...")
    outcome = Simulation(cluster, faults).run()
    baseline = RestartBaseline()
    result: dict[str, Any] = {
        "simulated": "a cluster twin: no hardware; see assumptions",
        "gpus": given.gpus,
        "days": days,
        "failures": given.failures,
        "goodput": round(outcome.account.goodput, 5),
        "lost_steps": outcome.lost_steps,
        "rolled_back_steps": outcome.rolled_back_steps,
        "restarts": outcome.restarts,
        "storage_restores": outcome.storage_restores,
        "steps": outcome.steps,
        "ended": outcome.ended,
        "baseline_goodput": round(baseline_goodput(cluster, faults, baseline), 5),
        "pause_s": _quantiles(outcome.pauses),
        "shares": outcome.account.to_json()["shares"],
        "decisions": dict(Counter(pause.action for pause in outcome.decisions)),
        "faults": observed_counts(faults),
        "controller_cpu_s": round(outcome.core_s, 3),
    }
    if not given.quick:
        found = sensitivity.sweep(cluster, faults, processes=given.processes, say=say)
        result["pause_at_98"] = None if found.pause_at_98 is None else round(found.pause_at_98, 2)
        result["sensitivity"] = [[round(pause, 2), round(value, 5)] for pause, value in found.points]
        if given.plot is not None:
            from cluster.simulation.sensitivity_plot import write_plot  # plotly takes a second to load

            title = f"{given.gpus} GPUs, {days:g} days, failures: {given.failures}"
            own = (model.pause_s(given.gpus), outcome.account.goodput)
            notes = (source.split(";")[0], f"pause model {model.source}")
            write_plot(given.plot, found, own, result["baseline_goodput"], title, notes)
            result["plot"] = str(given.plot)
        say("measuring the controller's own cost from 8 to 100,000 ranks ...")
        result["controller_cost"] = [cost.to_json() for cost in controller_cost.measure_sizes()]
    result["assumptions"] = {
        "failures": source,
        "cluster": cluster.assumptions(),
        "nccl": NCCL_SOURCE,
        "restore": RESTORE_SOURCE if model.stated_restore_s else "measured",
        "baseline": asdict(baseline),
    }
    return result, outcome


def _faults(given: argparse.Namespace) -> tuple[list[Fault], float, str]:
    """(faults, days, where they come from)."""
    if given.failures in TABLES:
        days = 54.0 if given.days is None else given.days
        table = TABLES[given.failures]
        return draw(table, given.gpus, days, given.seed, exact=not given.poisson), days, table.source
    path = Path(given.failures)
    if not path.exists():
        raise UserError(f"--failures {given.failures}: neither {' nor '.join(TABLES)} nor a trace file")
    faults, covered_s = read_spot_trace(path)
    days = covered_s / DAY if given.days is None else given.days
    return faults, days, f"spot trace {path.name}: {len(faults)} events over {covered_s / DAY:.2f} days"


def _quantiles(pauses: Sequence[float]) -> dict[str, float]:
    ordered = sorted(pauses)
    if not ordered:
        return {}
    return {"median": round(ordered[len(ordered) // 2], 3), "longest": round(ordered[-1], 3)}


def to_text(result: dict[str, Any]) -> str:
    """For people: the figures, then the assumptions."""
    lines = [f"SIMULATED ({result['simulated']})"]
    names = (
        "goodput",
        "baseline_goodput",
        "pause_at_98",
        "lost_steps",
        "rolled_back_steps",
        "restarts",
        "steps",
        "ended",
    )
    lines += [f"  {name:<20}{result[name]}" for name in names if name in result]
    lines.append(f"  {'pauses (s)':<20}{result['pause_s']}")
    lines.append("shares of the capacity")
    shares = sorted(result["shares"].items(), key=lambda item: -item[1])
    lines += [f"  {name.replace('_', ' '):<24}{share:>9.3%}" for name, share in shares if abs(share) >= 5e-6]
    if "controller_cost" in result:
        lines.append("controller, measured CPU: ranks, seconds per recovery, longest answer, per snapshot, per beat")
        rows = [tuple(cost.values()) for cost in result["controller_cost"]]
        lines += [f"  {row[0]:>7}  " + "  ".join(f"{value:>9.3g}" for value in row[1:]) for row in rows]
    lines.append("assumptions")
    for name, value in result["assumptions"].items():
        if isinstance(value, dict):
            lines += [f"  {name}.{key}: {one}" for key, one in value.items()]
        else:
            lines.append(f"  {name}: {value}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        result, _ = simulate(given)
    except RecuaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(json.dumps(result) if given.json else to_text(result))
    return 0
