"""String operations, written so that a small BPE gives one token per symbol.

Digit strings have one token per digit. Letters are spaced ("k t a p"), because the BPE would merge unspaced letters.
"""

from random import Random

from data.config import TaskSettings
from data.tasks.problem import Draw, TaskKind


def kinds(settings: TaskSettings) -> list[TaskKind]:
    """The strings/* kinds at the sizes of `settings`."""
    joiner = "" if settings.string_symbols == "digits" else " "
    symbols = "0123456789" if settings.string_symbols == "digits" else settings.letters_alphabet

    def reverse(rng: Random) -> Draw:
        forward = rng.choices(symbols, k=settings.string_length)
        text, answer = joiner.join(forward), joiner.join(reversed(forward))
        return Draw(min(text, answer), f"Reverse {text}.", answer, text)

    def sort(rng: Random) -> Draw:
        drawn = rng.choices(symbols, k=settings.string_length)
        answer = joiner.join(sorted(drawn))
        return Draw(answer, f"Sort {joiner.join(drawn)}.", answer, joiner.join(sorted(drawn, reverse=True)))

    def first_letter(rng: Random) -> Draw:
        text = _spaced(rng, settings)
        return Draw(text, f"First letter of {text}?", text[0], text[-1])

    def last_letter(rng: Random) -> Draw:
        text = _spaced(rng, settings)
        return Draw(text, f"Last letter of {text}?", text[-1], text[0])

    def upper(rng: Random) -> Draw:
        text = _spaced(rng, settings)
        return Draw(text, f"Upper case of {text}?", text.upper(), text)

    def count_letter(rng: Random) -> Draw:
        letter = rng.choice(settings.letters_alphabet)
        letters = rng.choices(settings.letters_alphabet, k=settings.letters_length)
        letters = [letter if rng.random() < 0.4 else other for other in letters]
        text = " ".join(letters)
        number = letters.count(letter)
        return Draw(f"{letter} in {text}", f"How many {letter} in {text}?", str(number), str(len(letters) - number))

    drawers = (reverse, sort, first_letter, last_letter, upper, count_letter)
    return [TaskKind(f"strings/{drawer.__name__}", drawer) for drawer in drawers]


def _spaced(rng: Random, settings: TaskSettings) -> str:
    return " ".join(rng.choices(settings.letters_alphabet, k=settings.letters_length))
