"""Settings of pretraining and the post-training loops: the stage sections of a recipe. Imports neither torch nor
ray."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from engines.config import LearnerSettings
from infra.config import Settings

Epochs = Annotated[float, Field(gt=0, le=1e6)]
"""Passes over data."""


class SftSettings(Settings):
    """Supervised fine-tuning, without prompt tokens in the loss."""

    optimizer: LearnerSettings = LearnerSettings()
    """Learning rate, schedule, clipping."""
    epochs: Epochs = 2
    """Passes over the data; a fraction is allowed."""
    batch_size: int = Field(default=64, ge=1)
    """Examples per optimizer step, over all ranks."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant turns carry loss."""
    aggregation: Literal["token-mean", "seq-mean"] = "token-mean"
    """How token losses become one loss; `seq-mean` gives a one-token answer the weight of a long one."""
    max_length: int = Field(default=128, ge=8)
    """Longest example in tokens; a longer one is an error and never cut silently."""
    packing: bool = False
    """Pack several examples into one row of `max_length` tokens; attention stays inside each example."""


class PreferenceSettings(Settings):
    """Preference pairs from the policy's own samples, so that the reward models stay in distribution."""

    prompts: int = Field(default=1024, ge=1)
    """Checkable training problems to sample, for the helpfulness model."""
    safety_prompts: int = Field(default=256, ge=1)
    """Unsafe requests and safe look-alikes to sample, for the safety model."""
    answers: int = Field(default=6, ge=2)
    """Answers per prompt."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    max_tokens: int = Field(default=16, ge=1)
    """Longest answer, in tokens."""


class RewardSettings(Settings):
    """A Bradley-Terry reward model, initialised from the policy with a scalar head."""

    optimizer: LearnerSettings = LearnerSettings()
    """Learning rate, schedule, clipping."""
    epochs: Epochs = 1
    """Passes over the pairs."""
    batch_size: int = Field(default=64, ge=1)
    """Pairs per optimizer step, over all ranks."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the pairs that is held out to measure the model's accuracy."""
    margin: Literal["none", "small", "large"] = "none"
    """Llama 2's margin by rating; Llama 3 has none."""


class RejectionSettings(Settings):
    """Rejection sampling: the best of K answers per prompt."""

    prompts: int = Field(default=2048, ge=1)
    """Training prompts per round."""
    answers: int = Field(default=8, ge=2)
    """K, answers per prompt."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    max_tokens: int = Field(default=16, ge=1)
    """Longest answer, in tokens."""
    threshold: float | None = None
    """Keep a best answer only if its score is at least this; none keeps all."""
    minimum_gap: float = Field(default=0.0, ge=0)
    """Best and worst become a preference pair only if their scores differ by at least this."""
    verifier_weight: float = Field(default=5.0, ge=0)
    """Weight of the task's checker (0 or 1) in the score, if the task has one."""


class DpoSettings(Settings):
    """Direct preference optimisation (Rafailov 2023) with Llama 3's additions."""

    optimizer: LearnerSettings = LearnerSettings()
    """Learning rate, schedule, clipping."""
    epochs: Epochs = 1
    """Passes over the pairs."""
    batch_size: int = Field(default=64, ge=1)
    """Pairs per optimizer step, over all ranks."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the penalty for leaving the reference."""
    loss: Literal["dpo", "ipo", "cdpo"] = "dpo"
    """The preference loss."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """cDPO's flip probability, for `loss = "cdpo"` only."""
    nll_weight: float = Field(default=0.2, ge=0)
    """Weight of the negative log-likelihood of the chosen answer (Llama 3: 0.2)."""
    mask_format_tokens: bool = True
    """Leave header and terminator tokens out of the preference term (Llama 3)."""

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> "DpoSettings":
        if self.label_smoothing and self.loss != "cdpo":
            raise ValueError(
                f'label_smoothing {self.label_smoothing:g} is not read by loss "{self.loss}": set loss = "cdpo", or '
                "leave it out"
            )
        return self


class PpoSettings(Settings):
    """PPO with a critic (Schulman 2017; InstructGPT; Llama 2)."""

    policy: LearnerSettings = LearnerSettings()
    """The policy's learning rate, schedule, clipping."""
    critic: LearnerSettings = LearnerSettings()
    """The critic's learning rate, schedule, clipping."""
    steps: int = Field(default=40, ge=1)
    """Rollout batches."""
    batch_size: int = Field(default=256, ge=1)
    """Prompts per rollout batch."""
    answers: int = Field(default=1, ge=1)
    """Answers per prompt."""
    mini_batch_size: int = Field(default=128, ge=1)
    """Answers per optimizer step."""
    epochs: int = Field(default=1, ge=1, le=1_000_000)
    """Passes over one rollout batch."""
    critic_warmup_steps: int = Field(default=0, ge=0)
    """Rollout batches that train the critic alone."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    max_tokens: int = Field(default=16, ge=1)
    """Longest answer, in tokens."""
    clip: float = Field(default=0.2, gt=0)
    """Policy ratio clip."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Cap on the loss of negative advantages; none turns it off."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """How far the critic may move from its old values, in units of the score; none turns it off."""
    kl_beta: float = Field(default=0.01, ge=0)
    """KL penalty per token against the reference (Llama 2: 0.01 small, 0.005 large)."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda."""
    verifier_weight: float = Field(default=4.0, ge=0)
    """Weight of the task's checker beside the whitened reward-model score, if the task has one."""
    reward_weight: float = Field(default=0.2, ge=0)
    """Weight of the reward models' score if the task has a checker; without a checker the weight is 1."""

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole stage."""
        return -(-self.batch_size * self.answers // self.mini_batch_size) * self.epochs * self.steps


class EvalSettings(Settings):
    """Held-out problems, the same set for every stage."""

    problems: int = Field(default=1024, ge=16)
    """Checkable held-out problems, answered greedily."""
    safety_prompts: int = Field(default=128, ge=0)
    """Held-out unsafe requests and safe look-alikes, half each."""
    pass_at: int = Field(default=4, ge=1)
    """N of pass@N."""
    pass_at_problems: int = Field(default=256, ge=0)
    """Problems sampled N times for pass@N."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the pass@N samples."""
    max_tokens: int = Field(default=16, ge=1)
    """Longest answer, in tokens."""
    samples: int = Field(default=24, ge=1)
    """Answers shown in the report."""
