"""Whole-number arithmetic. Digits are single tokens, so "What is 12+34?" is about nine tokens."""

from random import Random

from data.config import TaskSettings
from data.tasks.problem import Draw, TaskKind


def kinds(settings: TaskSettings) -> list[TaskKind]:
    """The reasoning/* kinds at the sizes of `settings`."""

    def addition(rng: Random) -> Draw:
        a, b = _number(rng, settings.addition_digits), _number(rng, settings.addition_digits)
        return Draw(_unordered(a, b), f"What is {a}+{b}?", str(a + b), str(abs(a - b)))

    def subtraction(rng: Random) -> Draw:
        a, b = _number(rng, settings.subtraction_digits), _number(rng, settings.subtraction_digits)
        a, b = max(a, b), min(a, b)
        return Draw(f"{a} {b}", f"What is {a}-{b}?", str(a - b), str(a + b))

    def multiplication(rng: Random) -> Draw:
        a, b = _number(rng, settings.multiplication_digits), _number(rng, 1)
        return Draw(_unordered(a, b), f"What is {a}*{b}?", str(a * b), str(a + b))

    def compare(rng: Random) -> Draw:
        a, b = _number(rng, settings.compare_digits), _number(rng, settings.compare_digits)
        return Draw(_unordered(a, b), f"Which is larger, {a} or {b}?", str(max(a, b)))

    def successor(rng: Random) -> Draw:
        a = _number(rng, settings.successor_digits)
        return Draw(str(a), f"What comes after {a}?", str(a + 1), str(a - 1))

    def parity(rng: Random) -> Draw:
        a = _number(rng, settings.successor_digits)
        return Draw(str(a), f"Is {a} even or odd?", "odd" if a % 2 else "even")

    drawers = (addition, subtraction, multiplication, compare, successor, parity)
    return [TaskKind(f"reasoning/{drawer.__name__}", drawer) for drawer in drawers]


def _number(rng: Random, digits: int) -> int:
    return rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def _unordered(a: int, b: int) -> str:
    return f"{min(a, b)} {max(a, b)}"
