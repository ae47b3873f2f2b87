"""The chaos campaign: `python -m tests.chaos.campaign --runs 200` (or `make graph-chaos RUNS=200`).

Every run takes the next seed, and its line goes to the end of a file, so that a long campaign can be stopped and
continued. `SEED=n` in the environment replays one schedule. The last line printed sums up the whole file;
`--runs 0` prints that alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.chaos.campaign_checks import check, outcome
from tests.chaos.campaign_place import Place, open_place
from tests.chaos.campaign_run import Run, Schedule

RESULTS = Path("runs") / "chaos" / "campaign.jsonl"
FAILURES = 20
Record = dict[str, Any]


class Campaign:
    """Runs schedules in one place and remembers the fault-free outcome of each variant."""

    def __init__(self, place: Place, kept: Path) -> None:
        self._place = place
        self._kept = kept
        self._expected: dict[int, Record] = {}

    def perform(self, schedule: Schedule) -> Record:
        """One run with its checks, as a line of the results."""
        if schedule.variant not in self._expected:
            quiet, violations = self._one(Schedule.quiet(schedule.variant), None)
            assert not violations, f"the fault-free run: {violations}"
            self._expected[schedule.variant] = outcome(quiet, self._place.store(quiet.url))
        began = time.monotonic()
        run, violations = self._one(schedule, self._expected[schedule.variant])
        seconds = round(time.monotonic() - began, 1)
        if schedule.kind == "s3":
            run.injected.update({f"store {kind}": number for kind, number in self._place.faults()["counts"].items()})
            self._place.faults(script=[])
        return {
            "seed": schedule.seed,
            "store": schedule.kind,
            "variant": schedule.variant,
            "calls": len(self._expected[schedule.variant]["calls"]),
            "bodies": len(run.lines("began")),
            "drivers": len(run.drivers),
            "faults": dict(run.injected),
            "violations": violations,
            "seconds": seconds,
        }

    def _one(self, schedule: Schedule, expected: Record | None) -> tuple[Run, list[str]]:
        folder = self._place.folder / f"run-{schedule.seed}-{schedule.variant}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        url = str(folder / "store")
        if schedule.kind == "s3":
            url = self._place.fresh_bucket()
            self._place.faults(seed=schedule.seed, rates=schedule.store, match="/chaos", stall_s=2.5)
        run = Run(self._place, schedule, folder, url)
        run.carry_out()
        self._place.settle()
        violations = list(run.violations)
        try:
            violations += check(run, self._place.store(url), expected)
        except Exception as error:
            violations.append(f"the checks failed: {error!r}")
        if violations and schedule.seed >= 0:
            self._keep(run)
        return run, violations

    def _keep(self, run: Run) -> None:
        """Everything of a run with a violation."""
        target = self._kept / f"seed-{run.schedule.seed}-{time.strftime('%H%M%S')}"
        shutil.copytree(run.folder, target, ignore=shutil.ignore_patterns("cache"))
        if run.schedule.kind == "s3":
            store = self._place.store(run.url)
            for key in store.list(""):
                (target / "store" / key).parent.mkdir(parents=True, exist_ok=True)
                (target / "store" / key).write_bytes(store.get(key) or b"")


def summary(lines: list[Record]) -> str:
    faults: Counter[str] = Counter()
    for line in lines:
        faults.update(line["faults"])
    hit = {kind: number for kind, number in sorted(faults.items()) if "nobody" not in kind}
    total = {
        "runs": len(lines),
        "commits": sorted({line["commit"] for line in lines}),
        "on_s3": sum(line["store"] == "s3" for line in lines),
        "calls": sum(line["calls"] for line in lines),
        "bodies": sum(line["bodies"] for line in lines),
        "drivers": sum(line["drivers"] for line in lines),
        "faults": sum(hit.values()),
        "by_kind": hit,
        "runs_with_violations": sum(bool(line["violations"]) for line in lines),
        "violations": sum(len(line["violations"]) for line in lines),
        "seconds_per_run": round(sum(line["seconds"] for line in lines) / max(1, len(lines)), 1),
    }
    return json.dumps(total)


def carry_out(seeds: Iterable[int], results: Path) -> Iterator[Record]:
    """Run these seeds; each line is kept and given. Where the surroundings fail, on an overloaded machine say, the
    seed is run again in new ones."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    left, failures = deque(seeds), 0
    while left:
        try:
            with open_place() as place:
                campaign = Campaign(place, results.parent)
                while left:
                    line = {**campaign.perform(Schedule.of(left[0])), "commit": commit, "time": round(time.time())}
                    left.popleft()
                    with results.open("a") as stream:
                        stream.write(json.dumps(line) + "\n")
                    yield line
        except Exception as error:
            failures += 1
            if failures > FAILURES:
                raise
            print(f"the surroundings of SEED={left[0]} failed, which is run again: {error!r}", flush=True)


def show(line: Record) -> None:
    shown = ", ".join(f"{kind} {number}" for kind, number in sorted(line["faults"].items())) or "no fault"
    print(f"SEED={line['seed']} {line['store']} {line['seconds']} s, {line['drivers']} drivers: {shown}", flush=True)
    for violation in line["violations"]:
        print(f"  VIOLATION {violation}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.campaign", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="how many more runs (20)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"the file of results ({RESULTS})")
    parser.add_argument("--first-seed", type=int, help="default: after the last seed in the file")
    arguments = parser.parse_args()
    results: Path = arguments.results
    results.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(text) for text in results.read_text().splitlines()] if results.exists() else []
    first = arguments.first_seed or max((line["seed"] for line in lines), default=0) + 1
    seeds = range(first, first + arguments.runs)
    if replay := os.environ.get("SEED"):
        seeds = range(int(replay), int(replay) + 1)
    fresh = []
    for line in carry_out(seeds, results):
        show(line)
        fresh.append(line)
    print(summary([*lines, *fresh]), flush=True)
    return 1 if any(line["violations"] for line in fresh) else 0


if __name__ == "__main__":
    sys.exit(main())
