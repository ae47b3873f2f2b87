"""The schema of recipe files: one frozen tree with a section per stage. Steps get only their own section.

Imports neither torch nor ray, so that a mistake in a recipe is reported in well under a second.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, model_validator

from actors.pools.config import GeneratorPoolSettings, LearnerPoolSettings
from actors.posttrain.config import (
    DpoSettings,
    EvalSettings,
    PpoSettings,
    PreferenceSettings,
    RejectionSettings,
    RewardSettings,
    SftSettings,
)
from actors.pretrain.config import PretrainSettings
from data.config import CorpusSettings, TaskSettings
from engines.config import GeneratorSettings
from infra.config import Seed, Settings
from serving.config import ServingSettings

if TYPE_CHECKING:
    from models.llama import LlamaConfig

LONGEST_STAGE_NAME = 200
Name = Annotated[str, Field(min_length=1)]
"""The name of a folder or a preset. Not empty: that would mean the folder in which the run was started."""


class ModelSettings(Settings):
    """The network: a preset, or sizes; or an HF folder to start from, which skips pretraining."""

    init_from: Name | None = None
    """An HF folder with weights and tokenizer; skips pretraining. Chats are rendered in Llama 3's or Llama 2's format,
    depending on the tokenizer's special tokens; the folder must have that chat template, or none."""
    preset: Name | None = None
    """A size by name, e.g. "llama3-8b" (see `models.presets`); the sizes below are then ignored."""
    dim: int = Field(default=128, ge=8)
    """Width of the residual stream."""
    layers: int = Field(default=4, ge=1)
    """Transformer blocks."""
    heads: int = Field(default=4, ge=1)
    """Query heads."""
    kv_heads: int = Field(default=4, ge=1)
    """Key and value heads; fewer than `heads` is grouped-query attention."""
    ffn_dim: int | None = Field(default=None, ge=8)
    """Width of the SwiGLU layer; unset takes Llama's formula."""
    context: int = Field(default=256, ge=16)
    """Context in tokens."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary positions."""
    tied: bool = True
    """Share the token embedding with the output layer."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelSettings":
        if self.dim % self.heads or (self.dim // self.heads) % 2 or self.heads % self.kv_heads:
            raise ValueError(
                f"dim {self.dim} / heads {self.heads} must be whole and even, and heads a multiple of kv_heads "
                f"{self.kv_heads}"
            )
        return self

    def to_llama(self, vocab_size: int) -> "LlamaConfig":
        """The network's own config, for a tokenizer of `vocab_size`."""
        from models.presets import preset, scratch_config

        if self.preset is not None:
            return preset(self.preset)
        return scratch_config(
            self.dim,
            self.layers,
            self.heads,
            self.kv_heads,
            vocab_size,
            self.context,
            ffn_dim=self.ffn_dim,
            rope_theta=self.rope_theta,
            tied=self.tied,
        )


class ProblemSettings(Settings):
    """The numbers of generated problems for each purpose. Training and held-out problems are always disjoint."""

    instructions: int = Field(default=8192, ge=0)
    """Checkable problems with answers, for SFT."""
    careless_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the generated demonstrations that misread the question (sort downwards, leave the text as it is), for
    kinds that have such an answer. SFT imitates them; the later stages must unlearn them."""
    safety_instructions: int = Field(default=1024, ge=0)
    """Unsafe requests and safe look-alikes with proper answers, for SFT."""
    stdlib_instructions: int = Field(default=256, ge=0)
    """Questions about Python's standard library, answered from its own documentation, for SFT."""
    instruction_files: tuple[str, ...] = ()
    """More instruction data: JSONL or parquet files with `messages`, folders, globs, or `datasets:NAME` (data.formats).
    An assistant turn with `"weight": 0` is read but not trained on."""
    prompts: int = Field(default=8192, ge=1)
    """Checkable problems for the sampling stages."""
    safety_prompts: int = Field(default=512, ge=0)
    """Safety problems for the sampling stages."""
    held_out: int = Field(default=1024, ge=16)
    """Checkable problems kept for evaluation."""
    safety_held_out: int = Field(default=128, ge=0)
    """Safety problems kept for evaluation."""


class TokenizerSettings(Settings):
    """The tokenizer: trained on the corpus, or taken from a folder."""

    folder: Name | None = None
    """A tokenizer folder to use unchanged (HF tokenizer.json, Llama 3 tiktoken or SentencePiece model)."""
    vocab_size: int = Field(default=512, ge=288)
    """Tokens of the BPE that is trained if no folder is given."""


