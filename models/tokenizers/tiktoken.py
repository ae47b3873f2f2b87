"""Llama 3's tokenizer.model: one `base64(bytes) rank` per line, special tokens after the last rank."""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tiktoken
import tokenizers
from tokenizers import decoders
from tokenizers import models as tokenizer_models

from infra.errors import CheckpointError
from models.tokenizers.base import LLAMA3_SPLIT, Tokenizer, add_specials, byte_level, llama3_specials

MAX_ENCODE_CHARS = 400_000
"""tiktoken's Rust code panics on longer strings."""
MAX_RUN_CHARS = 25_000
"""Its regex overflows the stack on longer runs of spaces, or of anything but spaces."""


class TiktokenTokenizer(Tokenizer):
    """Encodes with tiktoken itself, in slices, and gives the ids of Meta's own code for texts of any length."""

    def __init__(self, ranks: Mapping[bytes, int]) -> None:
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise CheckpointError("tokenizer.model: ranks must count 0, 1, 2, ... without gaps")
        self._ranks = dict(ranks)
        names = llama3_specials()
        specials = {name: len(ranks) + index for index, name in enumerate(names)}
        super().__init__(specials, len(ranks) + len(specials), bos=names[0], eos=names[1])

    @classmethod
    def from_file(cls, file: Path) -> "TiktokenTokenizer":
        """Read a tokenizer.model. Raises CheckpointError with file:line for a malformed line."""
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(file.read_bytes().splitlines(), start=1):
            if not line:
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise CheckpointError(f"{file}:{number}: expected `base64 rank`, got {line[:60]!r}") from None
        return cls(ranks)

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=self._ranks, special_tokens=self.specials
        )

    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        allowed = set(self.specials) if allow_special else set()
        return [
            [
                token
                for piece in slices(text)
                for token in self._encoding.encode(piece, allowed_special=allowed, disallowed_special=())
            ]
            for text in texts
        ]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        first_special = len(self._ranks)
        return self._encoding.decode([i for i in ids if not (skip_special and i >= first_special)])

    def to_backend(self) -> tokenizers.Tokenizer:
        """Ranks become vocabulary and merges; `ignore_merges`, because a whole word with a rank is one token."""
        letters = _byte_letters()
        names = {token: "".join(letters[byte] for byte in token) for token in self._ranks}
        vocabulary = {names[token]: rank for token, rank in self._ranks.items()}
        merges = []
        for token in sorted(self._ranks, key=self._ranks.__getitem__):
            if len(token) > 1 and (pair := _last_merge(token, self._ranks)):
                merges.append((names[pair[0]], names[pair[1]]))
        backend = tokenizers.Tokenizer(tokenizer_models.BPE(vocabulary, merges, ignore_merges=True))
        backend.pre_tokenizer = byte_level(LLAMA3_SPLIT)
        backend.decoder = decoders.ByteLevel()
        add_specials(backend, llama3_specials(), bos=self.bos)
        return backend


def slices(text: str, max_chars: int = MAX_ENCODE_CHARS, max_run: int = MAX_RUN_CHARS) -> Iterator[str]:
    """Cut `text` every `max_chars`, and each part again after every `max_run` of a run of spaces or of non-spaces.

    The concatenated slices are the text. (The rule of Meta's llama3 tokenizer.)
    """
    for start in range(0, len(text), max_chars):
        part = text[start : start + max_chars]
        cut = 0
        for run in re.finditer(r"\s+|\S+", part):
            for edge in range(run.start() + max_run, run.end(), max_run):
                yield part[cut:edge]
                cut = edge
        yield part[cut:]


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts into which byte-pair merging with ranks below the token's own turns it; None if it leaves more."""
    parts = [bytes([byte]) for byte in token]
    limit = ranks[token]
    while len(parts) > 2:
        candidates = [(ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)]
        rank, index = min(candidates)
        if rank >= limit:
            return None
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts[0], parts[1]


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte: visible Latin-1 bytes stand for themselves, all others map to U+0100 and above."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]
