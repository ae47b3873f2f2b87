"""How much training settings make of so much data. Asked before a run starts, of the most that there can be, and by
each stage of what there is. Imports no torch.
"""

import logging

from actors.posttrain.config import PpoSettings, RewardSettings
from engines.config import LearnerSettings
from infra.errors import ConfigError, DataError, UserError

log = logging.getLogger(__name__)

FEWEST_PAIRS = 2
"""Preference pairs that a reward model needs: one to learn from and one to be measured on."""


MOST_SAMPLES = 10**8
"""Samples of one stage whose order fits memory."""


def sample_count(count: int, epochs: float) -> int:
    """Samples that are drawn in so many passes over `count`."""
    return round(count * epochs)


def require_steps(section: str, epochs: float, count: int, what: str) -> None:
    """Refuse passes over `count` samples (`what` names them) that make no optimizer step.

    Raises:
        ConfigError: `section`.epochs is too small, or so large that the order of its samples fits no memory.
    """
    if sample_count(count, epochs) > MOST_SAMPLES:
        raise ConfigError(
            f"{section}.epochs = {epochs:g} of {count} {what} are {count * epochs:g} samples, at most {MOST_SAMPLES:g} "
            "can be planned: lower it"
        )
    if sample_count(count, epochs) < 1:
        raise ConfigError(
            f"{section}.epochs = {epochs:g} of {count} {what} makes no optimizer step: raise it above {0.5 / count:g}, "
            "or give more data"
        )


def held_out_pairs(settings: RewardSettings, count: int) -> int:
    """How many of `count` preference pairs a reward model is measured on, instead of learning from them.

    Raises:
        DataError: too few pairs.
        ConfigError: a setting of `reward` that leaves nothing to learn from.
    """
    if count < FEWEST_PAIRS:
        raise DataError(
            f"{count} preference pairs cannot train a reward model: raise preferences.prompts, and "
            "preferences.safety_prompts and problems.safety_prompts for the safety model"
        )
    held_out = max(1, round(count * settings.held_out))
    if held_out >= count:
        raise ConfigError(
            f"reward.held_out = {settings.held_out:g} leaves none of {count} pairs to learn from: lower it"
        )
    require_steps("reward", settings.epochs, count - held_out, "pairs (those held out left aside)")
    return held_out


def require_rollouts(settings: PpoSettings) -> None:
    """Refuse rollout batches that PPO's formulas cannot use: scores are whitened over the answers of a batch.

    Raises:
        ConfigError: a batch is one answer.
    """
    if settings.batch_size * settings.answers < 2:
        raise ConfigError(
            f"ppo.batch_size = {settings.batch_size} and ppo.answers = {settings.answers} make batches of one answer: "
            "scores are compared within a batch, which takes two; raise one of them"
        )
    if settings.critic_warmup_steps >= settings.steps:
        log.warning(
            "ppo.critic_warmup_steps = %d leaves no step of ppo.steps = %d to the policy: it stays as it is",
            settings.critic_warmup_steps, settings.steps,
        )  # fmt: skip


def tell_long_warmup(setting: str, optimizer: LearnerSettings, steps: int) -> None:
    """Log where a stage's steps (`steps` at most) end before its learning rate has reached its peak."""
    if optimizer.warmup_steps > steps:
        log.warning(
            "%s.warmup_steps = %d is above the %d optimizer steps that there are at most: the learning rate never "
            "reaches its peak", setting, optimizer.warmup_steps, steps,
        )  # fmt: skip


def require_learnt(section: str, committed: float, steps: int) -> None:
    """Refuse a model that is what it was before its stage. `committed`: how many of its steps were applied.

    Raises:
        UserError: none was.
    """
    if not committed:
        raise UserError(
            f"{section}: none of {steps} optimizer steps could be applied, no gradient was a finite number: lower the "
            f"learning rate in {section}, or look at the weights that the stage starts from"
        )
