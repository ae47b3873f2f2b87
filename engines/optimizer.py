"""What both learners take from `LearnerSettings`: the learning rate of a step."""

from algorithms.schedule import factor
from engines.config import LearnerSettings


def learning_rate(settings: LearnerSettings, step: int) -> float:
    """Of step `step` = 0, 1, ...; constant after the warm-up when `total_steps` is 0."""
    kind = settings.schedule if settings.total_steps else "constant"
    return settings.learning_rate * factor(
        kind, step, settings.total_steps, settings.warmup_steps, settings.final_learning_rate
    )
