"""Learning-rate schedules as functions of the step, and which parameters decay.

Every schedule returns a factor of the peak for the optimizer step `step` = 0, 1, .... Warm-up is linear; its first step
is 1 / warmup, not 0, so that no step is wasted.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch

Kind = Literal["constant", "cosine", "linear"]


def factor(kind: Kind, step: int, total: int, warmup: int = 0, floor: float = 0.0) -> float:
    """The schedule `kind` at `step`: see `constant`, `cosine` and `linear`."""
    if kind == "constant":
        return constant(step, warmup)
    if kind == "cosine":
        return cosine(step, total, warmup, floor)
    if kind == "linear":
        return linear(step, total, warmup, floor)
    raise ValueError(f"schedule must be constant, cosine or linear, got {kind!r}")


def constant(step: int, warmup: int = 0) -> float:
    """Warm-up, then 1 (PPO in Llama 2)."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def cosine(step: int, total: int, warmup: int = 0, floor: float = 0.1) -> float:
    """Warm-up, then floor + (1 - floor) * (1 + cos(pi * progress)) / 2 (Llama: warm-up 2,000, floor 0.1).

    Reaches 1 at the last warm-up step and the floor at step total - 1, and stays there. A single step is at the peak.
    """
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, total, warmup)))


def linear(step: int, total: int, warmup: int = 0, floor: float = 0.0) -> float:
    """Warm-up, then a straight line from 1 to the floor at step total - 1 (Llama 3 405B's annealing to 0)."""
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 - (1.0 - floor) * _progress(step, total, warmup)


def parameter_groups(named_parameters: Iterable[tuple[str, torch.Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices decay, vectors (norms, biases) do not. Frozen parameters are left out.

    The order within a group is that of `named_parameters`, so equal models give equal optimizer states.
    """
    trained = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def _progress(step: int, total: int, warmup: int) -> float:
    start = max(warmup - 1, 0)
    length = total - 1 - start
    if length <= 0:  # only warm-up steps, or a single step, which would learn nothing at a floor of 0
        return 0.0 if step < total else 1.0
    return min(1.0, (step - start) / length)
