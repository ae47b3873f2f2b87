"""Seconds without a completed step after a SIGKILL of a rank, beyond the usual step: recua and its peers.

    python -m bench.recovery                                # about 20 minutes on two cores
    python -m bench.recovery --json                         # the same; one JSON object on the last line
    python -m bench.recovery --cases shrink,torchft         # only these; see below
    python -m bench.recovery --rounds 1 --cases torchrun    # every rank is killed once

A toy Llama on 4 ranks, with steps of 200 ms and more on two cores. All cases train the same model, batch and data with
one thread per rank on this machine, one after the other. Each round starts every case afresh and kills every rank once,
also rank 0, from outside and in the backward pass, while all ranks exchange gradients. Medians over all kills:

  case        keys
  shrink      recua_shrink_s    the survivors continue, fewer, while a cold replacement warms up beside them
              recua_full_s      the sum of the pauses until all ranks train again: shrinking and growing back
              recua_back_s      from the kill until a step of all ranks, with the steps of the smaller group
              recua_steps_meanwhile   steps that the smaller group completed until then
  spare       recua_spare_s     a hot spare replaces the rank: back at full size
  tp          recua_tp_s        the same for a rank of a tp2 block (dp2 x tp2)
  torchft     torchft_s         continues with fewer ranks; torchft_back_s as above. The rank is restarted at once, cold
  ray_train   ray_train_s       restarts all workers
  torchrun    torchrun_s        restarts all workers

A case that fails is named under `errors`, and the others are still measured. `all` has every kill of every case,
`settings` the settings of each peer, whose waiting times were shortened.
torchft is installed, once, into .venv-peers from requirements/torchft.txt; the other peers come with torch and Ray.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.recovery import others, recua
from bench.recovery.course import Course
from bench.recovery.job import BATCH, MODEL, RANKS, THREADS, TOKENS, prepare

CASES = (*recua.CASES, *others.PEERS)


def measure(case: str, folder: Path) -> tuple[Course, Mapping[str, Any]]:
    """Run one round of a case in a new folder: every rank is killed once."""
    folder.mkdir(parents=True)
    prepare(folder)
    return (recua if case in recua.CASES else others).measure(case, folder, RANKS)


def headline(case: str, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The keys of a case; see the module's docstring."""

    def middle(name: str) -> float:
        return round(median(outcome[name] for outcome in outcomes), 3)

    if case == "shrink":
        names = {"shrink": "gap_s", "full": "gaps_s", "back": "back_s"}
        keys = {f"recua_{key}_s": middle(name) for key, name in names.items()}
        return {**keys, "recua_steps_meanwhile": middle("steps_meanwhile")}
    if case in recua.CASES:
        return {f"recua_{case}_s": middle("gap_s")}
    found = {f"{case}_s": middle("gap_s")}
    return {**found, "torchft_back_s": middle("back_s")} if case == "torchft" else found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.recovery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="only the JSON object on standard output")
    parser.add_argument("--rounds", type=int, default=2, help="how often each rank is killed (default 2)")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)} (default: all)")
    given = parser.parse_args(arguments)
    cases = given.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"--cases: no {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    folder = Path(tempfile.mkdtemp(prefix="recua-recovery-"))
    everything: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    interrupted = False
    try:
        for number, case in itertools.product(range(1, given.rounds + 1), cases):
            load = round(os.getloadavg()[0], 1)
            print(f"round {number} of {given.rounds}, {case}, load {load}", file=sys.stderr, flush=True)
            try:
                course, settings = measure(case, folder / f"{case}-{number}")
            except Exception as error:  # still measure the other cases
                errors[case] = f"{type(error).__name__}: {error}"
                print(f"{case}: {errors[case]}", file=sys.stderr, flush=True)
                continue
            seen = everything.setdefault(case, {"kills": [], "step_s": [], "load": [], "settings": []})
            seen["kills"] += course.outcomes()
            seen["step_s"].append(round(course.usual_s(), 3))
            seen["load"].append(load)
            seen["settings"].append(settings)
            shutil.rmtree(folder / f"{case}-{number}", ignore_errors=True)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: only the finished cases are reported", file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result: dict[str, Any] = {}
    for case, seen in everything.items():
        result |= headline(case, seen["kills"])
    if not given.json:
        for case, seen in everything.items():
            print(f"{case:<10} step {median(seen['step_s']):.3f} s, gaps {[kill['gap_s'] for kill in seen['kills']]}")
    print(json.dumps({**result, "errors": errors, **_circumstances(), "all": everything}))
    return 130 if interrupted else 1 if errors else 0


def _circumstances() -> dict[str, Any]:
    machine = f"{os.cpu_count()} cores, {platform.machine()}, load average {os.getloadavg()[0]:.1f} at the end"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "ray")}
    job = {"ranks": RANKS, "model": MODEL, "batch": BATCH, "tokens": TOKENS, "threads_per_rank": THREADS}
    return {"machine": machine, "versions": versions, **job}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
