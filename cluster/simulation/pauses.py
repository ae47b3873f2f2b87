"""Seconds that a re-forming stops training, by number of ranks: measured at few, extrapolated to many.

Every phase is modelled as base + slope x log2(ranks): rendezvous, barriers and planning go through trees. A
gloo machine cannot measure NCCL, so an assumption states its part: communicator set-up grows with the number of ranks.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from infra.errors import DataError

PHASES = ("abort_s", "form_s", "build_s", "restore_s", "first_step_s")
"""Leave the collectives; new process groups; model and shards set up; state loaded; extra time of the first step."""

NCCL_PER_RANK_S = 30 / 12288
NCCL_SOURCE = (
    "stated, not measured: MegaScale (Jiang et al., NSDI 2024, arXiv 2402.15627) reports group initialisation in "
    "under 5 s at 2,048 GPUs and under 30 s above 10,000, after work on it (1,047 s at 2,048 before); taken as 30 s at "
    "12,288 GPUs and linear in the ranks"
)

RESTORE_S = 1.0
RESTORE_SOURCE = (
    "stated, not measured: 12 bytes per parameter of 405B over 16,384 GPUs is 0.3 GB each; own shards come over PCIe "
    "at 25 GB/s, a replaced node's over one 400 Gb/s link in well under a second; one second leaves room to verify"
)


@dataclass(frozen=True)
class PauseModel:
    """Seconds of one re-forming at n ranks = sum of phases (base + slope x log2 n) + nccl_base + nccl_per_rank x n."""

    base: Mapping[str, float]
    slope: Mapping[str, float]
    nccl_base_s: float = 0.0
    nccl_per_rank_s: float = NCCL_PER_RANK_S
    stated_restore_s: float = RESTORE_S
    source: str = ""
    measured_at: Sequence[int] = field(default_factory=tuple)

    def phase_s(self, phase: str, ranks: int) -> float:
        return self.base[phase] + self.slope[phase] * math.log2(max(ranks, 1))

    def abort_s(self, ranks: int) -> float:
        """Seconds from the decision to the last acknowledgement."""
        return self.phase_s("abort_s", ranks)

    def join_s(self, ranks: int) -> float:
        """Seconds from `Join` to the end of the first step's extra time."""
        own = sum(self.phase_s(phase, ranks) for phase in PHASES if phase != "abort_s")
        return own + self.stated_restore_s + self.nccl_base_s + self.nccl_per_rank_s * ranks

    def pause_s(self, ranks: int) -> float:
        """Seconds of abort and join, without detection."""
        return self.abort_s(ranks) + self.join_s(ranks)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fixed(pause_s: float) -> PauseModel:
    """The same pause at every size (sensitivity studies)."""
    base = dict.fromkeys(PHASES, 0.0) | {"form_s": pause_s}
    return PauseModel(
        base, dict.fromkeys(PHASES, 0.0), nccl_per_rank_s=0.0, stated_restore_s=0.0, source=f"fixed at {pause_s:g} s"
    )


def fit(measurements: Sequence[Mapping[str, float]], nccl_per_rank_s: float = NCCL_PER_RANK_S) -> PauseModel:
    """Fit to rows {"ranks", one number per phase of `PHASES`} at two or more group sizes.

    Robust (Theil-Sen): the slope is the median over pairs of rows of different size, not below 0; the base is the
    median of the residuals. A missing phase is 0 in its row. A measured `restore_s` replaces the stated one.

    Raises:
        DataError: fewer than two different sizes, or a row without `ranks`.
    """
    if any("ranks" not in row or row["ranks"] < 1 for row in measurements):
        raise DataError('pause measurements: every row needs "ranks" of at least 1')
    sizes = sorted({int(row["ranks"]) for row in measurements})
    if len(sizes) < 2:
        raise DataError(f"pause measurements: at least two group sizes are needed, got {sizes}")
    base, slope = {}, {}
    for phase in PHASES:
        points = [(math.log2(row["ranks"]), float(row.get(phase, 0.0))) for row in measurements]
        pairs = [(y2 - y1) / (x2 - x1) for x1, y1 in points for x2, y2 in points if x2 > x1]
        slope[phase] = max(0.0, median(pairs))
        base[phase] = max(0.0, median(y - slope[phase] * x for x, y in points))
    restored = any(row.get("restore_s") for row in measurements)
    return PauseModel(
        base,
        slope,
        nccl_per_rank_s=nccl_per_rank_s,
        stated_restore_s=0.0 if restored else RESTORE_S,
        source=f"fitted to {len(measurements)} pauses measured at {sizes[0]} to {sizes[-1]} ranks",
        measured_at=tuple(sizes),
    )


def load(path: Path, nccl_per_rank_s: float = NCCL_PER_RANK_S) -> PauseModel:
    """Fit to a JSON file: a list of rows, or {"measurements": [...], "nccl_per_rank_s": ...}.

    Raises DataError when the file is missing or malformed.
    """
    try:
        value = json.loads(path.read_text())
        if isinstance(value, dict):
            nccl_per_rank_s = float(value.get("nccl_per_rank_s", nccl_per_rank_s))
            value = value["measurements"]
        rows = [{name: float(number) for name, number in row.items()} for row in value]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not a table of pauses: {error}") from None
    return fit(rows, nccl_per_rank_s)
