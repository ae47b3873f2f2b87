"""Rejection sampling (Llama 2, section 3.2.3): keep the best of K answers per prompt; pair the best with the worst."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actors.pools.learners import Learners
from actors.pools.micro_batches import Row
from actors.posttrain.config import RejectionSettings
from actors.posttrain.conversation import Answer, answer_row
from actors.posttrain.judging import judge
from actors.posttrain.preferences import pair
from algorithms.rejection import best_of_k, preference_pairs
from data.tasks import prompt_messages
from infra.errors import DataError

NO_PAIR = (
    "no preference pair: no prompt's answers differ in score by rejection.minimum_gap; lower it, or raise "
    "rejection.answers, rejection.prompts or rejection.temperature"
)


@dataclass(frozen=True)
class Harvest:
    """`best` as instruction rows, `pairs` as preference rows, and counts and scores in `summary`."""

    best: list[Row]
    pairs: list[Row]
    summary: dict[str, Any]


def harvest(learners: Learners, groups: Sequence[Sequence[Answer]], settings: RejectionSettings) -> Harvest:
    """Judge answers [P][K] with the checkers and the reward models that are open in the learners.

    Raises:
        DataError: no answer is kept, or there is no pair; the message names the setting of `rejection` to change.
    """
    flat = [answer for group in groups for answer in group]
    scores = torch.tensor(judge(learners, flat, settings.verifier_weight).total).view(len(groups), -1)
    best_index = best_of_k(scores, settings.threshold).tolist()
    best = [group[index] for group, index in zip(groups, best_index, strict=True) if index >= 0]
    if not best:
        raise DataError(
            f"rejection.threshold = {settings.threshold} keeps none of {len(groups)} best answers (the best of all "
            f"scores {float(scores.max()):.3g}): lower it"
        )
    chosen = preference_pairs(scores, settings.minimum_gap)
    if not chosen:
        raise DataError(NO_PAIR)
    checked = [answer.verdict for answer in flat if answer.verdict is not None]
    checked_best = [answer.verdict for answer in best if answer.verdict is not None]
    return Harvest(
        best=[_instruction(answer) for answer in best],
        pairs=[pair(answer_row(groups[p][b]), answer_row(groups[p][w])) for p, b, w in chosen],
        summary={
            "prompts": len(groups), "kept": len(best), "pairs": len(chosen),
            "mean_score": float(scores.mean()), "best_score": float(scores.amax(dim=1).mean()),
            "sampled_accuracy": sum(checked) / max(len(checked), 1),
            "best_accuracy": sum(checked_best) / max(len(checked_best), 1),
        },
    )  # fmt: skip


def _instruction(answer: Answer) -> Row:
    messages = [*prompt_messages(answer.problem), {"role": "assistant", "content": answer.text}]
    return {"messages": messages, "task_type": answer.problem.task_type}
