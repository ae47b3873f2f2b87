"""Next-token losses for pretraining and supervised fine-tuning, and their breakdown per task_type."""

import torch

from algorithms.aggregate import Reduction, aggregate


def sft_loss(
    logprobs: torch.Tensor,
    mask: torch.Tensor,
    denominator: torch.Tensor | float,
    reduction: Reduction = "token-mean",
    segment_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """-log p of the tokens in the mask: this micro-batch's share of the mean over G.

    token-mean gives one-token answers little weight beside long ones; seq-mean gives every answer the same weight.
    Packed and unpacked rows of the same data give the same loss and gradient (pass `segment_ids` when packed).

    Args:
        logprobs: [B, T] from `logprobs.token_logprobs`.
        mask: [B, T], 1 on tokens to learn.
        denominator: `aggregate.count` summed over all ranks and micro-batches of the step.
    """
    return aggregate(-logprobs, mask, denominator, reduction, segment_ids)


def channel_losses(
    logprobs: torch.Tensor, mask: torch.Tensor, channels: torch.Tensor, num_channels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of -log p and number of tokens per channel ("channel loss": a channel is a task_type, or special tokens).

    Args:
        logprobs, mask: [B, T].
        channels: [B, T], or [B] for one channel per row; values in [0, num_channels).

    Returns:
        (sums [num_channels], tokens [num_channels]), detached fp32. Add both over micro-batches and ranks, then divide.
    """
    if channels.dim() == 1:
        channels = channels[:, None].expand_as(mask)
    present = mask.float().flatten()
    losses = (-logprobs.detach().float()).masked_fill(mask == 0, 0.0).flatten()
    index = channels.long().flatten()
    empty = losses.new_zeros(num_channels)
    return empty.scatter_add(0, index, losses), empty.scatter_add(0, index, present)
