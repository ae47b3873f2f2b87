"""Which faults hit a pretraining, and when: a function of the seed, without Ray or torch.

A fault waits at a named point (see `actors.pretrain_points`) of one rank. Kinds of the process itself happen right
there. For the others the rank stands still there for a moment, and the campaign does the rest from outside: it kills
nodes, drivers and agents, flips bits, drains, disturbs the store.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

PHASES = ("compute", "snapshot", "recovery", "flush", "data")
STEPS = 60
FLUSH_EVERY = 8
FIRST_STEP = 4
INSIDE = {"kill": "kill", "stop": "stop", "spin": "spin", "lock": "lock", "deadlock": "deadlock"}
"""Kinds that a rank does to itself, and how the schedule calls them."""
OUTSIDE = ("node", "raylet", "agent", "driver", "driver-stop", "flip", "wipe", "drain", "sigterm", "store")
VALUES = ("nan", "spike")
"""Kinds that are in the data: they have no phase but compute."""
KINDS = (*INSIDE, "slow", "two", *OUTSIDE, *VALUES)
HARMLESS = ("slow", "store", "driver", "driver-stop", "agent")
"""Kinds that end no rank."""
WEIGHTS = {
    "kill": 3.0,
    "node": 1.5,
    "flip": 1.5,
    "two": 1.5,
    "driver": 1.5,
    "drain": 0.7,
    "sigterm": 0.7,
    "raylet": 0.7,
}
HOLD_S = 1.2
"""How long a rank stands still for a fault from outside; longer than the campaign takes to see it there."""
SLOW_STEPS = 10
BAD_WINDOWS = {"nan": (23, 24), "spike": (27, 28, 29)}
"""Windows of bad data: always the same ones, so that few fault-free runs suffice to compare with."""


@dataclass(frozen=True)
class Fault:
    """`at` is a step, in the phase recovery a generation; `rank` is hit, or holds still there; `moment` is the name of
    the point; `other` is a second rank, or a detail that the kind draws."""

    kind: str
    phase: str
    at: int
    rank: int
    moment: str
    other: int = 0

    @property
    def point(self) -> str:
        scope = "generation" if self.phase == "recovery" else "step"
        return f"pretrain.{scope}-{self.at}.rank-{self.rank}.{self.moment}"

    def entries(self) -> list[str]:
        """For `infra.faults`."""
        if self.kind in VALUES:
            return [f"pretrain.window-{window}.loss:*={self.kind}" for window in BAD_WINDOWS[self.kind]]
        if self.kind in INSIDE:
            return [f"{self.point}:1={INSIDE[self.kind]}"]
        if self.kind == "two":
            second = replace(self, rank=self.other).point
            return [f"{self.point}:1=kill", f"{second}:1={'stop' if self.at % 2 else 'kill'}"]
        if self.kind == "slow" and self.phase in ("compute", "data", "snapshot"):
            steps = range(self.at, self.at + SLOW_STEPS)
            return [f"{replace(self, at=step).point}:1=delay-0.3" for step in steps]
        return [f"{self.point}:1=delay-{HOLD_S}"]

    def __str__(self) -> str:
        return f"{self.kind} in {self.phase} at {self.at} on {self.rank}"


@dataclass(frozen=True)
class Variant:
    """How the model is sharded; `ranks` in all."""

    name: str
    ranks: int
    settings: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant("replicate", 3),
    Variant("fsdp", 4, {"sharding": "fsdp"}),
    Variant("hybrid", 4, {"sharding": "fsdp", "shard_over": 2}),
    Variant("tensor", 4, {"sharding": "fsdp", "tensor_parallel": 2}),
    Variant("pipeline", 4, {"sharding": "fsdp", "pipeline_parallel": 2, "micro_batch_size": 1}),
)
TWO_BLOCKS = ("tensor", "pipeline")


@dataclass(frozen=True)
class Schedule:
    """One run. `shrinks`: it may go on with fewer ranks; `spares`: warm replacements; `s3`: flushes go there."""

    seed: int
    variant: Variant
    shrinks: bool
    spares: int
    s3: bool
    faults: tuple[Fault, ...]

    @classmethod
    def of(cls, seed: int, kinds: Sequence[str] = KINDS) -> "Schedule":
        chance = random.Random(seed)
        variant = chance.choices(VARIANTS, [3, 4, 1, 2, 1])[0]
        s3 = chance.random() < 0.4
        known = [kind for kind in kinds if s3 or kind != "store"]
        drawn = chance.choices(known, [WEIGHTS.get(kind, 1.0) for kind in known], k=chance.choice([4, 5, 6, 7, 8]))
        found: list[Fault] = []
        for kind in drawn:
            if kind in VALUES and any(one.kind in VALUES for one in found):
                kind = "kill"  # one stretch of bad data per run: a second one would need a reference of its own
            found.append(_fault(kind, variant, chance))
        return cls(seed, variant, chance.random() < 0.6, int(chance.random() < 0.5), s3, _in_turn(found))

    def quiet(self) -> "Schedule":
        """The run to compare with: the same data, bad windows included, and nothing else happens."""
        faults = tuple(fault for fault in self.faults if fault.kind in VALUES)
        return replace(self, seed=-1, shrinks=False, spares=0, s3=False, faults=faults)

    @property
    def text(self) -> str:
        """For `infra.faults`."""
        entries = dict.fromkeys(entry for fault in self.faults for entry in fault.entries())
        return ",".join({entry.rpartition("=")[0]: entry for entry in reversed(entries)}.values())


def _fault(kind: str, variant: Variant, chance: random.Random) -> Fault:
    phase = "compute" if kind in VALUES else chance.choice(PHASES)
    rank = chance.randrange(variant.ranks)
    other = (rank + chance.randrange(1, variant.ranks)) % variant.ranks
    at = chance.randrange(FIRST_STEP, STEPS - SLOW_STEPS)
    moment = phase
    if phase == "flush":
        at = chance.randrange(1, (STEPS - SLOW_STEPS) // FLUSH_EVERY) * FLUSH_EVERY
    elif phase == "recovery":
        moment = chance.choice(["join", "load"])
    if kind == "wipe":
        at = max(at, 2 * FLUSH_EVERY) if phase != "flush" else max(at, 3 * FLUSH_EVERY)
    if kind in VALUES:
        at = BAD_WINDOWS[kind][0]
    return Fault(kind, phase, at, rank, moment, other)


def _in_turn(faults: list[Fault]) -> tuple[Fault, ...]:
    """By step; the n-th fault in a recovery waits for the generation that the faults before it lead to."""
    by_step = sorted((fault for fault in faults if fault.phase != "recovery"), key=lambda fault: fault.at)
    during = [fault for fault in faults if fault.phase == "recovery"]
    deadly = sum(fault.kind not in HARMLESS for fault in by_step)
    if during and not deadly:
        by_step.insert(0, Fault("kill", "compute", FIRST_STEP, during[0].rank, "compute"))
    placed = [replace(fault, at=2 + number % max(1, deadly)) for number, fault in enumerate(during)]
    return (*by_step, *placed)
