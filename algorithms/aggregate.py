"""From per-token losses to one number, with denominators that are global.

A mean per micro-batch that is averaged again depends on how the data was cut. Here the caller counts once over the
whole optimizer mini-batch G (all ranks, all micro-batches), passes that count in, and then only sums.
"""

from typing import Literal

import torch

Reduction = Literal["token-mean", "seq-mean"]


def count(mask: torch.Tensor, reduction: Reduction, segment_ids: torch.Tensor | None = None) -> torch.Tensor:
    """This micro-batch's share of the denominator; sum it over G.

    Args:
        mask: [B, T], 1 on tokens that count.
        segment_ids: [B, T] when several sequences share a row (0 = padding); else one sequence per row.

    Returns:
        Scalar fp32: tokens for "token-mean", sequences with at least one counted token for "seq-mean".
    """
    if reduction == "token-mean":
        return mask.float().sum()
    return (mask.float() * sequence_weights(mask, segment_ids)).sum().round()


def aggregate(
    values: torch.Tensor,
    mask: torch.Tensor,
    denominator: torch.Tensor | float,
    reduction: Reduction = "token-mean",
    segment_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """This micro-batch's share of the mean over G; shares add up to it exactly.

    token-mean: sum(values * m) / sum over G of m. seq-mean: sum over sequences of (sum(values * m) / sum(m)) divided by
    the number of sequences in G. They differ in how much a long sequence weighs.

    Args:
        values: [B, T]; values at masked positions are ignored, even NaN.
        mask: [B, T].
        denominator: `count` summed over G.
        segment_ids: [B, T] for packed rows; a sequence never spans two rows.
    """
    weights = mask.float()
    if reduction == "seq-mean":
        weights = weights * sequence_weights(mask, segment_ids)
    elif reduction != "token-mean":
        raise ValueError(f"reduction must be 'token-mean' or 'seq-mean', got {reduction!r}")
    return (values.float().masked_fill(mask == 0, 0.0) * weights).sum() / denominator


def sequence_weights(mask: torch.Tensor, segment_ids: torch.Tensor | None = None) -> torch.Tensor:
    """1 / (counted tokens of the token's own sequence), [B, T] fp32; 0 if the sequence has none."""
    present = mask.float()
    if segment_ids is None:
        totals = present.sum(dim=1, keepdim=True).expand_as(present)
    else:
        segments = segment_ids.long()
        sums = present.new_zeros(len(present), int(segments.max()) + 1).scatter_add(1, segments, present)
        totals = sums.gather(1, segments)
    return torch.where(totals > 0, 1.0 / totals.clamp(min=1.0), 0.0)


def masked_sums(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sum(values * m) per row, [B, T] -> [B] fp32; values at masked positions are ignored."""
    return values.float().masked_fill(mask == 0, 0.0).sum(dim=1)


def last_masked_index(mask: torch.Tensor) -> torch.Tensor:
    """Index of the last position with mask 1 in each row, [B, T] -> [B]; -1 for a row without any."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask != 0, positions, -1).amax(dim=1)
