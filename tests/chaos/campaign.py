"""The chaos campaign: `python -m tests.chaos.campaign --runs 200` (or `make graph-chaos RUNS=200`).

See `campaign_results` for seeds and results. The last line printed sums up the whole file; `--runs 0` prints
that alone.
"""

import contextlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.chaos.campaign_checks import check, outcome
from tests.chaos.campaign_place import Place, open_place
from tests.chaos.campaign_results import Record, main
from tests.chaos.campaign_run import Run, Schedule

RESULTS = Path("runs") / "chaos" / "campaign.jsonl"


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


@contextlib.contextmanager
def surroundings(kept: Path) -> Iterator[Callable[[int], Record]]:
    """For `campaign_results`."""
    with open_place() as place:
        campaign = Campaign(place, kept)
        yield lambda seed: campaign.perform(Schedule.of(seed))


def show(line: Record) -> None:
    shown = ", ".join(f"{kind} {number}" for kind, number in sorted(line["faults"].items())) or "no fault"
    print(f"SEED={line['seed']} {line['store']} {line['seconds']} s, {line['drivers']} drivers: {shown}", flush=True)
    for violation in line["violations"]:
        print(f"  VIOLATION {violation}", flush=True)


if __name__ == "__main__":
    sys.exit(main("python -m tests.chaos.campaign", __doc__, RESULTS, surroundings, show, summary))
