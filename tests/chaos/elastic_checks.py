"""What must hold after a run of the elastic campaign, compared with the fault-free run of the same setting."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from actors.step_log import read_steps
from cluster.group_actors import NAMESPACE
from data.config import BatchSettings
from data.loader import Loader
from data.mixture import Mixture, Source
from data.tokenized import TokenWindows
from infra.storage import open_store
from tests.chaos.elastic_run import Run
from tests.chaos.elastic_schedule import BAD_WINDOWS, FLUSH_EVERY, STEPS, VALUES

NEAR = 1e-4
"""Relative, where another number of ranks has added up the same numbers in another order."""
GONE_S = 40.0
Row = dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """How the fault-free run ended."""

    rows: list[Row]
    weights: dict[str, torch.Tensor]

    @classmethod
    def of(cls, folder: Path) -> "Reference":
        return cls(rows_of(folder / "state"), weights_of(folder / "out"))


def rows_of(state: Path) -> list[Row]:
    return read_steps(open_store(state))


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def check(run: Run, reference: Reference | None, corpus: Path) -> Iterator[str]:
    """The violations. `reference`: None where this is the fault-free run itself."""
    yield from _reports(run)
    if not run.violations:
        rows = rows_of(run.state)
        if [row["step"] for row in rows] != list(range(STEPS)):
            yield f"the log has steps {[row['step'] for row in rows]}"
            return
        yield from _samples(run, rows, corpus)
        if reference is not None:
            yield from _same(run, rows, reference)
        yield from _lost_steps(run)
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
    history = json.loads((run.state / "group.json").read_text())
    skipped = [window for first, last in history["skipped"] for window in range(first, last + 1)]
    bad = [window for fault in run.schedule.faults if fault.kind in VALUES for window in BAD_WINDOWS[fault.kind]]
    if skipped != sorted(set(bad)):
        yield f"windows {skipped} were left out, those with bad data are {sorted(set(bad))}"
    size = len(TokenWindows(corpus / "tokens", 16))
    loader = Loader(Mixture([Source("tokens", size, float(size))], 7), BatchSettings(size=6), skipped)
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
    """By the ranks' beacons, not by what the controller says of itself. A generation that went back on purpose (bad
    data) or that lost all memory may lose more."""
    witness, generations = run.witness, sorted(run.witness.started)
    kinds = {fault.kind for fault in run.hit}
    allowed = 2 * FLUSH_EVERY + 2 if "wipe" in kinds or _two_copies_gone(run) else 1
    events = [event for driver in run.drivers for event in driver.lines("event")]
    back = {event["to_step"] for event in events if event["event"] == "rolled-back"}
    for generation in generations[1:]:
        before = max(witness.reached.get(one, 0) for one in witness.reached if one < generation)
        start = witness.started[generation]
        if before - start > allowed and start not in back and not _undone(run, before, start):
            yield f"generation {generation} went back from step {before} to {start}"


def _undone(run: Run, before: int, start: int) -> bool:
    """Bad data within these steps: what is computed again after a rollback may be lost again."""
    return any(fault.kind in VALUES for fault in run.schedule.faults) and start <= BAD_WINDOWS["spike"][-1] + 4


def _two_copies_gone(run: Run) -> bool:
    """More than one copy of a shard may be lost at once: a second node, a damaged copy, or an agent that kept replicas,
    before they were replaced."""
    return sum(fault.kind in ("node", "raylet", "agent", "drain", "sigterm", "flip") for fault in run.hit) > 1


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
    starts there (see cluster.host_memory)."""
    return [] if run.violations else [str(path) for path in run.memory() if path.parent.name not in run.lost]


def _looked(look: Callable[[], list[Any]]) -> list[Any]:
    import psutil

    try:
        return look()
    except psutil.Error:  # it went while we looked
        return ["going"]
