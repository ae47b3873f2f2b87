"""The campaign of elastic training: `python -m tests.chaos.elastic_campaign --faults 300` (or `make chaos`).

Each run is a tiny pretraining on several raylets that some fifteen random faults hit (see `elastic_schedule`), compared
with the fault-free one. See `campaign_results` for seeds and results. What is printed at the end sums up the whole file
of results: a table of fault kinds and phases, then one line of JSON; `--runs 0` prints that alone. PATIENCE=2 in the
environment doubles what is judged by the clock, for a crowded machine; KEEP=1 keeps all files of every run.
"""

import contextlib
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.node.host_memory import node_root
from tests.chaos.campaign_place import Nodes, Place, open_place
from tests.chaos.campaign_results import Record, main
from tests.chaos.elastic_checks import check
from tests.chaos.elastic_reference import Reference, reference
from tests.chaos.elastic_run import Run
from tests.chaos.elastic_schedule import CELLS, DRAWING, KINDS, PHASES, VALUES, Fault, Schedule
from tests.helpers.cloud_metadata import Metadata, metadata_service

RESULTS = Path("runs") / "chaos" / "elastic.jsonl"
PREFORKED = {"prestart_worker_first_driver": False, "enable_worker_prestart": False}
LAYOUT = Nodes(
    count=3,
    each={"num_cpus": 2, "object_store_memory": 80 << 20},
    head={"num_cpus": 0, "_system_config": PREFORKED},
)
"""The head has no room for ranks; the three nodes have room for one more than the largest group with a spare."""


class Campaign:
    """Runs schedules in one place and remembers the fault-free runs."""

    def __init__(self, place: Place, cloud: Metadata, kept: Path) -> None:
        self._place, self._cloud, self._kept = place, cloud, kept
        self._patience = float(os.environ.get("PATIENCE", "1"))
        self._corpus = place.folder / "corpus"
        self._vocab_size = _write_corpus(self._corpus)

    def perform(self, schedule: Schedule) -> Record:
        """One run with its checks, as a line of the results."""
        expected = reference(schedule, self._corpus, self._vocab_size, self._kept / "references")
        began = time.monotonic()
        run, violations = self._one(schedule, expected)
        line = {
            "seed": schedule.seed,
            "drawing": DRAWING,
            "variant": schedule.variant.name,
            "store": "s3" if schedule.s3 else "folder",
            "shrinks": schedule.shrinks,
            "spares": schedule.spares,
            "faults": _counted(run),
            "not_hit": [str(fault) for fault in schedule.faults if fault not in _hits(run)],
            "violations": violations,
            "drivers": len(run.drivers),
            "generations": max(run.witness.worlds, default=0),
            "fewest_ranks": min(run.witness.worlds.values(), default=0),
            "refused_copies": _refusals(run),
            "longest_pause_s": _longest_pause(run),
            "seconds": round(time.monotonic() - began, 1),
        }
        shutil.rmtree(run.folder, ignore_errors=True)
        return line

    def _one(self, schedule: Schedule, expected: Reference) -> tuple[Run, list[str]]:
        folder = self._place.folder / f"run-{schedule.seed}-{schedule.variant.name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._place.settle()
        url = self._place.fresh_bucket() if schedule.s3 else ""
        run = Run(self._place, self._cloud, schedule, folder, self._corpus, self._vocab_size, url, self._patience)
        try:
            run.carry_out()
            violations = list(run.violations)
            try:
                violations += check(run, expected, self._corpus)
            except Exception as error:
                violations.append(f"the checks failed: {error!r}")
            if violations or os.environ.get("KEEP"):
                self._keep(run, violations)
        finally:
            run.sweep()
        return run, violations

    def _keep(self, run: Run, violations: list[str]) -> None:
        """Everything of a run with a violation, or of any where KEEP is set."""
        target = self._kept / f"elastic-{run.schedule.seed}-{time.strftime('%H%M%S')}"
        (run.folder / "schedule.txt").write_text("\n".join([*map(str, run.schedule.faults), "", *violations, ""]))
        seen = {name: [str(one) for one in found] for name, found in run.witness.seen().items()}
        (run.folder / "witness.json").write_text(json.dumps(seen, indent=1))
        shutil.copytree(run.folder, target, ignore=shutil.ignore_patterns("*.shard"))
        logs = sorted((self._place.folder).glob("session_*/logs/worker-*.err"), key=os.path.getmtime)
        (target / "workers").mkdir()
        for log in logs[-40:]:
            if log.stat().st_size:
                shutil.copy(log, target / "workers")


def _hits(run: Run) -> list[Fault]:
    bad = [fault for fault in run.schedule.faults if fault.kind in VALUES] if run.history.get("skipped") else []
    return [*run.hit, *bad]


