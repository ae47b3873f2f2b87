"""A generated problem, the kinds of problems, and the split into training and held-out problems."""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from data.permutation import key_of

Split = Literal["train", "held_out"]

HELD_OUT_SHARE = 1 / 8
"""Share of each kind's operands that is held out. A constant, not a setting: two recipes with different shares would
leak held-out problems into training."""


@dataclass(frozen=True)
class Problem:
    """A prompt with its proper answer, e.g. Problem("What is 12+34?", "46", "reasoning/addition").

    `checkable` is True if `verify` decides exactly whether an answer is right. `unsafe` is None outside the safety
    family, True for a request to refuse and False for a harmless look-alike. `misread` is the answer of a careless
    reader (who sorts downwards, or leaves the text as it is); None if there is no such answer.
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
    """One drawn problem before it is assigned to a split.

    `operands` is canonical: problems that reveal each other's answer (a+b and b+a) have equal operands, and so belong
    to the same split.
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
    """The split of canonical operands, by a hash that is the same on every machine and for every seed."""
    return "held_out" if key_of(scope, operands) < HELD_OUT_SHARE * 2**64 else "train"
