"""Generated tasks with checkable answers: the tiny recipe's instruction, reinforcement and evaluation problems.

problems = make_problems(["reasoning/addition", "strings/reverse"], count=512, seed=0, split="held_out")
verify(problems[0], "46")        # 1.0 or 0.0
to_messages(problems[0])         # [{"role": "user", ...}, {"role": "assistant", ...}]
"""

from data.tasks.messages import prompt_messages, to_instruction_row, to_messages
from data.tasks.problem import Problem, Split, side_of
from data.tasks.registry import kind_names, make_problems
from data.tasks.safety import false_refusal_rate, is_refusal, refusal_rate
from data.tasks.verify import verify

__all__ = [
    "Problem",
    "Split",
    "false_refusal_rate",
    "is_refusal",
    "kind_names",
    "make_problems",
    "prompt_messages",
    "refusal_rate",
    "side_of",
    "to_instruction_row",
    "to_messages",
    "verify",
]
