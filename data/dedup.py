"""Deduplication: exact copies, near copies (MinHash), and lines that many documents share.

The first of several copies stays, so the result depends only on the order of the documents.
"""

import hashlib
import zlib
from collections import Counter, defaultdict

import numpy as np
from numpy.typing import NDArray

from data.permutation import key_of

_BANDS, _ROWS = 16, 4
_PERMUTATIONS = 128
_SHINGLE_WORDS = 5
_LONG_LINE = 20  # characters; shorter lines ("return None") are shared by chance


class ExactDuplicates:
    """`seen(text)` is True if an earlier text was the same apart from white space."""

    def __init__(self) -> None:
        self._hashes: set[bytes] = set()

    def seen(self, text: str) -> bool:
        digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
        if digest in self._hashes:
            return True
        self._hashes.add(digest)
        return False


class NearDuplicates:
    """`seen(text)` is True if the word 5-grams of an earlier kept text overlap by `threshold` or more (Jaccard).

    MinHash (Broder 1997): 128 hashes per text; the share of equal hashes estimates the Jaccard overlap with a standard
    error of at most 0.045. Candidates share one of 16 bands of 4 of these hashes, which finds an overlap of 0.8 with
    probability 1 - (1 - 0.8**4)**16 > 0.999. Memory: 512 bytes and 16 table entries per kept text.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold {threshold}: must be in (0, 1]")
        self._threshold = threshold
        self._signatures: list[NDArray[np.uint32]] = []
        self._bands: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
        keys = [key_of("minhash", number) for number in range(2 * _PERMUTATIONS)]
        self._factors = np.array(keys[:_PERMUTATIONS], dtype=np.uint64) | np.uint64(1)
        self._offsets = np.array(keys[_PERMUTATIONS:], dtype=np.uint64)

    def seen(self, text: str) -> bool:
        signature = self._signature(text)
        bands = [(band, signature[band * _ROWS : (band + 1) * _ROWS].tobytes()) for band in range(_BANDS)]
        candidates = {number for band in bands for number in self._bands.get(band, ())}
        for number in sorted(candidates):
            if float(np.mean(self._signatures[number] == signature)) >= self._threshold:
                return True
        for band in bands:
            self._bands[band].append(len(self._signatures))
        self._signatures.append(signature)
        return False

    def _signature(self, text: str) -> NDArray[np.uint32]:
        """[128]: the smallest value of each hash over all shingles of the text."""
        shingles = _shingles(text)
        smallest = np.full(_PERMUTATIONS, np.iinfo(np.uint32).max, dtype=np.uint32)
        for start in range(0, len(shingles), 4096):
            part = shingles[start : start + 4096]
            hashed = (part[None, :] * self._factors[:, None] + self._offsets[:, None]) >> np.uint64(32)
            smallest = np.minimum(smallest, hashed.min(axis=1).astype(np.uint32))
        return smallest


class LineDuplicates:
    """Keeps a line of 20 characters or more in the first `documents` texts that have it (Llama 3: 6 per bucket)."""

    def __init__(self, documents: int) -> None:
        if documents < 1:
            raise ValueError(f"documents={documents}: must be positive")
        self._documents = documents
        self._counts: Counter[bytes] = Counter()

    def without_seen_lines(self, text: str) -> str:
        """The text without the lines that `documents` earlier texts had."""
        kept = []
        here: set[bytes] = set()
        for line in text.splitlines(keepends=True):
            plain = " ".join(line.split())
            digest = hashlib.blake2b(plain.encode(), digest_size=8).digest()
            if len(plain) < _LONG_LINE or self._counts[digest] < self._documents:
                kept.append(line)
            if len(plain) >= _LONG_LINE:
                here.add(digest)
        self._counts.update(here)
        return "".join(kept)


def _shingles(text: str) -> NDArray[np.uint64]:
    """A 64-bit hash of every run of five words (of all words if there are fewer), each once."""
    words = np.array([zlib.crc32(word.encode()) for word in text.lower().split()], dtype=np.uint64)
    width = min(_SHINGLE_WORDS, len(words))
    if width == 0:
        return np.zeros(1, dtype=np.uint64)
    rolled = np.zeros(len(words) - width + 1, dtype=np.uint64)
    for place in range(width):
        rolled = (rolled ^ words[place : len(words) - width + 1 + place]) * np.uint64(0x9E3779B97F4A7C15)
        rolled ^= rolled >> np.uint64(29)
    return np.unique(rolled)
