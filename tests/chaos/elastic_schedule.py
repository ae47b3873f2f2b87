"""Which faults hit a pretraining, and when: a function of the seed, without Ray or torch.

A fault waits at a named point (see `actors.pretrain.fault_points`) of one rank. Kinds of the process itself happen
right there. For the others the rank stands still there for a moment, and the campaign does the rest from outside: it
kills nodes, drivers and agents, flips bits, drains, disturbs the store.

Faults are dealt like cards: each of the cells (kind x phase) once to the `HANDS` runs of a deck, then again. So any
stretch of seeds has about as many of each.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

DRAWING = 2
"""Grows when a seed is another schedule than before; replay older runs with the code of their commit."""
PHASES = ("compute", "snapshot", "recovery", "flush", "data")
STEPS = 60
FLUSH_EVERY = 8
FIRST_STEP, LAST_STEP = 4, 50
INSIDE = {"kill": "kill", "stop": "stop", "spin": "spin", "lock": "lock", "deadlock": "deadlock"}
"""Kinds that a rank does to itself, and how the schedule calls them."""
OUTSIDE = ("node", "raylet", "agent", "driver", "driver-stop", "flip", "wipe", "drain", "notice", "sigterm", "store")
VALUES = ("nan", "spike")
"""Kinds that are in the data: they have no phase but compute."""
SILENT = ("weights", "answer")
"""A bit of one rank's weights flips, or it computes wrongly for a while, and nothing else is wrong: in compute too."""
KINDS = (*INSIDE, "slow", "two", *OUTSIDE, *VALUES, *SILENT)
CELLS = tuple(
    (kind, phase) for kind in KINDS for phase in PHASES if phase == "compute" or kind not in (*VALUES, *SILENT)
)
HARMLESS = ("slow", "store", "driver", "driver-stop", "agent")
"""Kinds that end no rank."""
HANDS = 6
HOLD_S = 1.2
"""How long a rank stands still for a fault from outside; longer than the campaign takes to see it there."""
SLOW_STEPS = 6
BAD_WINDOWS = {"nan": (23, 24), "spike": (27, 28, 29)}
"""Windows of bad data: always the same ones, so that few fault-free runs suffice to compare with."""
VERIFY_EVERY = 8
WRONG_STEPS = (12, 13, 14, 15)
"""Between two verifications. What happens then spreads: a second fault there could bring the wrong state to others."""
VERDICT_S = (17, 2.5)
"""The step at which ranks wait for the verdict, and how long; other faults come later."""


@dataclass(frozen=True)
class Fault:
    """`at` is a step, in the phase recovery a generation; the rank in `seat` (modulo the ranks that there are then) is
    hit, or holds still there; `moment` is the name of the point; `other` is a second seat, or a detail that the kind
    draws."""

    kind: str
    phase: str
    at: int
    seat: int
    moment: str
    other: int = 0

    @property
    def point(self) -> str:
        scope = "generation" if self.phase == "recovery" else "step"
        return f"pretrain.{scope}-{self.at}.seat-{self.seat}.{self.moment}"

    @property
    def second(self) -> str:
        """The other point of two faults at once."""
        return replace(self, seat=self.other).point

    def entries(self) -> list[str]:
        """For `infra.fault_injection`."""
        if self.kind in VALUES:
            return [f"pretrain.window-{window}.loss:*={self.kind}" for window in BAD_WINDOWS[self.kind]]
        if self.kind in SILENT:
            wait = f"pretrain.step-{VERDICT_S[0]}.seat-0.data:1=delay-{VERDICT_S[1]}"
            steps = WRONG_STEPS if self.kind == "answer" else [self.at]
            return [*(f"{replace(self, at=step).point}:1=flip" for step in steps), wait]
        if self.kind in INSIDE:
            return [f"{self.point}:1={INSIDE[self.kind]}"]
        if self.kind == "two":
            return [f"{self.point}:1=kill", f"{self.second}:1={'stop' if self.at % 2 else 'kill'}"]
        if self.kind == "slow" and self.phase in ("compute", "data", "snapshot"):
            steps = range(self.at, self.at + SLOW_STEPS)
            return [f"{replace(self, at=step).point}:1=delay-0.3" for step in steps]
        return [f"{self.point}:1=delay-{HOLD_S}"]

    def __str__(self) -> str:
        return f"{self.kind} in {self.phase} at {self.at} on {self.seat}"


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
    def of(cls, seed: int) -> "Schedule":
        cells = _dealt(*divmod(seed, HANDS))
        chance = random.Random(seed)
        silent = any(kind in SILENT for kind, _ in cells)
        # Who is wrong is told by a majority of ranks that hold the same: three replicas, all of them there.
        variant = VARIANTS[0] if silent else chance.choices(VARIANTS, [2, 4, 1, 2, 1])[0]
        shrinks, spares = not silent and chance.random() < 0.6, int(chance.random() < 0.5)
        s3 = any(kind == "store" for kind, _ in cells) or chance.random() < 0.2
        return cls(seed, variant, shrinks, spares, s3, _placed(cells, variant, chance))

    @property
    def skipped(self) -> list[int]:
        """Windows of bad data, which nobody shall train on."""
        return sorted({window for fault in self.faults if fault.kind in VALUES for window in BAD_WINDOWS[fault.kind]})

    @property
    def text(self) -> str:
        """For `infra.fault_injection`."""
        return ",".join(dict.fromkeys(entry for fault in self.faults for entry in fault.entries()))

    def has(self, kinds: Sequence[str]) -> bool:
        return any(fault.kind in kinds for fault in self.faults)


