"""Preference pairs for the two reward models, from answers that the policy itself sampled.

Helpfulness prefers a right answer to a wrong one, by the task's checker. Safety prefers a refusal of an unsafe request,
and any real answer to a harmless look-alike. If all samples of a prompt are right, or all wrong, the problem's proper
answer (or, for a look-alike, a refusal) replaces the missing side, so that every kind of prompt gives pairs.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from actors.pools.micro_batches import Row
from actors.posttrain.conversation import Answer, answer_row, prompt_ids
from data.tasks import Problem, verify
from data.tasks.safety import REFUSAL
from engines.chat import ChatTokenizer

CLEARLY, NEGLIGIBLY = 0, 3
"""Ratings of `algorithms.reward`: how much better the chosen answer is."""


@dataclass(frozen=True)
class Pairs:
    """Rows {"chosen": {"ids", "mask"}, "rejected": {...}, "rating", "task", "length"}, shuffled."""

    helpfulness: list[Row]
    safety: list[Row]


def build_pairs(groups: Sequence[Sequence[Answer]], tokenizer: ChatTokenizer, seed: int) -> Pairs:
    """One pair per prompt that has both sides, sampled or replaced; `groups` is [P][n]."""
    pairs = Pairs([], [])
    rng = random.Random(seed)
    for group in groups:
        problem = group[0].problem
        right = [answer for answer in group if _is_right(answer)]
        wrong = [answer for answer in group if not _is_right(answer)]
        chosen = answer_row(rng.choice(right)) if right else _written(problem, problem.answer, tokenizer)
        if wrong:
            rejected = answer_row(rng.choice(wrong))
        elif problem.unsafe is False:
            rejected = _written(problem, REFUSAL, tokenizer)
        else:
            continue
        kind = pairs.helpfulness if problem.unsafe is None else pairs.safety
        kind.append(pair(chosen, rejected, rating=CLEARLY))
    rng.shuffle(pairs.helpfulness)
    rng.shuffle(pairs.safety)
    return pairs


def pair(chosen: Row, rejected: Row, rating: int = NEGLIGIBLY) -> Row:
    """A preference row. Its length is twice the longer answer's, because both sides are in one micro-batch."""
    sides = {
        name: {"ids": row["ids"], "mask": row["mask"]} for name, row in (("chosen", chosen), ("rejected", rejected))
    }
    for name, row in (("chosen", chosen), ("rejected", rejected)):
        sides[name]["length"] = row["length"]
    return {**sides, "rating": rating, "task": chosen["task"], "length": 2 * max(chosen["length"], rejected["length"])}


def _is_right(answer: Answer) -> bool:
    if answer.verdict is not None:
        return answer.verdict > 0.5
    return answer.finished and verify(answer.problem, answer.text) > 0.5


def _written(problem: Problem, text: str, tokenizer: ChatTokenizer) -> Row:
    """A given answer as a row like that of a sampled one."""
    prompt = prompt_ids(problem, tokenizer)
    ids = tokenizer.answer(text)
    return {
        "ids": [*prompt, *ids], "mask": [0] * len(prompt) + [1] * len(ids), "task": problem.task_type,
        "length": len(prompt) + len(ids),
    }  # fmt: skip