class PoolSettings(Settings):
    """Processes that outlive a step. They affect where and how fast a step runs, not its result, so that they are no
    part of its key."""

    unkeyed: ClassVar[bool] = True

    learners: LearnerPoolSettings = LearnerPoolSettings()
    """The ranks that train."""
    generators: GeneratorPoolSettings = GeneratorPoolSettings()
    """The engines that sample."""
    engine: GeneratorSettings = GeneratorSettings()
    """One sampling engine (vLLM)."""


class StageSettings(PretrainSettings):
    """One stage of a pretraining run, with its own text, length, batch and schedule. AdamW's state starts from zero."""

    after: str | None = None
    """The stage whose model it continues; empty: it starts from scratch."""
    corpus: CorpusSettings | None = None
    """Text of its own (`stages.NAME.corpus`); without it the run's."""
    context: int | None = Field(default=None, ge=16)
    """Context in tokens from this stage on; default: the model's own, or the previous stage's."""
    rope_theta: float | None = Field(default=None, gt=0)
    """Base of the rotary positions from this stage on: raise it for a longer context."""

    @property
    def changes(self) -> dict[str, float]:
        """The changes to the network's config."""
        return {name: value for name in ("context", "rope_theta") if (value := getattr(self, name)) is not None}


class PretrainRecipe(Settings):
    """From text to a pretrained model, in stages."""

    seed: Seed = 0
    """Every random choice of the run follows from it."""
    corpus: CorpusSettings = CorpusSettings()
    """Text; its held-out share measures every stage."""
    tokenizer: TokenizerSettings = TokenizerSettings()
    """Tokenizer."""
    model: ModelSettings = ModelSettings()
    """Network; with `init_from` pretraining continues from that folder."""
    stages: dict[str, StageSettings] = Field(min_length=1)
    """Stages by name; each names the stage before it."""

    @model_validator(mode="after")
    def _stages_follow(self) -> "PretrainRecipe":
        for name, stage in self.stages.items():
            if not name or name.startswith(".") or set(name) & set("/[]\0") or len(name.encode()) > LONGEST_STAGE_NAME:
                raise ValueError(
                    f"stages: {name!r} must be named without / [ ] and without a dot at its start, in at most "
                    f"{LONGEST_STAGE_NAME} bytes: files are named after it"
                )
            if stage.after is not None and stage.after not in self.stages:
                known = ", ".join(self.stages)
                raise ValueError(f"stages.{name}.after names {stage.after!r}, which is not a stage: {known}")
        if len(self.in_order()) < len(self.stages):
            raise ValueError("stages: every `after` is part of a circle")
        return self

    def in_order(self) -> list[str]:
        """Names, each after the stage that it continues."""
        done: list[str] = []
        while ready := [n for n, s in self.stages.items() if n not in done and (s.after is None or s.after in done)]:
            done += ready
        return done


class Recipe(Settings):
    """A whole run, from text to an endpoint."""

    seed: Seed = 0
    """Seed of every random choice of the run; held-out problems are the same for all seeds."""
    rounds: int = Field(default=1, ge=1)
    """Rounds of preferences -> reward models -> rejection sampling -> DPO -> PPO, each from the newest policy."""
    corpus: CorpusSettings = CorpusSettings()
    """Pretraining text."""
    tasks: TaskSettings = TaskSettings()
    """Generated tasks: their kinds and sizes."""
    problems: ProblemSettings = ProblemSettings()
    """Generated tasks: their numbers."""
    tokenizer: TokenizerSettings = TokenizerSettings()
    """Tokenizer."""
    model: ModelSettings = ModelSettings()
    """Network."""
    pretrain: PretrainSettings = PretrainSettings()
    """Pretraining."""
    sft: SftSettings = SftSettings()
    """Supervised fine-tuning."""
    preferences: PreferenceSettings = PreferenceSettings()
    """Preference pairs."""
    reward: RewardSettings = RewardSettings()
    """Both reward models."""
    rejection: RejectionSettings = RejectionSettings()
    """Rejection sampling."""
    rejection_sft: SftSettings = SftSettings()
    """SFT on the best answers."""
    dpo: DpoSettings = DpoSettings()
    """Direct preference optimisation."""
    ppo: PpoSettings = PpoSettings()
    """PPO."""
    eval: EvalSettings = EvalSettings()
    """Evaluation of every stage."""
    serving: ServingSettings = ServingSettings()
    """The endpoint of the last model."""
    pools: PoolSettings = PoolSettings()
    """Learner and generator processes."""
