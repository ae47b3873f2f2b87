"""Which faults strike a simulated cluster, and when: published interruption counts, or a spot trace from a file."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.errors import DataError

DAY = 86400.0


@dataclass(frozen=True)
class Cause:
    """One row of a table.

    `kind` is its symptom: process (a process dies), node (beats stop), hang (no progress), fabric (a hang without a
    guilty rank), corruption (digests disagree), notice (announced). `replaced`: the node goes for repair.
    """

    name: str
    count: float
    kind: str
    replaced: bool = True


@dataclass(frozen=True)
class FailureTable:
    """Counts over `days` on `gpus`; other sizes and times scale in proportion."""

    name: str
    source: str
    gpus: int
    days: float
    causes: tuple[Cause, ...]


LLAMA3 = FailureTable(
    "llama3",
    "Llama 3 405B, 54 days on 16,384 H100: 466 interruptions, 419 unplanned and 47 planned (Llama 3 paper, table 5); "
    "how each cause shows itself is our assumption",
    16384,
    54,
    (
        Cause("GPU", 148, "process"),
        Cause("HBM", 72, "process"),
        Cause("software", 54, "process", replaced=False),
        Cause("network switch or cable", 35, "hang"),
        Cause("unplanned host maintenance", 32, "node"),
        Cause("GPU SRAM", 19, "process"),
        Cause("GPU system processor", 17, "hang"),
        Cause("NIC", 7, "hang"),
        Cause("NCCL watchdog", 7, "fabric", replaced=False),
        Cause("silent corruption", 6, "corruption"),
        Cause("thermal interface or sensor", 6, "node"),
        Cause("SSD", 3, "node"),
        Cause("power", 3, "node"),
        Cause("five kinds with 2 each", 10, "node"),
        Cause("planned", 47, "notice"),
    ),
)

_RSC_FAULTS = 6.50e-3 * (16384 / 8) * 54
RSC = FailureTable(
    "rsc",
    "Meta RSC-1: 6.50 failures per 1,000 node-days, 8 A100 per node (Kokolis et al., HPCA 2025, arXiv 2410.21680); the "
    "paper names the leading causes, their shares here are our assumption",
    16384,
    54,
    (
        Cause("InfiniBand link", 0.25 * _RSC_FAULTS, "hang"),
        Cause("GPU memory", 0.25 * _RSC_FAULTS, "process"),
        Cause("file system mount", 0.20 * _RSC_FAULTS, "process", replaced=False),
        Cause("PCIe", 0.15 * _RSC_FAULTS, "node"),
        Cause("other hardware", 0.15 * _RSC_FAULTS, "node"),
    ),
)
TABLES = {table.name: table for table in (LLAMA3, RSC)}


@dataclass(frozen=True, order=True)
class Fault:
    """One fault at `time` (seconds). `place` in [0, 1) picks the victim; `node` names it instead (traces);
    `deadline` belongs to a notice."""

    time: float
    cause: str
    kind: str
    replaced: bool
    place: float
    node: int | None = None
    deadline: float | None = None


def draw(table: FailureTable, gpus: int, days: float, seed: int, exact: bool = True) -> list[Fault]:
    """Faults in order of time; uniform in time, place and node, and independent of each other.

    exact: the (scaled) published count of each cause, fractions rounded up or down at random; else Poisson.
    """
    dice = random.Random(f"{table.name} {seed}")
    scale = gpus / table.gpus * days / table.days
    faults = []
    for cause in table.causes:
        wanted = cause.count * scale
        rounded = int(wanted) + (dice.random() < wanted - int(wanted))
        for _ in range(rounded if exact else _poisson(wanted, dice)):
            time, place = dice.uniform(0, days * DAY), dice.random()
            deadline = time + 1800 if cause.kind == "notice" else None
            faults.append(Fault(time, cause.name, cause.kind, cause.replaced, place, None, deadline))
    return sorted(faults)


def _poisson(mean: float, dice: random.Random) -> int:
    """Arrivals in unit time at rate `mean`."""
    count, elapsed = 0, dice.expovariate(1.0)
    while elapsed < mean:
        count += 1
        elapsed += dice.expovariate(1.0)
    return count


def read_spot_trace(path: Path) -> tuple[list[Fault], float]:
    """(faults, seconds that the trace covers) from JSON lines.

    Each line: {"time": seconds, "node": index, "event": "notice" | "lost", "deadline": seconds}; `deadline` (absolute)
    only with a notice. A preempted node's capacity comes back after the simulation's replacement time.

    Raises DataError with file:line.
    """
    faults = []
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            kind = {"notice": "notice", "lost": "node"}[row["event"]]
            deadline = float(row["deadline"]) if kind == "notice" else None
            cause = "preemption notice" if kind == "notice" else "preempted without notice"
            faults.append(Fault(float(row["time"]), cause, kind, True, 0.0, int(row["node"]), deadline))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: not a trace event: {error!r}") from None
    if not faults:
        raise DataError(f"{path}: no event in this trace")
    return sorted(faults, key=lambda fault: fault.time), max(fault.time for fault in faults)


def observed_counts(faults: Sequence[Fault]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for fault in faults:
        counts[fault.cause] = counts.get(fault.cause, 0) + 1
    return counts
