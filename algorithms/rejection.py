"""Choosing among K sampled answers (Llama 2, section 3.2.3): the best to learn from, best against worst as a pair."""

import torch


def best_of_k(scores: torch.Tensor, threshold: float | None = None) -> torch.Tensor:
    """Index of the best answer per prompt, [P, K] -> [P] long; ties go to the lower index.

    With a threshold, -1 if even the best answer scores below it.

    Raises:
        ValueError: a score is NaN.
    """
    best, index = _extreme(scores, highest=True)
    return index if threshold is None else torch.where(best >= threshold, index, -1)


def preference_pairs(scores: torch.Tensor, minimum_gap: float = 0.0) -> list[tuple[int, int, int]]:
    """(prompt, best answer, worst answer) of every prompt whose gap is positive and at least `minimum_gap`.

    scores: [P, K]; ties on either end go to the lower index.

    Raises:
        ValueError: a score is NaN.
    """
    best, best_index = _extreme(scores, highest=True)
    worst, worst_index = _extreme(scores, highest=False)
    gap = best - worst
    kept = torch.nonzero((gap > 0) & (gap >= minimum_gap)).flatten().tolist()
    return [(prompt, int(best_index[prompt]), int(worst_index[prompt])) for prompt in kept]


def _extreme(scores: torch.Tensor, highest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(value [P], lowest index that has it [P]); argmax does not promise which of equal values it returns."""
    if torch.isnan(scores).any():
        raise ValueError("scores contain NaN")
    value = scores.amax(dim=1) if highest else scores.amin(dim=1)
    positions = torch.arange(scores.shape[1], device=scores.device)
    index = torch.where(scores == value[:, None], positions, scores.shape[1]).amin(dim=1)
    return value, index
