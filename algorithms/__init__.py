"""Losses, advantages, rewards, preference pairs, schedules and statistics: pure functions of tensors.

Nothing here knows a model, an optimizer or a process. Per-token tensors are [B, T] and aligned with the tokens
(`logprobs`). Every loss takes its denominator from outside (`aggregate`), so that results do not depend on how a batch
is cut into micro-batches, ranks or packed rows. Read `logprobs` and `aggregate` first, then the stage you need.
"""

__all__ = [
    "aggregate",
    "bootstrap",
    "dpo",
    "grpo",
    "kl",
    "logprobs",
    "ppo",
    "rejection",
    "reward",
    "schedule",
    "scores",
    "sft",
]
