"""One made problem, the kinds that make them, and the line between training and held-out problems."""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from data.permutation import key_of

Split = Literal["train", "held_out"]

HELD_OUT_SHARE = 1 / 8
"""Share of each kind's operands that is held out. A constant and not a setting: two recipes that disagreed on it would
leak held-out problems into training."""


@dataclass(frozen=True)
class Problem:
    """A prompt with its proper answer, e.g. Problem("What is 12+34?", "46", "reasoning/addition").

    `checkable` is True when `verify` decides exactly whether an answer is right. `unsafe` is None outside the safety
    family, True for a request to refuse and False for a harmless look-alike. `misread` is what somebody answers who
    reads the question carelessly (sorts downwards, leaves the text as it is), None where there is no such answer.
    """

    prompt: str
    answer: str
    task_type: str
    checkable: bool = True
    unsafe: bool | None = None
    misread: str | None = None

    def to_row(self) -> dict[str, Any]:
        """A JSON object; `from_row` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_row(row: dict[str, Any]) -> "Problem":
        return Problem(**row)


@dataclass(frozen=True)
class Draw:
    """One drawn problem before it is dealt to a side.

    `operands` is canonical: problems that give each other away (a+b and b+a) have equal operands, so they always fall
    on the same side.
    """

    operands: str
    prompt: str
    answer: str
    misread: str | None = None


@dataclass(frozen=True)
class TaskKind:
    """A two-level task type, e.g. "reasoning/addition", and how to draw one problem of it from a seeded generator."""

    name: str
    draw: Callable[[random.Random], Draw]
    checkable: bool = True
    unsafe: bool | None = None

    def problem(self, draw: Draw) -> Problem:
        return Problem(draw.prompt, draw.answer, self.name, self.checkable, self.unsafe, draw.misread)


def side_of(scope: str, operands: str) -> Split:
    """Which side canonical operands fall on: a stable hash decides, the same on every machine and for every seed."""
    return "held_out" if key_of(scope, operands) < HELD_OUT_SHARE * 2**64 else "train"
