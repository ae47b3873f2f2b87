"""Checks of how many steps and pairs the training settings make of the data. They run before a run, with upper bounds,
and in each stage, with the real amounts. Imports no torch.
"""

import logging

from actors.posttrain.config import PpoSettings, RewardSettings
from engines.config import LearnerSettings
from infra.errors import ConfigError, DataError, UserError

log = logging.getLogger(__name__)

FEWEST_PAIRS = 2
"""Fewest preference pairs of a reward model: one to train on and one to hold out."""
MOST_SAMPLES = 10**8
"""Most samples of a stage; the order of more would not fit memory."""


def sample_count(count: int, epochs: float) -> int:
    """Samples drawn in `epochs` passes over `count`."""
    return round(count * epochs)


def require_steps(section: str, epochs: float, count: int, what: str) -> None:
    """Check that passes over `count` samples (`what` names them) make an optimizer step.

    Raises:
        ConfigError: `section`.epochs is too small, or so large that the order of its samples would not fit memory.
    """
    if sample_count(count, epochs) > MOST_SAMPLES:
        raise ConfigError(
            f"{section}.epochs = {epochs:g} of {count} {what} are {count * epochs:g} samples, more than the limit of "
            f"{MOST_SAMPLES:g}: lower it"
        )
    if sample_count(count, epochs) < 1:
        raise ConfigError(
            f"{section}.epochs = {epochs:g} of {count} {what} makes no optimizer step: raise it above {0.5 / count:g}, "
            "or give more data"
        )


def held_out_pairs(settings: RewardSettings, count: int) -> int:
    """The number of `count` preference pairs that are held out to measure a reward model.

    Raises:
        DataError: too few pairs.
        ConfigError: a setting of `reward` leaves no pair to train on.
    """
    if count < FEWEST_PAIRS:
        raise DataError(
            f"{count} preference pairs cannot train a reward model: raise preferences.prompts, and "
            "preferences.safety_prompts and problems.safety_prompts for the safety model"
        )
    held_out = max(1, round(count * settings.held_out))
    if held_out >= count:
        raise ConfigError(f"reward.held_out = {settings.held_out:g} leaves none of {count} pairs to train on: lower it")
    require_steps("reward", settings.epochs, count - held_out, "pairs (without those held out)")
    return held_out


def require_rollouts(settings: PpoSettings) -> None:
    """Check that a rollout batch has two answers or more: scores are whitened over the answers of a batch.

    Raises:
        ConfigError: a batch has one answer.
    """
    if settings.batch_size * settings.answers < 2:
        raise ConfigError(
            f"ppo.batch_size = {settings.batch_size} and ppo.answers = {settings.answers} make batches of one answer: "
            "scores are compared within a batch, which needs two; raise one of them"
        )
    if settings.critic_warmup_steps >= settings.steps:
        log.warning(
            "ppo.critic_warmup_steps = %d leaves none of ppo.steps = %d to the policy, which will not change",
            settings.critic_warmup_steps, settings.steps,
        )  # fmt: skip


def tell_long_warmup(setting: str, optimizer: LearnerSettings, steps: int) -> None:
    """Log a warning if a stage's steps (at most `steps`) end before its learning rate reaches its peak."""
    if optimizer.warmup_steps > steps:
        log.warning(
            "%s.warmup_steps = %d exceeds the at most %d optimizer steps: the learning rate never reaches its peak",
            setting, optimizer.warmup_steps, steps,
        )  # fmt: skip


def require_learnt(section: str, committed: float, steps: int) -> None:
    """Check that a stage changed its model. `committed`: the number of its applied steps.

    Raises:
        UserError: no step was applied.
    """
    if not committed:
        raise UserError(
            f"{section}: none of {steps} optimizer steps could be applied, because no gradient was finite: lower the "
            f"learning rate in {section}, or check the weights that the stage starts from"
        )