Cell = tuple[str, str]


def _dealt(deck: int, hand: int) -> list[Cell]:
    """The cells of one run. At most one kind of bad data in each: a second one would need a reference of its own."""
    chance = random.Random(f"deck {deck}")
    alone = [cell for cell in CELLS if cell[0] in (*VALUES, *SILENT)]
    cells = [cell for cell in CELLS if cell not in alone]
    chance.shuffle(cells)
    chance.shuffle(alone)
    return [*alone[hand : hand + 1], *cells[hand::HANDS]]


def _placed(cells: Sequence[Cell], variant: Variant, chance: random.Random) -> tuple[Fault, ...]:
    """By step, no two at one point; the n-th fault in a recovery waits for the n-th recovery."""
    by_step = [cell for cell in cells if cell[1] != "recovery"]
    during = sorted((cell for cell in cells if cell[1] == "recovery"), key=lambda cell: cell[0] == "wipe")
    deadly = sum(kind not in HARMLESS for kind, _ in by_step)
    found: list[Fault] = []
    taken: set[str] = set()
    first = VERDICT_S[0] + 1 if any(kind in SILENT for kind, _ in cells) else FIRST_STEP
    for kind, phase in by_step:
        _add(found, taken, _tries(kind, phase, first, variant, chance))
    for number, (kind, _) in enumerate(during):
        at = 2 + number % max(1, deadly)
        tries = (Fault(kind, "recovery", at, *_seats(variant, chance)) for _ in range(100))
        _add(found, taken, (replace(one, moment=chance.choice(["join", "load"])) for one in tries))
    return tuple(sorted(found, key=lambda fault: (fault.phase == "recovery", fault.at)))


def _tries(kind: str, phase: str, first: int, variant: Variant, chance: random.Random) -> Iterator[Fault]:
    """Places for a fault, drawn until one is free."""
    last = LAST_STEP - SLOW_STEPS if kind == "slow" else LAST_STEP
    if kind == "wipe":  # something must be in the store by then
        first = max(first, 3 * FLUSH_EVERY)
    steps = [step for step in range(first, last + 1) if phase != "flush" or step % FLUSH_EVERY == 0]
    for _ in range(1000):
        seat, _, other = _seats(variant, chance)
        at, moment = chance.choice(steps), phase
        if kind in VALUES:
            at = BAD_WINDOWS[kind][0]
        elif kind in SILENT:
            at, moment = WRONG_STEPS[0], kind
        yield Fault(kind, phase, at, seat, moment, other)


def _seats(variant: Variant, chance: random.Random) -> tuple[int, str, int]:
    """One to hit, another one."""
    seat = chance.randrange(variant.ranks)
    return seat, "", (seat + chance.randrange(1, variant.ranks)) % variant.ranks


def _add(found: list[Fault], taken: set[str], tries: Iterator[Fault]) -> None:
    for fault in tries:
        points = {entry.rpartition(":")[0] for entry in fault.entries()}
        if not points & taken:
            taken |= points
            found.append(fault)
            return
    raise AssertionError("no free place for a fault")
