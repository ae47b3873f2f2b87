"""A problem as chat messages and as a row of an instruction file."""

from typing import Any

from data.tasks.problem import Problem


def prompt_messages(problem: Problem) -> list[dict[str, str]]:
    """The user's turn, without an answer."""
    return [{"role": "user", "content": problem.prompt}]


def to_messages(problem: Problem) -> list[dict[str, str]]:
    """The user's turn and the proper answer, as training sees them."""
    return [*prompt_messages(problem), {"role": "assistant", "content": problem.answer}]


def to_instruction_row(problem: Problem) -> dict[str, Any]:
    """{"messages": [...], "task_type": "reasoning/addition"}: one line of an instruction file."""
    return {"messages": to_messages(problem), "task_type": problem.task_type}
