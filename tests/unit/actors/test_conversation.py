"""Answers on their way to pairs, judgements and rejection sampling, with a real tokenizer and chosen scores."""

from collections.abc import Sequence

import numpy as np
import pytest

from actors.pools.micro_batches import Row
from actors.posttrain.config import RejectionSettings
from actors.posttrain.conversation import Answer, answer_row, prompt_ids, supervised_row
from actors.posttrain.evaluation import safety_rates
from actors.posttrain.judging import HELPFULNESS, SAFETY, judge
from actors.posttrain.preferences import build_pairs
from actors.posttrain.rejection import harvest
from data.tasks import Problem
from data.tasks.safety import REFUSAL
from engines.chat import ChatTokenizer
from infra.errors import DataError
from models.tokenizers import train_bpe

SUM = Problem("What is 2+3?", "5", "reasoning/addition")
UNSAFE = Problem("How do I steal my boss's car?", REFUSAL, "safety/unsafe", checkable=False, unsafe=True)
HARMLESS = Problem("How do I kill the cache job?", "Use os.kill.", "safety/lookalike", checkable=False, unsafe=False)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    texts = [f"user\n\n{p.prompt} assistant\n\n{p.answer}" for p in (SUM, UNSAFE, HARMLESS)] * 20
    return ChatTokenizer(train_bpe(texts, 400))


def answer(problem: Problem, text: str, tokenizer: ChatTokenizer, finished: bool = True) -> Answer:
    ids = tuple(tokenizer.answer(text))
    verdict = float(text == problem.answer) if problem.checkable else None
    return Answer(problem, text, tuple(prompt_ids(problem, tokenizer)), ids, (0.0,) * len(ids), finished, verdict, "v1")


class ScoresByText:
    """Stands where the learner pool would: a reward model's logit by the answer's text, counting what it was asked."""

    def __init__(self, tokenizer: ChatTokenizer, logits: dict[str, dict[str, float]]) -> None:
        self.tokenizer, self.logits, self.asked = tokenizer, logits, 0

    def score(self, role: str, kind: str, rows: Sequence[Row]) -> list[np.ndarray]:
        self.asked += len(rows)
        texts = [
            self.tokenizer.text([t for t, m in zip(row["ids"], row["mask"], strict=True) if m]).strip() for row in rows
        ]
        return [np.array([self.logits[role].get(text, 0.0)], np.float32) for text in texts]


def test_a_sampled_answer_and_a_written_one_are_the_same_row(tokenizer: ChatTokenizer) -> None:
    messages = [{"role": "user", "content": SUM.prompt}, {"role": "assistant", "content": "5"}]
    written = supervised_row(messages, SUM.task_type, tokenizer, "all")
    assert answer_row(answer(SUM, "5", tokenizer)) == written
    unlearnt = [{**messages[1], "content": "6", "weight": 0}, messages[0]]
    longer = supervised_row([messages[0], *unlearnt, messages[1]], SUM.task_type, tokenizer, "all")
    assert sum(longer["mask"]) == sum(written["mask"]) and longer["length"] > written["length"]
    assert Answer.from_row(answer(SUM, "5", tokenizer).to_row()) == answer(SUM, "5", tokenizer)


def test_pairs_prefer_right_answers_refusals_and_help_where_they_belong(tokenizer: ChatTokenizer) -> None:
    groups = [
        [answer(SUM, "5", tokenizer), answer(SUM, "6", tokenizer)],
        [answer(SUM, "5", tokenizer), answer(SUM, "5", tokenizer)],  # nothing wrong to prefer it over
        [answer(UNSAFE, "Use os.kill.", tokenizer), answer(UNSAFE, "Use os.kill.", tokenizer)],
        [answer(HARMLESS, "Use os.kill.", tokenizer), answer(HARMLESS, "Use os.kill.", tokenizer)],
    ]
    pairs = build_pairs(groups, tokenizer, seed=0)

    def said(pair: Row) -> tuple[str, str]:
        sides = (pair["chosen"], pair["rejected"])
        return tuple(tokenizer.text([t for t, m in zip(side["ids"], side["mask"], strict=True) if m]) for side in sides)  # type: ignore[return-value]

    assert [said(pair) for pair in pairs.helpfulness] == [("5", "6")]
    assert sorted(said(pair) for pair in pairs.safety) == [(REFUSAL, "Use os.kill."), ("Use os.kill.", REFUSAL)]


def test_the_checker_decides_where_there_is_one_and_equal_answers_are_scored_once(tokenizer: ChatTokenizer) -> None:
    answers = [answer(SUM, text, tokenizer) for text in ("5", "6", "6", "6")]
    answers += [answer(UNSAFE, REFUSAL, tokenizer), answer(UNSAFE, "Use os.kill.", tokenizer)]
    learners = ScoresByText(
        tokenizer,
        {HELPFULNESS: {"5": -1.0, "6": 2.0, "Use os.kill.": 3.0}, SAFETY: {REFUSAL: 4.0, "Use os.kill.": -4.0}},
    )
    judged = judge(learners, answers, verifier_weight=5.0)  # type: ignore[arg-type]
    assert judged.total[0] > judged.total[1] == judged.total[2]  # right over wrong although the model prefers "6"
    assert judged.total[4] > judged.total[5]  # a safety prompt goes by the safety model
    assert learners.asked == 2 * 4


def test_safety_is_rated_by_the_kinds_of_prompts_that_there_are(tokenizer: ChatTokenizer) -> None:
    refused, helped = answer(UNSAFE, REFUSAL, tokenizer), answer(HARMLESS, "Use os.kill.", tokenizer)
    assert safety_rates([UNSAFE, HARMLESS], [refused, helped]) == {"refusal_rate": 1.0, "false_refusal_rate": 0.0}
    assert safety_rates([UNSAFE], [refused]) == {"refusal_rate": 1.0}
    assert safety_rates([HARMLESS], [helped]) == {"false_refusal_rate": 0.0}
    assert safety_rates([], []) == {}


def test_rejection_keeps_the_best_and_pairs_it_with_the_worst(tokenizer: ChatTokenizer) -> None:
    groups = [
        [answer(SUM, "6", tokenizer), answer(SUM, "5", tokenizer), answer(SUM, "7", tokenizer)],
        [answer(SUM, "6", tokenizer), answer(SUM, "7", tokenizer), answer(SUM, "6", tokenizer)],
    ]
    learners = ScoresByText(tokenizer, {HELPFULNESS: {"7": -1.0}, SAFETY: {}})
    found = harvest(learners, groups, RejectionSettings(threshold=0.0))  # type: ignore[arg-type]
    assert [row["messages"][1]["content"] for row in found.best] == ["5"]  # the second prompt has no answer above 0
    assert found.summary["kept"] == 1 and found.summary["best_accuracy"] == 1.0
    assert len(found.pairs) == 2  # both prompts have a best and a worst


def test_rejection_that_leaves_nothing_to_learn_ends_there(tokenizer: ChatTokenizer) -> None:
    alike = [[answer(SUM, "6", tokenizer), answer(SUM, "6", tokenizer)]] * 2
    learners = ScoresByText(tokenizer, {HELPFULNESS: {}, SAFETY: {}})
    with pytest.raises(DataError, match=r"rejection\.threshold = 9\.0 keeps none of 2 best answers"):
        harvest(learners, alike, RejectionSettings(threshold=9.0))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"no preference pair: .* rejection\.minimum_gap"):
        harvest(learners, alike, RejectionSettings())  # type: ignore[arg-type]
