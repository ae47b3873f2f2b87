"""Confidence in a measured accuracy: bootstrap over problems (Efron 1979). numpy only; equal seeds, equal numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Interval:
    """A mean and its percentile interval, e.g. 0.412 in (0.381, 0.443)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """mean(b) - mean(a) over the same problems, and its bootstrap standard error, e.g. 0.151 with 0.016."""

    mean: float
    standard_error: float


def mean_interval(scores: ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of the mean of `scores` [N].

    Raises:
        ValueError: no scores.
    """
    values = _scores(scores)
    means = _resampled_means(values, resamples, seed)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(before: ArrayLike, after: ArrayLike, resamples: int = 2000, seed: int = 0) -> Difference:
    """`after` minus `before`, both [N] over the same problems in the same order; problems are resampled as pairs.

    Raises:
        ValueError: no scores, or different lengths.
    """
    first, second = _scores(before), _scores(after)
    if len(first) != len(second):
        raise ValueError(f"paired scores must have the same length, got {len(first)} and {len(second)}")
    differences = second - first
    means = _resampled_means(differences, resamples, seed)
    return Difference(float(differences.mean()), float(means.std(ddof=1)))


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the unbiased chance that one of k samples is correct (Chen et al. 2021)."""
    if not 0 < k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"need 0 < k <= n and 0 <= c <= n, got k={k}, n={num_samples}, c={num_correct}")
    failing = num_samples - num_correct
    if failing < k:
        return 1.0
    terms = 1.0 - k / np.arange(failing + 1, num_samples + 1)
    return float(1.0 - np.prod(terms))


def _scores(scores: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"scores must be a non-empty list of numbers, got shape {values.shape}")
    return values


def _resampled_means(values: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    means: Sequence[float] = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    return np.asarray(means)
