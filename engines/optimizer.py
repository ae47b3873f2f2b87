"""What both learners take from `LearnerSettings`: the learning rate of a step, and which parameters decay."""

from typing import Any

import torch

from algorithms.schedule import factor, parameter_groups
from engines.config import LearnerSettings


def learning_rate(settings: LearnerSettings, step: int) -> float:
    """Of step `step` = 0, 1, ...; constant after the warm-up when `total_steps` is 0."""
    kind = settings.schedule if settings.total_steps else "constant"
    return settings.learning_rate * factor(
        kind, step, settings.total_steps, settings.warmup_steps, settings.final_learning_rate
    )


def decayed_groups(model: torch.nn.Module, settings: LearnerSettings) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay, vectors (norms, biases) do not; no empty group."""
    groups = parameter_groups(model.named_parameters(), settings.weight_decay)
    return [group for group in groups if group["params"]]
