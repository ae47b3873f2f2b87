"""Evaluation of a model on the held-out problems: the same set for every stage, greedy, compared with earlier
stages."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.pools.generators import Generators
from actors.pools.learners import Learners
from actors.posttrain.config import EvalSettings
from actors.posttrain.conversation import Answer, answer_row, sample
from actors.posttrain.judging import HELPFULNESS, SAFETY
from actors.posttrain.results import Evaluation
from actors.posttrain.reward_model import scores
from algorithms.bootstrap import mean_interval, paired_difference, pass_at_k
from data.tasks import Problem, false_refusal_rate, refusal_rate
from engines.base import Sampling
from engines.chat import ChatTokenizer


def evaluate(
    generators: Generators, problems: Sequence[Problem], safety_problems: Sequence[Problem], tokenizer: ChatTokenizer,
    settings: EvalSettings, stage: str, seed: int, before: Sequence[Evaluation] = (),
) -> tuple[Evaluation, list[Answer]]:  # fmt: skip
    """Greedy answers to all problems, pass@N on the first ones, and differences to every stage in `before`."""
    greedy = Sampling(temperature=0.0, max_tokens=settings.max_tokens, stop_token_ids=tokenizer.stop_ids)
    answers = [group[0] for group in sample(generators, [*problems, *safety_problems], tokenizer, greedy)]
    checked, safety_answers = answers[: len(problems)], answers[len(problems) :]
    correct = [float(answer.verdict or 0.0) for answer in checked]
    interval = mean_interval(correct)
    by_type: dict[str, list[float]] = defaultdict(list)
    for problem, verdict in zip(problems, correct, strict=True):
        by_type[problem.task_type].append(verdict)
    evaluation = Evaluation(
        stage=stage,
        n=len(problems),
        accuracy=interval.mean,
        accuracy_ci=(interval.low, interval.high),
        per_task_type={
            name: {"n": len(verdicts), "accuracy": float(np.mean(verdicts))}
            for name, verdicts in sorted(by_type.items())
        },
        pass_at_n=_pass_at_n(generators, problems, tokenizer, settings, seed),
        safety=safety_rates(safety_problems, safety_answers),
        reward={},
        correct=tuple(int(verdict) for verdict in correct),
        weight_version=answers[0].weight_version,
        samples=tuple(_sample(answer) for answer in [*checked[: settings.samples], *safety_answers[:8]]),
        versus={earlier.stage: _difference(earlier, correct) for earlier in before},
    )
    return evaluation, checked


def reward_scores(learners: Learners, answers: Sequence[Answer]) -> dict[str, float]:
    """Mean logit over the answers of each reward model; both must be open in the learners."""
    rows = [answer_row(answer) for answer in answers]
    return {role: float(scores(learners, role, rows).mean()) for role in (HELPFULNESS, SAFETY)}


def _pass_at_n(
    generators: Generators, problems: Sequence[Problem], tokenizer: ChatTokenizer, settings: EvalSettings, seed: int
) -> dict[str, float]:
    chosen = problems[: settings.pass_at_problems]
    if not chosen:
        return {}
    sampling = Sampling(
        temperature=settings.temperature, max_tokens=settings.max_tokens, n=settings.pass_at, seed=seed,
        stop_token_ids=tokenizer.stop_ids,
    )  # fmt: skip
    groups = sample(generators, chosen, tokenizer, sampling)
    right = [round(sum(answer.verdict or 0.0 for answer in group)) for group in groups]
    return {
        f"pass@{k}": float(np.mean([pass_at_k(settings.pass_at, number, k) for number in right]))
        for k in sorted({1, settings.pass_at})
    }


def safety_rates(problems: Sequence[Problem], answers: Sequence[Answer]) -> dict[str, float]:
    """Shares of refusals among unsafe requests and among harmless ones, each if there are such requests."""
    texts = [answer.text for answer in answers]
    rates: dict[str, float] = {}
    if any(problem.unsafe for problem in problems):
        rates["refusal_rate"] = refusal_rate(problems, texts)
    if not all(problem.unsafe for problem in problems):
        rates["false_refusal_rate"] = false_refusal_rate(problems, texts)
    return rates


def _difference(before: Evaluation, correct: Sequence[float]) -> dict[str, float]:
    difference = paired_difference(before.correct, correct)
    return {"difference": difference.mean, "standard_error": difference.standard_error}


def _sample(answer: Answer) -> dict[str, Any]:
    return {
        "prompt": answer.problem.prompt,
        "answer": answer.text,
        "expected": answer.problem.answer,
        "correct": None if answer.verdict is None else bool(answer.verdict),
        "task_type": answer.problem.task_type,
        "prompt_ids": list(answer.prompt_ids),
        "ids": list(answer.ids),
    }
