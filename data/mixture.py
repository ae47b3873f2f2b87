"""An endless, seeded stream of samples from weighted sources, addressed by position.

Position p of the stream is (source, epoch, index), computed from p alone. Sources are interleaved in shuffled blocks.
Each block holds every source in its share, rounded so that the shares are exact in the long run. Every epoch of a
source is a shuffle of its own of all its samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data.permutation import Indices, key_of, mix, permute
from infra.errors import ConfigError

_WHOLE = 1 << 40
_LEAST_BLOCK = 256


@dataclass(frozen=True)
class Source:
    """A named collection of `size` samples with its share of the stream, e.g. Source("stdlib", 12_000, 0.7)."""

    name: str
    size: int
    weight: float = 1.0


@dataclass(frozen=True)
class SampleIds:
    """n samples: source[i] is the index in the mixture's list of sources, index[i] the sample in it. All int64 [n]."""

    source: Indices
    epoch: Indices
    index: Indices

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, part: slice) -> "SampleIds":
        return SampleIds(self.source[part], self.epoch[part], self.index[part])

    def tuples(self) -> list[tuple[int, int, int]]:
        """[(source, epoch, index)], for journals and tests."""
        return list(zip(self.source.tolist(), self.epoch.tolist(), self.index.tolist(), strict=True))

    def checksum(self) -> int:
        """A sum over the samples, independent of their order; checksums of parts add up to that of the whole. Below
        n * 2^31."""
        mixed = np.zeros(len(self), np.uint64)
        for column in (self.index, self.epoch, self.source):
            mixed = mix(mixed + column.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))  # splitmix64
        return int((mixed >> np.uint64(33)).sum())


class Mixture:
    """The stream over `sources`; equal sources and seed give an equal stream everywhere.

    Raises:
        ConfigError: no source, an empty one, two of one name, or a weight that is not positive.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        _check(sources)
        self.sources = tuple(sources)
        self._seed = seed
        total = sum(source.weight for source in sources)
        ends = np.cumsum([source.weight / total for source in sources])
        self._ends = [round(float(end) * _WHOLE) for end in ends[:-1]] + [_WHOLE]
        smallest = min(np.diff([0, *self._ends]))
        self.block_size = max(_LEAST_BLOCK, -(-2 * _WHOLE // int(smallest)))
        self._cached: tuple[int, Indices, Indices] | None = None

    def samples(self, start: int, count: int) -> SampleIds:
        """The samples at positions [start, start + count)."""
        parts = []
        while count > 0:
            block, offset = divmod(start, self.block_size)
            source, nth = self._block(block)
            taken = min(count, self.block_size - offset)
            parts.append(self._locate(source[offset : offset + taken], nth[offset : offset + taken]))
            start, count = start + taken, count - taken
        columns = [[getattr(part, name) for part in parts] for name in ("source", "epoch", "index")]
        return SampleIds(*(np.concatenate([np.empty(0, np.int64), *column]) for column in columns))

    def _drawn_before(self, block: int) -> list[int]:
        """Samples of each source in all blocks before this one. Rounding the running sum keeps the total exact. A block
        has at least 2 / (smallest share) positions, so that every count rises."""
        bounds = [0] + [block * self.block_size * end // _WHOLE for end in self._ends]
        return [high - low for low, high in pairwise(bounds)]

    def _block(self, block: int) -> tuple[Indices, Indices]:
        """(source [n], how many samples of that source came before [n]) for one block of positions."""
        if self._cached is None or self._cached[0] != block:
            before, after = self._drawn_before(block), self._drawn_before(block + 1)
            quotas = [high - low for low, high in zip(before, after, strict=True)]
            order = permute(np.arange(self.block_size), self.block_size, key_of(self._seed, "block", block))
            source = np.repeat(np.arange(len(quotas), dtype=np.int64), quotas)[order]
            nth = np.empty_like(source)
            for number, (low, high) in enumerate(zip(before, after, strict=True)):
                nth[source == number] = np.arange(low, high)
            self._cached = (block, source, nth)
        return self._cached[1], self._cached[2]

    def _locate(self, source: Indices, nth: Indices) -> SampleIds:
        sizes = np.array([item.size for item in self.sources], dtype=np.int64)
        epoch, place = np.divmod(nth, sizes[source])
        index = np.empty_like(place)
        for number, item in enumerate(self.sources):
            for turn in np.unique(epoch[source == number]):
                chosen = (source == number) & (epoch == turn)
                index[chosen] = permute(place[chosen], item.size, key_of(self._seed, item.name, int(turn)))
        return SampleIds(source, epoch, index)


def _check(sources: Sequence[Source]) -> None:
    if not sources:
        raise ConfigError("mixture: no source; give at least one")
    names = [source.name for source in sources]
    for source in sources:
        if names.count(source.name) > 1:
            raise ConfigError(f"mixture: two sources are called {source.name!r}")
        if source.size < 1:
            raise ConfigError(f"mixture: source {source.name!r} is empty")
        if not 0 < source.weight < float("inf"):
            raise ConfigError(f"mixture: source {source.name!r} has weight {source.weight}; it must be positive")
    total = sum(source.weight for source in sources)
    for source in sources:
        if source.weight / total < 1e-6:
            raise ConfigError(f"mixture: source {source.name!r} has a share below one in a million; leave it out")
