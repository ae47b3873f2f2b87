"""Settings of the corpus, the generated tasks, packing and the loader. Imports neither torch nor ray."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from infra.config import Settings


class TaskSettings(Settings):
    """Generated tasks with checkable answers. The sizes decide how hard each kind is for a small model."""

    kinds: dict[str, Annotated[float, Field(ge=0, le=1e9)]] = Field(
        default={
            "reasoning/addition": 4.0,
            "reasoning/subtraction": 2.0,
            "reasoning/compare": 1.0,
            "reasoning/successor": 1.0,
            "strings/reverse": 2.0,
            "strings/sort": 1.0,
            "strings/last_letter": 1.0,
            "strings/count_letter": 1.0,
            "strings/upper": 1.0,
            "stdlib/kind_of": 0.5,
            "stdlib/module_of": 0.5,
        }
    )
    """Task kind -> weight: the share of problems drawn from it. Known kinds: `data.tasks.kind_names()`."""

    addition_digits: int = Field(default=2, ge=1, le=12)
    """Digits of each operand of reasoning/addition (exactly this many; one digit includes 0)."""

    subtraction_digits: int = Field(default=2, ge=1, le=12)
    """Digits of each operand of reasoning/subtraction; the result is never negative."""

    multiplication_digits: int = Field(default=2, ge=1, le=12)
    """Digits of the first operand of reasoning/multiplication; the second has one digit."""

    compare_digits: int = Field(default=2, ge=1, le=12)
    """Digits of the two numbers in reasoning/compare."""

    successor_digits: int = Field(default=3, ge=1, le=12)
    """Digits of the number of reasoning/successor and reasoning/parity."""

    string_length: int = Field(default=4, ge=2, le=32)
    """Symbols in the string of strings/reverse and strings/sort."""

    string_symbols: Literal["digits", "letters"] = "digits"
    """What strings/reverse and strings/sort work on. Digits are always one token each."""

    letters_length: int = Field(default=4, ge=2, le=32)
    """Spaced letters in strings/upper, first_letter, last_letter and count_letter."""

    letters_alphabet: str = Field(default="abcdefghijklmnopqrstuvwxyz", min_length=2)
    """Letters that the spaced-letter tasks draw from; fewer letters make them easier."""

    @field_validator("kinds")
    @classmethod
    def _some_kind(cls, kinds: dict[str, float]) -> dict[str, float]:
        if not any(kinds.values()):
            raise ValueError("no kind has a positive weight")
        return kinds

    @field_validator("letters_alphabet")
    @classmethod
    def _letters(cls, alphabet: str) -> str:
        if len(set(alphabet)) < 2 or not alphabet.isalpha():
            raise ValueError(f"{alphabet!r} must consist of letters, at least two different ones")
        return alphabet


class CleaningSettings(Settings):
    """What cleaning removes from pretraining text. The corpus summary counts removals by reason."""

    enabled: bool = True
    """Whether text is cleaned at all."""

    min_characters: int = Field(default=40, ge=0)
    """Shorter documents are left out."""

    min_letter_share: float = Field(default=0.4, ge=0, le=1)
    """Smallest share of letters among the characters other than spaces; tables and dumps have fewer."""

    max_repeated_line_share: float = Field(default=0.5, ge=0, le=1)
    """Largest share of a document's non-empty lines that repeat an earlier line of it."""

    max_mean_word: float = Field(default=25.0, gt=0)
    """Longest mean word length in characters; encoded data has no words."""

    line_documents: int = Field(default=0, ge=0)
    """A line of 20 characters or more stays in this many documents and is removed from all later ones (boilerplate of
    web pages); 0 keeps all lines, which is right for source code."""

    near_duplicate: float = Field(default=0.8, gt=0, le=1)
    """Documents whose word 5-grams overlap (Jaccard, estimated by MinHash) by at least this with an earlier document
    are left out; 1.0 removes exact copies only."""


class CorpusSettings(Settings):
    """Pretraining text and instructions from Python's own standard library."""

    stdlib_bytes: int = Field(default=4_000_000, ge=0)
    """Most bytes (UTF-8) of standard-library text; 0 takes none."""

    stdlib_parts: tuple[Literal["source", "docstring", "help"], ...] = ("source", "docstring", "help")
    """Kinds of documents: whole source files, single docstrings, help texts of compiled functions."""

    files: tuple[str, ...] = ()
    """More pretraining text: JSONL or parquet files with `text`, folders, globs, or `datasets:NAME` (data.formats)."""

    held_out_share: float = Field(default=0.02, ge=0, lt=1)
    """Share of documents, chosen by a hash of their text, that is held out for the validation loss; at least one
    document if there are two or more."""

    instruction_chars: int = Field(default=60, ge=10)
    """Longest answer, in characters, of an instruction made from a docstring; longer first lines are left out."""

    cleaning: CleaningSettings = CleaningSettings()
    """Filters and deduplication."""


class PackingSettings(Settings):
    """Putting several sequences into one row of fixed length."""

    length: int = Field(default=256, ge=2)
    """Tokens per row."""

    too_long: Literal["error", "drop", "keep_start", "keep_end"] = "error"
    """What happens to a sequence longer than a row: an error, dropping it, or cutting one end off. The packed result
    lists every sequence that was dropped or cut."""


def _rising(growth: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    starts = [0, *(start for start, _ in growth)]
    if any(later <= earlier for earlier, later in pairwise(starts)) or any(size < 1 for _, size in growth):
        raise ValueError("windows must rise from 1 on and sizes must be positive")
    return growth


Growth = Annotated[tuple[tuple[int, int], ...], AfterValidator(_rising)]
"""(first window, size) pairs in rising order of windows."""


class BatchSettings(Settings):
    """The size of the global batch over time."""

    size: int = Field(default=32, ge=1)
    """Samples in the global batch, over all ranks."""

    growth: Growth = ()
    """(first window, size) pairs in rising order: from that window on the global batch has that size. Windows and steps
    have the same numbers until a window is skipped."""
