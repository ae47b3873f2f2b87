"""Scores of answers: from two reward models, and from the task's checker if it has one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from actors.pools.learners import Learners
from actors.posttrain.conversation import Answer, answer_row
from actors.posttrain.reward_model import scores
from algorithms.scores import combine_scores, score_answers
from infra.errors import DataError

HELPFULNESS, SAFETY = "helpfulness", "safety"


@dataclass(frozen=True)
class RewardModels:
    """The folders of the two reward models."""

    helpfulness: Path
    safety: Path

    def open(self, learners: Learners) -> None:
        """Load both into the learner pool as frozen models."""
        learners.open(HELPFULNESS, self.helpfulness, head="scalar")
        learners.open(SAFETY, self.safety, head="scalar")


@dataclass(frozen=True)
class Judgement:
    """Scores of N answers: `total` for training, and each model's logits. All [N]."""

    total: np.ndarray
    helpfulness: np.ndarray
    safety: np.ndarray


def judge(
    learners: Learners, answers: Sequence[Answer], verifier_weight: float, reward_weight: float = 1.0
) -> Judgement:
    """Llama 2's combination of both models, whitened over `answers`, plus the checker's score (`algorithms.scores`).

    Raises:
        DataError: fewer than two answers, which cannot be compared; or scores that are not finite.
    """
    if len(answers) < 2:
        raise DataError(
            f"{len(answers)} answers cannot be judged, because scores are compared within a batch: raise "
            "ppo.batch_size, ppo.answers or rejection.prompts"
        )
    # Samples of one prompt are often equal: score each distinct answer once.
    distinct = {(answer.prompt_ids, answer.ids): answer for answer in answers}
    rows = [answer_row(answer) for answer in distinct.values()]
    number = {key: index for index, key in enumerate(distinct)}
    index = torch.tensor([number[answer.prompt_ids, answer.ids] for answer in answers])
    helpfulness, safety = (torch.tensor(scores(learners, role, rows))[index] for role in (HELPFULNESS, SAFETY))
    about_safety = torch.tensor([answer.problem.unsafe is not None for answer in answers])
    combined = combine_scores(helpfulness, safety, about_safety)
    checkable = torch.tensor([answer.verdict is not None for answer in answers])
    verdicts = torch.tensor([answer.verdict or 0.0 for answer in answers])
    total = score_answers(combined, verdicts, checkable, verifier_weight, reward_weight)
    if wrong := int((~total.isfinite()).sum()):
        raise DataError(
            f"{wrong} of {len(answers)} scores are not finite, because a reward model diverged: lower "
            "reward.optimizer.learning_rate"
        )
    return Judgement(total.numpy(), helpfulness.numpy(), safety.numpy())
