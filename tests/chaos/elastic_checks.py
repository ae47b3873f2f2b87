"""What must hold after a run of the elastic campaign, compared with the fault-free run of the same setting."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from actors.pretrain.step_log import read_steps
from cluster.node.beacons import SUFFIX
from cluster.workers.named_actors import NAMESPACE
from data.config import BatchSettings
from data.loader import Loader
from data.mixture import Mixture, Source
from data.tokenized import TokenWindows
from infra.storage import open_store
from tests.chaos.elastic_losses import losses
from tests.chaos.elastic_program import SEED
from tests.chaos.elastic_reference import Reference, Row, weights_of
from tests.chaos.elastic_run import Run
from tests.chaos.elastic_schedule import SILENT, STEPS

NEAR = 1e-4
"""Relative, where another number of ranks has added up the same numbers in another order."""
GONE_S = 40.0


def check(run: Run, reference: Reference, corpus: Path) -> Iterator[str]:
    """The violations."""
    yield from _reports(run)
    if not run.violations:
        rows = read_steps(open_store(run.state))
        if [row["step"] for row in rows] != list(range(STEPS)):
            yield f"the log has steps {[row['step'] for row in rows]}"
            return
        yield from _samples(run, rows, corpus)
        yield from _same(run, rows, reference)
        yield from _lost_steps(run)
        yield from _silent(run)
    yield from _left_behind(run)


def _reports(run: Run) -> Iterator[str]:
    """Each driver is told of every step once, in order; those that a rollback undid come again."""
    for number, driver in enumerate(run.drivers):
        following, back = 0, None
        for line in (json.loads(text) for text in _lines(driver.log)):
            if "row" in line:
                step = line["row"]["step"]
                if step not in (following, back):
                    yield f"driver {number} was told of step {step} after step {following - 1}"
                following, back = step + 1, None
            elif line.get("event", {}).get("event") == "rolled-back":
                back = line["event"]["to_step"]


def _lines(log: Path) -> list[str]:
    text = log.read_text() if log.exists() else ""
    return [line for line in text.splitlines() if line.endswith("}")]


def _samples(run: Run, rows: list[Row], corpus: Path) -> Iterator[str]:
    """Windows that were left out are those with bad data, and what the ranks took is the data order without them."""
    skipped = [window for first, last in run.history["skipped"] for window in range(first, last + 1)]
    if skipped != run.schedule.skipped:
        yield f"windows {skipped} were left out, those with bad data are {run.schedule.skipped}"
    size = len(TokenWindows(corpus / "tokens", 16))
    loader = Loader(Mixture([Source("tokens", size, float(size))], SEED), BatchSettings(size=6), skipped)
    for row in rows:
        if row["samples"] != loader.batch(row["step"]).checksum():
            yield f"step {row['step']} took other samples than those of window {loader.window(row['step'])}"


def _same(run: Run, rows: list[Row], reference: Reference) -> Iterator[str]:
    """Bitwise where the group always had its full size, else near."""
    always_full = set(run.witness.worlds.values()) <= {run.schedule.variant.ranks}
    wrong = []
    for row, expected in zip(rows, reference.rows, strict=True):
        if row["committed"] != expected["committed"] or row["tokens"] != expected["tokens"]:
            yield f"step {row['step']} is {row}, fault-free {expected}"
        for name in ("loss", "grad_norm"):
            ours, theirs = row[name], expected[name]
            if ours != theirs and (always_full or abs(ours - theirs) > NEAR * max(abs(theirs), 1e-3)):
                wrong.append((row["step"], name, ours, theirs))
    if wrong:
        yield f"{len(wrong)} numbers differ from the fault-free run's, first (step, what, ours, theirs): {wrong[0]}"
    weights, drift = weights_of(run.folder / "out"), 0.0
    if weights.keys() != reference.weights.keys():
        yield f"other tensors: {sorted(weights.keys() ^ reference.weights.keys())}"
        return
    for name, tensor in weights.items():
        expected_tensor = reference.weights[name].float()
        drift = max(drift, float((tensor.float() - expected_tensor).norm() / expected_tensor.norm().clamp(min=1e-9)))
    if drift > (0.0 if always_full else 10 * NEAR):
        yield f"the weights at the end are {drift:.2e} away from the fault-free ones (relative)"


def _lost_steps(run: Run) -> Iterator[str]:
    """By the ranks' beacons, not by what the controller says of itself (see `elastic_losses`)."""
    events = [event for driver in run.drivers for event in driver.lines("event")]
    back = [event["to_step"] for event in events if event["event"] == "rolled-back"]
    replicated = run.schedule.variant.name == "replicate"
    witness = run.witness
    yield from losses(witness.lives, witness.taken, back, replicated, list(witness.stored.values()))


def _silent(run: Run) -> Iterator[str]:
    """Whoever remembered or computed wrongly was named, and nobody else."""
    guilty = [worker for one in run.history["corruptions"] for worker in one["workers"]]
    wrong = [found for fault in run.hit if fault.kind in SILENT and (found := run.witness.whose(run.pids[fault]))]
    expected = [path.name.removesuffix(SUFFIX) for path, _ in wrong]
    if guilty != expected:
        yield f"{guilty} were found to be wrong, {expected} were"


def _left_behind(run: Run) -> Iterator[str]:
    checks: dict[str, Callable[[], list[Any]]] = {
        "processes": lambda: [" ".join(process.cmdline())[:60] for process in run.processes()],
        "memory": lambda: _memory(run),
        "actors": lambda: [name for name in run.place.actors() if run.group and run.group in name],
    }
    deadline = time.monotonic() + GONE_S
    for name, look in checks.items():
        while (found := _looked(look)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if found:
            yield f"left behind: {name}: {str(found)[:300]} (namespace {NAMESPACE})"


def _memory(run: Run) -> list[str]:
    """A run that has not ended keeps it. What lies on a machine whose raylet was killed is freed by the next agent that
    starts there (see cluster.node.host_memory)."""
    return [] if run.violations else [str(path) for path in run.memory() if path.parent.name not in run.lost]


def _looked(look: Callable[[], list[Any]]) -> list[Any]:
    import psutil

    try:
        return look()
    except psutil.Error:  # it went while we looked
        return ["going"]
