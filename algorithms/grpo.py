"""Reinforcement learning without a critic: GRPO, RLOO, REINFORCE++, DAPO, and the correction for a mismatched sampler.

Rewards come as [P, K]: K answers to each of P prompts. Advantages of that shape are per answer; `spread` puts them on
its tokens.
"""

import torch

from algorithms.aggregate import Reduction, aggregate
from algorithms.kl import estimate_kl
from algorithms.ppo import policy_loss, whiten


def grpo_advantages(rewards: torch.Tensor, eps: float = 1e-6, scale: bool = True) -> torch.Tensor:
    """(R - mean_group) / (std_group + eps), with the unbiased variance (DeepSeekMath 2024; verl).

    Args:
        rewards: [P, K].
        eps: verl 1e-6, TRL 1e-4.
        scale: False leaves the division out (Dr. GRPO).

    Raises:
        ValueError: K is 1; a group of one has no baseline (verl returns R itself).
    """
    _require_groups(rewards)
    exact = rewards.double()  # equal rewards must give exactly 0, not rounding noise divided by eps
    centred = exact - exact.mean(dim=1, keepdim=True)
    return (centred / (exact.std(dim=1, keepdim=True) + eps) if scale else centred).float()


def rloo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """R minus the mean of the group's other answers, [P, K] -> [P, K] (Ahmadian et al. 2024).

    Raises:
        ValueError: K is 1.
    """
    _require_groups(rewards)
    rewards = rewards.float()
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def reinforce_pp_advantages(
    rewards: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, total: torch.Tensor | None = None
) -> torch.Tensor:
    """Discounted reward-to-go per token, whitened over the whole batch (REINFORCE++, Hu 2025).

    Args:
        rewards: [B, T] from `ppo.token_rewards`; mask [B, T].
        total: `ppo.moments` of `rewards_to_go` over all ranks; None treats this batch as the whole.
    """
    return whiten(rewards_to_go(rewards, mask, gamma), mask, total)


def rewards_to_go(rewards: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """G_t = r_t + gamma * G_next over tokens with mask 1, [B, T]; 0 elsewhere."""
    present = mask != 0
    result = torch.zeros_like(rewards, dtype=torch.float32)
    following = torch.zeros_like(result[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = torch.where(present[:, t], rewards[:, t].float() + gamma * following, following)
        result[:, t] = following
    return result.masked_fill(~present, 0.0)


def spread(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One advantage per answer ([P, K] or [B], B = P * K, prompts first) -> one per response token, [B, T]."""
    return advantages.flatten()[:, None] * mask.float()


def grpo_loss(
    logp: torch.Tensor,
    logp_old: torch.Tensor,
    logp_ref: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    denominator: torch.Tensor | float,
    beta: float = 0.04,
    clip: float = 0.2,
    reduction: Reduction = "seq-mean",
    sampler_weights: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped term plus beta * k3(policy, reference), both seq-mean over G (DeepSeekMath 2024, equation 3).

    All tensors [B, T]. Returns (share of the loss, metric sums as `ppo.policy_loss`, plus "kl").
    """
    loss, sums = policy_loss(
        logp,
        logp_old,
        advantages,
        mask,
        denominator,
        clip,
        clip,
        dual_clip=None,
        reduction=reduction,
        sampler_weights=sampler_weights,
        segment_ids=segment_ids,
    )
    present = mask != 0
    kl = estimate_kl(logp.masked_fill(~present, 0.0), logp_ref.detach().masked_fill(~present, 0.0), "k3")
    sums["kl"] = kl.detach().sum()
    return loss + beta * aggregate(kl, mask, denominator, reduction, segment_ids), sums


def dapo_loss(
    logp: torch.Tensor,
    logp_old: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    denominator: torch.Tensor | float,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    sampler_weights: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clip-higher, token-mean over G, no KL (DAPO, Yu et al. 2025). Shapes and result as `ppo.policy_loss`."""
    return policy_loss(
        logp,
        logp_old,
        advantages,
        mask,
        denominator,
        clip_low,
        clip_high,
        dual_clip=None,
        sampler_weights=sampler_weights,
        segment_ids=segment_ids,
    )


def overlong_penalty(lengths: torch.Tensor, max_length: int, buffer: int) -> torch.Tensor:
    """DAPO's soft punishment, added to the reward: 0 up to max_length - buffer, then linear down to -1 at max_length.

    `lengths` [N] in tokens -> [N] fp32; longer than max_length stays at -1.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer must be in (0, max_length], got {buffer} of {max_length}")
    return ((max_length - buffer - lengths.float()) / buffer).clamp(-1.0, 0.0)


def informative_groups(rewards: torch.Tensor) -> torch.Tensor:
    """[P, K] -> [P] bool: groups whose rewards differ. DAPO drops the others (advantage 0) and samples new prompts."""
    return rewards.amax(dim=1) > rewards.amin(dim=1)


def sampler_weights(
    logp_old: torch.Tensor,
    logp_sampler: torch.Tensor,
    mask: torch.Tensor,
    cap: float | None = 2.0,
    band: tuple[float, float] | None = None,
) -> torch.Tensor:
    """w = exp(logp_old - logp_sampler): what the learner's policy gave a token over what the sampler reported.

    Args:
        logp_old: [B, T] recomputed by the learner; logp_sampler: [B, T] as reported with the rollout.
        cap: truncate at C (truncated importance sampling); None leaves w alone.
        band: (low, high); w outside becomes 0, so that the token leaves the loss (masked importance sampling).

    Returns:
        [B, T] fp32, detached, 0 where the mask is 0.
    """
    log_weights = (logp_old.detach().float() - logp_sampler.detach().float()).masked_fill(mask == 0, 0.0)
    weights = log_weights.clamp(-20.0, 20.0).exp()
    if band is not None:
        weights = weights.masked_fill((weights < band[0]) | (weights > band[1]), 0.0)
    if cap is not None:
        weights = weights.clamp(max=cap)
    return weights.masked_fill(mask == 0, 0.0)


def _require_groups(rewards: torch.Tensor) -> None:
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [prompts, answers] with at least 2 answers each, got {list(rewards.shape)}")
