"""PPO with a critic, as Llama 2 used it: rewards, advantages, and the two clipped losses.

Sources: Schulman et al. 2017 (clipping), Schulman et al. 2016 (GAE), InstructGPT (KL in the reward), Ye et al. 2020
(dual clip), Llama 2 section 3.2.3 (score combination).
"""

import torch

from algorithms.aggregate import Reduction, aggregate, last_masked_index
from algorithms.kl import Estimator, estimate_kl


def policy_loss(
    logp: torch.Tensor,
    logp_old: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    denominator: torch.Tensor | float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
    reduction: Reduction = "token-mean",
    sampler_weights: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A), at most -c A for A < 0; r = exp(clamp(logp - logp_old, ±20)).

    Args:
        logp, logp_old, advantages, mask: [B, T]; only `logp` carries a gradient.
        denominator: `aggregate.count` over G.
        dual_clip: c > 1, which bounds the loss of a bad token that became much more likely; None turns it off.
        sampler_weights: [B, T] from `grpo.sampler_weights`, multiplied into the loss.

    Returns:
        (share of the loss over G, sums over this micro-batch's masked tokens: "tokens", "ratio", "clipped",
        "approx_kl" = k3 of old against new). Add the sums over micro-batches and ranks, then divide by "tokens".
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be > 1, got {dual_clip}")
    present = mask != 0
    advantages = advantages.float().masked_fill(~present, 0.0)
    log_ratio = (logp.float() - logp_old.float()).masked_fill(~present, 0.0)
    log_ratio = log_ratio.clamp(-20.0, 20.0)  # exp of more would overflow soon after
    ratio = log_ratio.exp()
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    losses = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    if sampler_weights is not None:
        losses = losses * sampler_weights.detach()
    with torch.no_grad():
        sums = {
            "tokens": present.float().sum(),
            "ratio": ratio.masked_fill(~present, 0.0).sum(),
            "clipped": ((clipped > unclipped) & present).float().sum(),
            "approx_kl": (ratio - 1.0 - log_ratio).sum(),
        }
    return aggregate(losses, mask, denominator, reduction, segment_ids), sums


def value_loss(
    values: torch.Tensor,
    values_old: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    denominator: torch.Tensor | float,
    clip: float | None = 0.2,
    reduction: Reduction = "token-mean",
    segment_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """0.5 * max((v - R)^2, (clip(v, v_old ± clip) - R)^2): share over G. All tensors [B, T], aligned with tokens.

    `clip=None` is the plain squared error.
    """
    values, values_old, returns = (v.float().masked_fill(mask == 0, 0.0) for v in (values, values_old, returns))
    errors = (values - returns).square()
    if clip is not None:
        bounded = torch.clamp(values, values_old.detach() - clip, values_old.detach() + clip)
        errors = torch.maximum(errors, (bounded - returns).square())
    return aggregate(0.5 * errors, mask, denominator, reduction, segment_ids)


def token_rewards(
    scores: torch.Tensor,
    logp_old: torch.Tensor,
    logp_ref: torch.Tensor,
    mask: torch.Tensor,
    beta: float,
    estimator: Estimator = "k1",
) -> torch.Tensor:
    """-beta * KL estimate on every response token, plus the score on the last one; detached, [B, T] fp32.

    Args:
        scores: [B], one number per response.
        logp_old, logp_ref: [B, T]; the mask is 1 on response tokens. Rows without any get 0 everywhere.
    """
    rewards = -beta * estimate_kl(logp_old, logp_ref, estimator).detach()
    rewards = rewards.masked_fill(mask == 0, 0.0)
    last = last_masked_index(mask)
    ends = torch.where(last >= 0, scores.detach().float(), 0.0)
    return rewards.scatter_add(1, last.clamp(min=0)[:, None], ends[:, None])


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    truncated: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation over response tokens; masked tokens (tool output, padding) are skipped.

    delta_t = r_t + gamma * V_next - V_t and A_t = delta_t + gamma * lam * A_next, where "next" is the next token with
    mask 1 (as in verl and AReaL). After the last token V_next is 0 for a finished answer and, by our choice, the
    answer's own last value for a truncated one. returns = A + V, with A not yet whitened.

    Args:
        rewards, values, mask: [B, T], aligned with tokens (`logprobs.align_values`).
        truncated: [B] bool, True if the answer reached the length limit; None means all finished.

    Returns:
        (advantages [B, T], returns [B, T]) fp32, detached, 0 where the mask is 0.
    """
    rewards, values = rewards.detach().float(), values.detach().float()
    present = mask != 0
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    last = last_masked_index(mask)
    own_last = values.gather(1, last.clamp(min=0)[:, None])[:, 0]
    next_value = torch.zeros_like(own_last) if truncated is None else torch.where(truncated.bool(), own_last, 0.0)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * following
        following = torch.where(present[:, t], advantage, following)
        next_value = torch.where(present[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(present[:, t], advantage, 0.0)
    return advantages, (advantages + values).masked_fill(~present, 0.0)


def moments(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(count, sum, sum of squares) over the mask, [3] fp64. Add them over ranks for `whiten`."""
    kept = values.detach().double().masked_fill(mask == 0, 0.0)
    return torch.stack([(mask != 0).double().sum(), kept.sum(), kept.square().sum()])


def whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    total: torch.Tensor | None = None,
    shift_mean: bool = True,
    unbiased: bool = True,
) -> torch.Tensor:
    """(v - mean) / sqrt(var + 1e-8) over the masked entries of the whole rollout batch B; 0 where the mask is 0.

    Args:
        values, mask: same shape, [B, T] or [B].
        total: `moments` added over all ranks; None treats this tensor as the whole batch.
        shift_mean: False keeps the mean in place and only scales.
        unbiased: variance over n - 1 (verl) or over n (OpenRLHF).

    Raises:
        ValueError: fewer than two entries have mask 1.
    """
    count, first, second = moments(values, mask) if total is None else total
    if count < 2:
        raise ValueError(f"whitening needs at least two entries, got {int(count)}")
    mean = first / count
    variance = (second / count - mean.square()).clamp(min=0.0)
    if unbiased:
        variance = variance * count / (count - 1)
    white = (values.double() - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        white = white + mean
    return white.float().masked_fill(mask == 0, 0.0)