def _counted(run: Run) -> dict[str, int]:
    found: Counter[str] = Counter()
    for fault in _hits(run):
        second = fault.kind == "two" and (run.state / "faults" / f"{fault.second}:1").exists()
        found[f"{fault.kind} in {fault.phase}"] += 1 + second
    found.update(f"{fault.kind} in {fault.phase} (nobody to hit)" for fault in run.missed)
    return dict(found)


def _refusals(run: Run) -> int:
    notes = [json.loads(file.read_text()) for file in (run.state / "refused").glob("*.json")]
    return sum(len(note["refused"]) for note in notes)


def _longest_pause(run: Run) -> float:
    started = [event for driver in run.drivers for event in driver.lines("event") if event["event"] == "started"]
    return round(max((event.get("pause_s", 0.0) for event in started if event["generation"] > 1), default=0.0), 2)


def _write_corpus(folder: Path) -> int:
    """Token shards and a tokenizer; returns the size of its vocabulary."""
    from data.tokenized import write_shards
    from models.tokenizers import load_tokenizer, train_bpe

    draw = random.Random(0)
    texts = [" ".join(str(draw.randrange(100)) + " plus" for _ in range(40)) for _ in range(60)]
    folder.mkdir()
    train_bpe(texts, 300).save(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    write_shards(texts, tokenizer, folder / "tokens")
    return int(tokenizer.vocab_size)


@contextlib.contextmanager
def surroundings(kept: Path) -> Iterator[Callable[[int], Record]]:
    """For `campaign_results`."""
    with campaign(kept) as made:
        yield lambda seed: made.perform(Schedule.of(seed))


@contextlib.contextmanager
def campaign(kept: Path, s3: bool = True) -> Iterator[Campaign]:
    nodes: list[str] = []
    try:
        with open_place(replace(LAYOUT, s3=s3)) as place, metadata_service() as cloud:
            nodes = place.nodes
            yield Campaign(place, cloud, kept)
    finally:  # by now no process is left that could write there
        for node in nodes:
            shutil.rmtree(node_root(node), ignore_errors=True)


def show(line: Record) -> None:
    shown = ", ".join(f"{kind} {number}" if number > 1 else kind for kind, number in sorted(line["faults"].items()))
    what = f"{line['variant']}{' shrinks' * line['shrinks']}, {line['spares']} spares, {line['store']}"
    print(f"SEED={line['seed']} {what}, {line['seconds']} s, generation {line['generations']}: {shown}", flush=True)
    for violation in line["violations"]:
        print(f"  VIOLATION {violation}", flush=True)


def summary(lines: Sequence[Record]) -> str:
    """The table, and the totals as JSON."""
    survived: Counter[tuple[str, str]] = Counter()
    lost: Counter[tuple[str, str]] = Counter()
    for line in lines:
        for name, number in line["faults"].items():
            if "nobody" not in name:
                kind, _, phase = name.partition(" in ")
                (lost if line["violations"] else survived)[kind, phase] += number
    cells = {cell: survived[cell] + lost[cell] for cell in CELLS}
    table = [f"{'survived/lost':>14}" + "".join(f"{phase:>12}" for phase in PHASES)]
    for kind in KINDS:
        counts = [f"{survived[kind, phase]}/{lost[kind, phase]}" for phase in PHASES]
        table.append(f"{kind:>14}" + "".join(f"{'-' if one == '0/0' else one:>12}" for one in counts))
    total = {
        "runs": len(lines),
        "faults": survived.total() + lost.total(),
        "survived": survived.total(),
        "lost": lost.total(),
        "cells": f"{sum(map(bool, cells.values()))} of {len(CELLS)}",
        "fewest_in_a_cell": min(cells.values()),
        "not_hit": sum(len(line["not_hit"]) for line in lines),
        "runs_with_violations": sum(bool(line["violations"]) for line in lines),
        "violations": sum(len(line["violations"]) for line in lines),
        "commits": sorted({line["commit"] for line in lines}),
        "on_s3": sum(line["store"] == "s3" for line in lines),
        "drivers": sum(line["drivers"] for line in lines),
        "generations": sum(line["generations"] for line in lines),
        "refused_copies": sum(line["refused_copies"] for line in lines),
        "worst_pauses_s": sorted((line["longest_pause_s"] for line in lines), reverse=True)[:5],
        "seconds_per_run": round(sum(line["seconds"] for line in lines) / max(1, len(lines)), 1),
    }
    return "\n".join([*table, json.dumps(total)])


if __name__ == "__main__":
    sys.exit(main("python -m tests.chaos.elastic_campaign", __doc__, RESULTS, surroundings, show, summary))
