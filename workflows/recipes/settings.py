"""What a post-training recipe file may say: one frozen tree, a section per stage. Steps get only their own section.

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
"""Of a folder or a preset: nothing would mean the folder that the run was started in."""


class ModelSettings(Settings):
    """The network: a preset by name, or sizes; or an HF folder to start from, which skips pretraining."""

    init_from: Name | None = None
    """An HF folder with weights and tokenizer. Pretraining is skipped. Chats are rendered in Llama 3's or Llama 2's
    format, whichever its tokenizer has the tokens of: the folder has that chat template, or none."""
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
    """How many made problems each purpose gets. Sides are disjoint by construction."""

    instructions: int = Field(default=8192, ge=0)
    """Checkable problems with answers, for SFT."""
    careless_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the made demonstrations that come from somebody who misread the question, where its kind has such an
    answer (sorts downwards, leaves the text as it is). SFT imitates them too; the later stages have to find out."""
    safety_instructions: int = Field(default=1024, ge=0)
    """Unsafe requests and safe look-alikes with proper answers, for SFT."""
    stdlib_instructions: int = Field(default=256, ge=0)
    """Questions about Python's standard library, answered from its own documentation, for SFT."""
    instruction_files: tuple[str, ...] = ()
    """More instruction data: JSONL or parquet files with `messages`, folders, globs, or `datasets:NAME` (data.formats).
    A turn of the assistant that says `"weight": 0` is read and not trained on."""
    prompts: int = Field(default=8192, ge=1)
    """Checkable problems that the sampling stages ask."""
    safety_prompts: int = Field(default=512, ge=0)
    """Safety problems that the sampling stages ask."""
    held_out: int = Field(default=1024, ge=16)
    """Checkable problems kept for evaluation."""
    safety_held_out: int = Field(default=128, ge=0)
    """Safety problems kept for evaluation."""


class TokenizerSettings(Settings):
    """The tokenizer: trained on the corpus, or taken from a folder."""

    folder: Name | None = None
    """A tokenizer folder (HF tokenizer.json, Llama 3 tiktoken or SentencePiece model) to use as it is."""
    vocab_size: int = Field(default=512, ge=288)
    """Tokens of the BPE that is trained when no folder is given."""


class PoolSettings(Settings):
    """Processes that outlive a step. They decide where and how fast, never what: no part of a step's key."""

    unkeyed: ClassVar[bool] = True

    learners: LearnerPoolSettings = LearnerPoolSettings()
    """The ranks that train."""
    generators: GeneratorPoolSettings = GeneratorPoolSettings()
    """The engines that sample."""
    engine: GeneratorSettings = GeneratorSettings()
    """One sampling engine (vLLM)."""


class StageSettings(PretrainSettings):
    """One stage of a pretraining run: its own text, length, batch and schedule; AdamW starts anew in each."""

    after: str | None = None
    """The stage whose model it goes on from; none is from scratch."""
    corpus: CorpusSettings | None = None
    """Text of its own (`stages.NAME.corpus`); without it the run's."""
    context: int | None = Field(default=None, ge=16)
    """Context in tokens from this stage on; the model's own (or the last stage's) where it is not set."""
    rope_theta: float | None = Field(default=None, gt=0)
    """Base of the rotary positions from this stage on: raise it for a longer context."""

    @property
    def changes(self) -> dict[str, float]:
        """What becomes another in the network's config."""
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
    """Network; with `init_from` pretraining is continued on that folder."""
    stages: dict[str, StageSettings] = Field(min_length=1)
    """Stages by name; each names the one it comes after."""

    @model_validator(mode="after")
    def _stages_follow(self) -> "PretrainRecipe":
        for name, stage in self.stages.items():
            if not name or name.startswith(".") or set(name) & set("/[]\0") or len(name.encode()) > LONGEST_STAGE_NAME:
                raise ValueError(
                    f"stages: {name!r} must be named without / [ ] and a dot at its start, in at most "
                    f"{LONGEST_STAGE_NAME} bytes: files are named after it"
                )
            if stage.after is not None and stage.after not in self.stages:
                known = ", ".join(self.stages)
                raise ValueError(f"stages.{name}.after names {stage.after!r}, which is no stage: {known}")
        if len(self.in_order()) < len(self.stages):
            raise ValueError("stages: every `after` leads round in a circle")
        return self

    def in_order(self) -> list[str]:
        """Names, each after the stage that it goes on from."""
        done: list[str] = []
        while ready := [n for n, s in self.stages.items() if n not in done and (s.after is None or s.after in done)]:
            done += ready
        return done


class Recipe(Settings):
    """A whole run, from text to an endpoint."""

    seed: Seed = 0
    """Every random choice of the run follows from it; held-out problems are the same for all seeds."""
    rounds: int = Field(default=1, ge=1)
    """Rounds of preferences -> reward models -> rejection sampling -> DPO -> PPO, each from the newest policy."""
    corpus: CorpusSettings = CorpusSettings()
    """Pretraining text."""
    tasks: TaskSettings = TaskSettings()
    """Made tasks: which kinds and how hard."""
    problems: ProblemSettings = ProblemSettings()
    """Made tasks: how many."""
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
