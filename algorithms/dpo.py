"""Learning from preference pairs without sampling: DPO with Llama 3's additions, conservative DPO, IPO and KTO.

All take log-probs summed over the response ([P], one per answer; `response_logprobs`). The reference's are computed
once and stored. Every loss is divided by a global denominator: pairs (or answers, for KTO) in the optimizer mini-batch.
"""

import torch
import torch.nn.functional as F

from algorithms.aggregate import Reduction, aggregate, masked_sums


def response_logprobs(logprobs: torch.Tensor, mask: torch.Tensor, normalise: bool = False) -> torch.Tensor:
    """Summed log-prob of each response, [B, T] -> [B]; `normalise` divides by its length (IPO as TRL has it)."""
    sums = masked_sums(logprobs, mask)
    return sums / mask.float().sum(dim=1).clamp(min=1.0) if normalise else sums


def content_mask(
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    terminator_ids: tuple[int, ...],
    start_header_id: int | None = None,
    end_header_id: int | None = None,
    header_suffix: int = 1,
) -> torch.Tensor:
    """The mask without formatting tokens, for the DPO term only (Llama 3, section 4.1.4): [B, T] bool.

    Both answers share header and terminator tokens, so the loss pushes their likelihood up and down at once, which
    brings tail repetition and sudden terminations. Left out: `terminator_ids`, everything from a start_header to its
    end_header, and the `header_suffix` tokens after it (the blank line, which is one token in Llama 3).
    """
    kept = mask != 0
    for token in terminator_ids:
        kept = kept & (input_ids != token)
    if start_header_id is None or end_header_id is None:
        return kept
    opened = (input_ids == start_header_id).cumsum(dim=1)
    ends = input_ids == end_header_id
    closed_before = ends.cumsum(dim=1) - ends.long()
    kept = kept & ~(opened > closed_before)
    for distance in range(1, header_suffix + 1):
        kept = kept & ~F.pad(ends[:, :-distance], (distance, 0))
    return kept


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    denominator: torch.Tensor | float,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-(1 - s) log sigmoid(z) - s log sigmoid(-z), z = beta ((chosen - ref_chosen) - (rejected - ref_rejected)).

    Rafailov et al. 2023; s = label_smoothing > 0 is conservative DPO (Mitchell 2023). log 2 if policy = reference.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: [P].
        denominator: pairs in G.

    Returns:
        (share of the loss over G, sums: "pairs", "accuracy", "margin" = z, "chosen_reward", "rejected_reward").
    """
    chosen_reward = beta * (chosen - ref_chosen.detach())
    rejected_reward = beta * (rejected - ref_rejected.detach())
    margin = chosen_reward - rejected_reward
    losses = -(1.0 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses.sum() / denominator, _pair_sums(margin, chosen_reward, rejected_reward)


def ipo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    denominator: torch.Tensor | float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(h - 1 / (2 beta))^2, h = (chosen - ref_chosen) - (rejected - ref_rejected) (Azar et al. 2023, equation 17).

    1 / (4 beta^2) if policy = reference. The paper sums log-probs; TRL passes them normalised by length
    (`response_logprobs(normalise=True)`). Arguments and result as `dpo_loss`.
    """
    chosen_reward, rejected_reward = chosen - ref_chosen.detach(), rejected - ref_rejected.detach()
    margin = chosen_reward - rejected_reward
    losses = (margin - 1.0 / (2.0 * beta)).square()
    return losses.sum() / denominator, _pair_sums(margin, chosen_reward, rejected_reward)


def kto_baseline(mismatched: torch.Tensor, ref_mismatched: torch.Tensor) -> torch.Tensor:
    """KTO's KL estimate from prompts paired with *other* prompts' answers: max(0, mean(logp - logp_ref)), detached.

    Args:
        mismatched, ref_mismatched: [N] summed log-probs, gathered over the whole global batch.
    """
    return (mismatched - ref_mismatched).detach().float().mean().clamp(min=0.0)


def kto_loss(
    logp: torch.Tensor,
    logp_ref: torch.Tensor,
    desirable: torch.Tensor,
    baseline: torch.Tensor,
    beta: float,
    denominator: torch.Tensor | float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """w_y (1 - sigmoid(±(beta (logp - logp_ref) - beta * baseline))), + if desirable (Ethayarajh et al. 2024).

    Args:
        logp, logp_ref: [N] summed over the response; desirable: [N] bool.
        baseline: `kto_baseline` of the *global* batch.
        denominator: answers in G.
    """
    advantage = beta * (logp - logp_ref.detach() - baseline.detach())
    good = desirable.bool()
    sign = torch.where(good, 1.0, -1.0)
    weight = torch.where(good, desirable_weight, undesirable_weight)
    return (weight * (1.0 - torch.sigmoid(sign * advantage))).sum() / denominator


def chosen_nll(
    logprobs: torch.Tensor, mask: torch.Tensor, denominator: torch.Tensor | float, reduction: Reduction = "seq-mean"
) -> torch.Tensor:
    """-log p of the chosen responses, which Llama 3 adds with weight 0.2 (section 4.1.4): share over G.

    "token-mean" divides by all chosen tokens (TRL); "seq-mean" is the mean of sequence means (OpenRLHF).
    Formatting tokens stay in this term: give the full response mask.

    Args:
        logprobs, mask: [P, T], chosen responses only.
        denominator: `aggregate.count(mask, reduction)` over G.
    """
    return aggregate(-logprobs, mask, denominator, reduction)


def _pair_sums(
    margin: torch.Tensor, chosen_reward: torch.Tensor, rejected_reward: torch.Tensor
) -> dict[str, torch.Tensor]:
    margin = margin.detach()
    return {
        "pairs": margin.new_tensor(float(len(margin))),
        "accuracy": (margin > 0).float().sum(),
        "margin": margin.sum(),
        "chosen_reward": chosen_reward.detach().sum(),
        "rejected_reward": rejected_reward.detach().sum(),
    }
