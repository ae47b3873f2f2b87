"""Reward models: the Bradley-Terry loss with Llama 2's margins, and measures of a model (accuracy, calibration).

A rating says how much better the chosen answer is: 0 significantly, 1 clearly, 2 slightly, 3 negligibly (or unsure).
"""

from typing import Literal

import torch
import torch.nn.functional as F

from algorithms.aggregate import last_masked_index

Margins = Literal["none", "small", "large"]


def margin_by_rating(ratings: torch.Tensor, table: Margins) -> torch.Tensor:
    """[P] -> [P], for ratings 0 to 3: small 1, 2/3, 1/3, 0; large 3, 2, 1, 0 (Llama 2, table 27); none 0 (Llama 3)."""
    if table == "none":
        return torch.zeros_like(ratings, dtype=torch.float32)
    steps = (3.0 - ratings.float()).clamp(0.0, 3.0)
    if table == "small":
        return steps / 3.0
    if table == "large":
        return steps
    raise ValueError(f"margin table must be none, small or large, got {table!r}")


def bradley_terry_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    denominator: torch.Tensor | float,
    margins: torch.Tensor | None = None,
) -> torch.Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin), summed and divided by the pairs in G (Llama 2, equation 2).

    Args:
        chosen, rejected: [P] scores; margins: [P] from `margin_by_rating`, None for no margin.
    """
    difference = chosen.float() - rejected.float()
    if margins is not None:
        difference = difference - margins
    return -F.logsigmoid(difference).sum() / denominator


def last_token_scores(values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The scalar head's output [B, T] at each sequence's last real token -> [B] fp32."""
    last = last_masked_index(attention_mask)
    return values.float().gather(1, last.clamp(min=0)[:, None])[:, 0]


def accuracy_by_rating(
    chosen: torch.Tensor, rejected: torch.Tensor, ratings: torch.Tensor, num_ratings: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """(correctly ordered pairs [num_ratings], pairs [num_ratings]) fp32; a tie is half correct. Add, then divide."""
    correct = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    empty = torch.zeros(num_ratings, device=chosen.device)
    index = ratings.long()
    return empty.scatter_add(0, index, correct), empty.scatter_add(0, index, torch.ones_like(correct))


def expected_calibration_error(probabilities: torch.Tensor, outcomes: torch.Tensor, bins: int = 10) -> float:
    """sum over bins of (share of samples) * |mean probability - mean outcome| (Naeini et al. 2015; equal-width bins).

    Args:
        probabilities: [N] in [0, 1], e.g. sigmoid(r_a - r_b) of pairs in random order; outcomes: [N] 0 or 1.

    Raises:
        ValueError: no samples.
    """
    if len(probabilities) == 0:
        raise ValueError("calibration needs at least one sample")
    probabilities, outcomes = probabilities.double(), outcomes.double()
    index = (probabilities * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).scatter_add(0, index, probabilities - outcomes)
    return float(gaps.abs().sum() / len(probabilities))
