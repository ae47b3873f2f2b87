"""One score per answer for reinforcement learning, from several judges (Llama 2, section 3.2.3)."""

import torch

from algorithms.ppo import whiten


def combine_scores(
    helpfulness: torch.Tensor, safety: torch.Tensor, safety_prompt: torch.Tensor, threshold: float = 0.15
) -> torch.Tensor:
    """Llama 2's R_c as a logit: safety on safety prompts and wherever p(safe) < threshold, else helpfulness.

    Reward models answer in logits, so R = sigmoid(logit), and logit(R_c), which Llama 2 whitens, is the chosen
    model's own output.

    Args:
        helpfulness, safety: [N] reward-model outputs (logits).
        safety_prompt: [N] bool, prompts known to be about safety.
        threshold: a probability.

    Returns:
        [N] fp32; `score_answers` whitens it.
    """
    unsafe = torch.sigmoid(safety.float()) < threshold
    return torch.where(safety_prompt.bool() | unsafe, safety.float(), helpfulness.float())


def score_answers(
    combined: torch.Tensor,
    verdicts: torch.Tensor,
    checkable: torch.Tensor,
    verifier_weight: float = 1.0,
    model_weight: float = 1.0,
) -> torch.Tensor:
    """model_weight * whiten(combined) + verifier_weight * (2 * verdict - 1) for checkable tasks, else whiten(combined).

    A verifier cannot be fooled and a reward model can, so the verifier has its own weight instead of being averaged
    away.

    Args:
        combined: [N] from `combine_scores`.
        verdicts: [N] in [0, 1], the verifier's; ignored if `checkable` is False.
        checkable: [N] bool.

    Returns:
        [N] fp32.
    """
    white = whiten(combined, torch.ones_like(combined))
    joined = model_weight * white + verifier_weight * (2.0 * verdicts.float() - 1.0)
    return torch.where(checkable.bool(), joined, white)
