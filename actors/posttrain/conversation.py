"""Problems as token ids, and sampled answers as training rows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from actors.pools.generators import Generators
from actors.pools.micro_batches import Row
from data.tasks import Problem, prompt_messages, verify
from engines.base import Completion, Sampling
from engines.chat import ChatTokenizer


@dataclass(frozen=True)
class Answer:
    """One sampled answer to one problem, with the data that later stages need.

    `prompt_ids` [P] and `ids` [T] (with the stop token, if there is one); `logprobs` [T] are the sampler's; `verdict`
    is the checker's, 0 or 1, or None if the task has no checker.
    """

    problem: Problem
    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    verdict: float | None
    weight_version: str

    def to_row(self) -> dict[str, Any]:
        """A JSON object for an artifact."""
        return asdict(self)

    @staticmethod
    def from_row(row: dict[str, Any]) -> "Answer":
        lists = {name: tuple(row[name]) for name in ("prompt_ids", "ids", "logprobs")}
        return Answer(**{**row, **lists, "problem": Problem.from_row(row["problem"])})


def prompt_ids(problem: Problem, tokenizer: ChatTokenizer) -> list[int]:
    """The conversation up to where the assistant's answer starts."""
    return tokenizer.prompt(prompt_messages(problem))


def sample(
    generators: Generators, problems: Sequence[Problem], tokenizer: ChatTokenizer, sampling: Sampling
) -> list[list[Answer]]:
    """`sampling.n` answers to every problem, [P][n], checked where the task can be checked."""
    prompts = [prompt_ids(problem, tokenizer) for problem in problems]
    completions = generators.generate(prompts, sampling)
    return [
        [_answer(problem, prompt, completion, tokenizer) for completion in group]
        for problem, prompt, group in zip(problems, prompts, completions, strict=True)
    ]


def _answer(problem: Problem, prompt: Sequence[int], completion: Completion, tokenizer: ChatTokenizer) -> Answer:
    text = tokenizer.text(completion.token_ids)
    finished = completion.finish_reason == "stop"
    # An answer that did not end is wrong even if it starts right: it is not usable.
    verdict = (verify(problem, text) if finished else 0.0) if problem.checkable else None
    return Answer(
        problem, text, tuple(prompt), completion.token_ids, completion.logprobs, finished, verdict,
        completion.weight_version,
    )  # fmt: skip


def supervised_row(messages: Sequence[dict[str, str]], task_type: str, tokenizer: ChatTokenizer, train_on: Any) -> Row:
    """One instruction example: {"ids" [T], "mask" [T] (1 on target tokens), "task", "length"}."""
    ids, mask = tokenizer.example(messages, train_on)
    return {"ids": ids, "mask": mask, "task": task_type, "length": len(ids)}


def answer_row(answer: Answer) -> Row:
    """A sampled answer as a sequence: {"ids" [P+T], "mask" [P+T] (1 on the answer), "task", "length"}."""
    ids = [*answer.prompt_ids, *answer.ids]
    mask = [0] * len(answer.prompt_ids) + [1] * len(answer.ids)
    return {"ids": ids, "mask": mask, "task": answer.problem.task_type, "length": len(ids)}
