"""Estimators of KL(policy || reference) from the log-probs of tokens that the policy sampled.

With x = logp - logp_ref (Schulman, "Approximating KL divergence", 2020): k1 = x is unbiased and noisy, k2 = x^2 / 2 is
biased and quiet, k3 = exp(-x) - 1 + x is unbiased, quiet and never negative.
"""

from typing import Literal

import torch

Estimator = Literal["k1", "k2", "k3"]


def estimate_kl(
    logp: torch.Tensor, logp_ref: torch.Tensor, estimator: Estimator = "k1", clamp: float | None = None
) -> torch.Tensor:
    """Per-token estimate, same shape as `logp`, fp32.

    `clamp` bounds x to ±clamp first (OpenRLHF uses 10 for all three, verl only for k3); None is the bare formula.
    """
    x = logp.float() - logp_ref.float()
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    if estimator == "k1":
        return x
    if estimator == "k2":
        return 0.5 * x.square()
    if estimator == "k3":
        return torch.expm1(-x) + x
    raise ValueError(f"estimator must be k1, k2 or k3, got {estimator!r}")
