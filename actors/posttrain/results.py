"""What stages report, kept in the store. No torch here: a recipe file imports this to name its results."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """A stage's results in the report.

    `accuracy` is pass@1 (greedy) over `n` checkable held-out problems, with its 95% bootstrap interval. `correct` holds
    the verdicts in the order of the problems, so that two stages can be compared pair by pair. `versus` holds the
    difference to every earlier stage: {"sft": {"difference": 0.08, "standard_error": 0.012}}.
    """

    stage: str
    n: int
    accuracy: float
    accuracy_ci: tuple[float, float]
    per_task_type: dict[str, dict[str, float]]
    pass_at_n: dict[str, float]
    safety: dict[str, float]
    reward: dict[str, float]
    correct: tuple[int, ...]
    weight_version: str
    samples: tuple[dict[str, Any], ...]
    versus: dict[str, Any] = field(default_factory=dict)
