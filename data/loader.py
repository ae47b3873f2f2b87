"""The samples of step k: a function of seed, schedule and k, never of the number of ranks.

The stream of samples (data.mixture) is cut into windows, one global batch each. Step k takes window
`k + skipped_before(k)`; `skipped` are the windows that a policy dropped (NaN, loss spike). A run therefore resumes from
k and the skipped list alone. After any faults it has consumed the windows of the fault-free run minus the skipped ones.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from data.config import BatchSettings
from data.mixture import Mixture, SampleIds, Source

Item = TypeVar("Item", covariant=True)


class Samples(Protocol[Item]):
    """Anything with a length and items by number: a list, a memory-mapped token file."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


class Loader:
    """Sample ids of every step, for all ranks or for one.

    `skipped` are window numbers, in any order. The loader holds no position: any step can be read at any time.
    """

    def __init__(self, mixture: Mixture, batch: BatchSettings, skipped: Iterable[int] = ()) -> None:
        self.mixture = mixture
        self._phases = _phases(batch)
        self._skipped = tuple(sorted(set(skipped)))
        if self._skipped and self._skipped[0] < 0:
            raise ValueError(f"skipped window {self._skipped[0]}: windows are counted from 0")

    def window(self, step: int) -> int:
        """The window of a step: number `step` of the windows that are not skipped."""
        if step < 0:
            raise ValueError(f"step {step}: steps are counted from 0")
        window = step
        for skipped in self._skipped:
            if skipped > window:
                break
            window += 1
        return window

    def batch_size(self, step: int) -> int:
        """Samples in the global batch of a step."""
        return self._phase(self.window(step))[1]

    def batch(self, step: int) -> SampleIds:
        """The global batch of a step, in its fixed order."""
        window = self.window(step)
        first_window, size, first_position = self._phase(window)
        return self.mixture.samples(first_position + (window - first_window) * size, size)

    def share(self, step: int, rank: int, world_size: int) -> SampleIds:
        """One rank's part of the global batch. The shares of all ranks, in order, are the batch.

        Any world size works; shares differ by at most one sample and may be empty.
        """
        first, end = self.share_range(step, rank, world_size)
        return self.batch(step)[first:end]

    def share_range(self, step: int, rank: int, world_size: int) -> tuple[int, int]:
        """The range of a rank's share in the batch: (first, one after the last)."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        size = self.batch_size(step)
        return size * rank // world_size, size * (rank + 1) // world_size

    def micro_batches(self, step: int, rank: int, world_size: int, size: int) -> list[SampleIds]:
        """The share in pieces of at most `size`. Every rank has the same number of pieces, so that all join the same
        collectives.

        The last pieces may be smaller or empty: scale the loss by global token counts, never by pieces.
        """
        if size < 1:
            raise ValueError(f"micro-batch size {size}: must be positive")
        share = self.share(step, rank, world_size)
        largest_share = -(-self.batch_size(step) // world_size)
        return [share[start : start + size] for start in range(0, largest_share, size)]

    def _phase(self, window: int) -> tuple[int, int, int]:
        return self._phases[bisect_right(self._phases, window, key=lambda phase: phase[0]) - 1]


class DataLoader(Generic[Item]):
    """A loader with the samples themselves: `DataLoader({"stdlib": windows}, {"stdlib": 1.0}, ...)`.

    `weights` default to the sizes, which shuffles all samples as one source.
    """

    def __init__(
        self,
        samples: dict[str, Samples[Item]],
        batch: BatchSettings,
        seed: int,
        weights: dict[str, float] | None = None,
        skipped: Iterable[int] = (),
    ) -> None:
        weights = weights or {name: float(len(items)) for name, items in samples.items()}
        if set(weights) != set(samples):
            raise ValueError(f"weights for {sorted(weights)}, samples for {sorted(samples)}: name the same sources")
        self._samples = [samples[name] for name in sorted(samples)]
        sources = [Source(name, len(samples[name]), weights[name]) for name in sorted(samples)]
        self.ids = Loader(Mixture(sources, seed), batch, skipped)

    def batch(self, step: int) -> list[Item]:
        """The samples of the whole global batch."""
        return self.fetch(self.ids.batch(step))

    def micro_batches(self, step: int, rank: int, world_size: int, size: int) -> list[list[Item]]:
        """This rank's samples in equally many pieces on every rank; see `Loader.micro_batches`."""
        return [self.fetch(ids) for ids in self.ids.micro_batches(step, rank, world_size, size)]

    def fetch(self, ids: SampleIds) -> list[Item]:
        return [self._samples[source][index] for source, _, index in ids.tuples()]


def _phases(batch: BatchSettings) -> Sequence[tuple[int, int, int]]:
    """[(first window, batch size, stream position of that window)] of the batch-size schedule."""
    phases = [(0, batch.size, 0)]
    for start, size in batch.growth:
        first, previous_size, position = phases[-1]
        phases.append((start, size, position + (start - first) * previous_size))
    return phases
