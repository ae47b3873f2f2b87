"""Every second of every rank in one bucket, and the share of the capacity that did useful work.

No bucket is a remainder: unclaimed time is `unattributed_s`, reported apart (aim: under 1%). Capacity that was asked
for but missing (a shrunk group) is `absent_s`. With the buckets they add up to capacity x wall exactly.
Ranks keep their accounts with cluster.goodput.stopwatch; cluster.goodput.accounts keeps them in a run's store.

    goodput = useful computing of all ranks / (capacity asked for x wall)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.errors import DataError

FORMAT = 1
BUCKETS = (
    "init",
    "compute",
    "data_wait",
    "checkpoint_stall",
    "detection",
    "re_forming",
    "recomputed",
    "exposed_communication",
    "pipeline_bubble",
    "idle",
)
"""`compute` is useful work only; work that a fault undid is `recomputed`. `idle`: a live rank without a seat."""


@dataclass(frozen=True)
class Ledger:
    """Rank-seconds by bucket, of one rank or of many.

    Example: one rank for 10 s: Ledger(10.0, {"init": 2.0, "compute": 7.5, "data_wait": 0.4}), 0.1 s unattributed.
    """

    lived_s: float
    """Rank-seconds between the birth and the end of the ranks."""
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.seconds) - set(BUCKETS))
        if unknown:
            raise ValueError(f"no such ledger buckets: {', '.join(unknown)}; known: {', '.join(BUCKETS)}")

    @property
    def unattributed_s(self) -> float:
        """Rank-seconds that no bucket claims."""
        return self.lived_s - sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        seconds = {bucket: round(self.seconds.get(bucket, 0.0), 6) for bucket in BUCKETS}
        return {"format": FORMAT, "lived_s": round(self.lived_s, 6), "seconds": seconds}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Ledger":
        """Raises DataError for another format or unknown buckets."""
        if value.get("format") != FORMAT:
            raise DataError(f"goodput ledger: format {value.get('format')!r}, this version reads {FORMAT}")
        try:
            return Ledger(float(value["lived_s"]), {name: float(s) for name, s in value["seconds"].items()})
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"goodput ledger: {error}") from None


def merge(ledgers: Iterable[Ledger]) -> Ledger:
    """The sum of the ranks' ledgers."""
    lived, seconds = 0.0, dict.fromkeys(BUCKETS, 0.0)
    for ledger in ledgers:
        lived += ledger.lived_s
        for bucket, value in ledger.seconds.items():
            seconds[bucket] += value
    return Ledger(lived, seconds)


@dataclass(frozen=True)
class Goodput:
    """A group's account. All seconds are rank-seconds. `capacity`: ranks asked for, spares included (if it changed, the
    mean over the wall time); `spares`: how many of them are spares."""

    ledger: Ledger
    capacity: float
    wall_s: float
    spares: float = 0.0

    @property
    def goodput(self) -> float:
        total = self.capacity * self.wall_s
        return self.ledger.seconds.get("compute", 0.0) / total if total else 0.0

    @property
    def goodput_without_spares(self) -> float:
        """As if the spares had cost nothing."""
        total = (self.capacity - self.spares) * self.wall_s
        return self.ledger.seconds.get("compute", 0.0) / total if total > 0 else 0.0

    @property
    def absent_s(self) -> float:
        """Capacity asked for that had no process."""
        return self.capacity * self.wall_s - self.ledger.lived_s

    def to_json(self) -> dict[str, Any]:
        total = self.capacity * self.wall_s or 1.0
        shares = {bucket: self.ledger.seconds.get(bucket, 0.0) / total for bucket in BUCKETS}
        shares |= {"absent": self.absent_s / total, "unattributed": self.ledger.unattributed_s / total}
        return {
            "goodput": round(self.goodput, 6),
            "goodput_without_spares": round(self.goodput_without_spares, 6),
            "capacity": self.capacity,
            "spares": self.spares,
            "wall_s": round(self.wall_s, 3),
            "shares": {name: round(share, 6) for name, share in shares.items()},
            "ledger": self.ledger.to_json(),
        }

    def to_text(self) -> str:
        """One line per share of the capacity, largest first; the unattributed share is always among them."""
        shares = sorted(self.to_json()["shares"].items(), key=lambda item: -item[1])
        shown = [(name, share) for name, share in shares if abs(share) >= 5e-6 or name == "unattributed"]
        rows = [f"  {name.replace('_', ' '):<24}{share:>9.3%}" for name, share in shown]
        head = f"goodput {self.goodput:.4f} of {self.capacity:g} ranks over {self.wall_s:.1f} s"
        if self.spares:
            head += f"; {self.goodput_without_spares:.4f} of the {self.capacity - self.spares:g} that are no spares"
        return "\n".join([head, *rows])
