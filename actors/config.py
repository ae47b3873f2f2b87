"""Settings of pretraining and the post-training loops: the stage sections of a recipe. Imports neither torch nor
ray."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.config import ElasticSettings
from data.config import Growth
from engines.config import LearnerSettings
from infra.config import Cpus, Gpus, Seconds, Settings
from infra.errors import ConfigError
from infra.storage import parse_store

Epochs = Annotated[float, Field(gt=0, le=1e6)]
"""Passes over data."""


class LearnerPoolSettings(Settings):
    """The training processes: one group of ranks, started once and lent from stage to stage."""

    workers: int = Field(default=2, ge=1)
    """Data-parallel ranks (DeepSpeed ZeRO shards over them)."""
    num_cpus: Cpus = Field(default=0.25, gt=0)
    """CPUs that Ray books for one rank. Learners and generators take turns and can share a laptop's cores."""
    num_gpus: Gpus = 0
    """GPUs that Ray books for one rank."""
    threads: int = Field(default=1, ge=1)
    """OpenMP threads of one rank on CPU."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards the optimizer, 2 also gradients, 3 also parameters."""
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Largest padded micro-batch (rows x longest row) of one rank; lower it when memory runs out."""
    idle_timeout_s: Seconds = 600
    """An idle pool ends itself after this many seconds without a borrower."""


class GeneratorPoolSettings(Settings):
    """The sampling processes: vLLM engines, started once and lent from stage to stage."""

    replicas: int = Field(default=1, ge=1)
    """vLLM engines; prompts are split over them."""
    num_cpus: Cpus = Field(default=0.5, gt=0)
    """CPUs that Ray books for one engine."""
    num_gpus: Gpus = 0
    """GPUs that Ray books for one engine."""
    idle_timeout_s: Seconds = 600
    """An idle pool ends itself after this many seconds without a borrower."""


class PretrainSettings(Settings):
    """Next-token training from scratch with the torch-native learner."""

    optimizer: LearnerSettings = LearnerSettings(learning_rate=1e-3, eps=1e-5, warmup_steps=20)
    """AdamW, schedule, precision. `total_steps` 0 means `steps`; `zero_stage` (DeepSpeed's) is not read."""
    steps: int = Field(default=300, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=32, ge=1)
    """Rows per optimizer step, over all ranks. The number of ranks need not divide it."""
    batch_growth: Growth = ()
    """(first step, rows) pairs in rising order: from that step on the batch has that many rows (Llama 3: 4M, 8M, then
    16M tokens). A window of data that a rollback skips counts as a step here."""
    sequence_length: int = Field(default=128, ge=2)
    """Tokens per row."""
    within_documents: bool = False
    """Keep attention within a document if a row holds several (Llama 3); this rules out fused causal attention."""
    micro_batch_size: int = Field(default=32, ge=1)
    """Most rows that one rank puts through the network at once; lower it if memory runs out."""
    workers: int = Field(default=2, ge=1)
    """Ranks in all: data-parallel replicas x `pipeline_parallel` x `tensor_parallel`."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks that share one replica's matrices (with sequence parallelism around them)."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Stages of one replica's layers; each has `tensor_parallel` ranks. Stages idle least with several micro-batches:
    set `micro_batch_size` well below the rows of one replica."""
    sharding: Literal["replicate", "fsdp"] = "replicate"
    """`fsdp` shards weights, gradients and optimizer over the replicas; `replicate` keeps them whole on each, which is
    faster for a small model."""
    shard_over: int = Field(default=0, ge=0)
    """With `fsdp`: the number of replicas that share one copy; the others hold further copies (HSDP). 0 means all of
    them, as does a number that does not divide the replicas that remain after a loss."""
    compile: bool = False
    """Compile each block with torch.compile (worthwhile on a GPU)."""
    num_cpus: Cpus = Field(default=0.5, gt=0)
    """CPUs that Ray books for one rank."""
    num_gpus: Gpus = 0
    """GPUs that Ray books for one rank; 0 trains on CPU."""
    threads: int = Field(default=1, ge=1)
    """OpenMP threads of one rank."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray places the ranks on nodes."""
    validate_every: int = Field(default=0, ge=0)
    """Steps between measurements of the held-out loss, if there is held-out text; 0: only after the last step."""
    validation_rows: int = Field(default=256, ge=1)
    """Most rows of held-out text for that measurement."""
    save_every: int = Field(default=50, ge=1)
    """Steps between snapshots that also go to storage, in the background: the most that the loss of all memory
    costs."""
    snapshot_store: str = ""
    """Folder or s3:// URL of these snapshots; empty: the run's own state folder."""
    keep_states: int = Field(default=2, ge=1)
    """Snapshots kept in storage; if the newest is damaged, the one before is used."""
    elastic: ElasticSettings = ElasticSettings()
    """What happens when ranks are lost, hang, are slow or diverge. `max_workers`, `tensor_parallel` and
    `pipeline_parallel` come from this section; `min_workers` defaults to one replica."""

    @property
    def block(self) -> int:
        """Ranks of one replica."""
        return self.tensor_parallel * self.pipeline_parallel

    def group(self) -> ElasticSettings:
        """The complete elastic settings, with `min_workers` in whole blocks."""
        given, block = self.elastic.model_dump(exclude_unset=True), self.block
        given["min_workers"] = -(-self.elastic.min_workers // block) * block
        return ElasticSettings(**_group(given, self.workers, self.tensor_parallel, self.pipeline_parallel))

    @field_validator("snapshot_store")
    @classmethod
    def _is_a_store(cls, url: str) -> str:
        try:
            if url:
                parse_store(url, "")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return url

    @model_validator(mode="before")
    @classmethod
    def _says_it_once(cls, values: Any) -> Any:
        """Complete the elastic settings with `workers` and this section's parallelism, before they are checked."""
        if not isinstance(values, Mapping) or not isinstance(values.get("elastic", {}), Mapping):
            return values
        given, own = values.get("elastic", {}), {}
        for theirs, name in _SHARED.items():
            if theirs in given and given[theirs] != values.get(name):
                raise ValueError(f"elastic.{theirs} is {name}: leave it out")
            own[name] = cls.model_fields[name].default if values.get(name) is None else values[name]
        if not all(isinstance(size, int) and size >= 1 for size in own.values()):
            return values  # the fields' own checks report the problem
        if own["workers"] % (own["tensor_parallel"] * own["pipeline_parallel"]):
            return values
        return {**values, "elastic": _group(given, **own)}

    @model_validator(mode="after")
    def _fits(self) -> "PretrainSettings":
        if self.workers % self.block:
            size = f"tensor_parallel {self.tensor_parallel}"
            size += f" x pipeline_parallel {self.pipeline_parallel}" if self.pipeline_parallel > 1 else ""
            raise ValueError(f"workers {self.workers} must divide by {size}")
        if self.sequence_length % self.tensor_parallel:
            raise ValueError(
                f"sequence_length {self.sequence_length} must divide by tensor_parallel {self.tensor_parallel}"
            )
        if self.optimizer.dtype != "float32" and self.sharding == "replicate":
            raise ValueError(f"optimizer.dtype {self.optimizer.dtype} needs sharding = fsdp")
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(f"optimizer.warmup_steps {self.optimizer.warmup_steps} exceeds steps {self.steps}")
        return self


_SHARED = {"max_workers": "workers", "tensor_parallel": "tensor_parallel", "pipeline_parallel": "pipeline_parallel"}
"""Elastic settings that come from the section around them."""


def _group(given: Mapping[str, Any], workers: int, tensor_parallel: int, pipeline_parallel: int) -> dict[str, Any]:
    whole = {"max_workers": workers, "tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    return {"min_workers": tensor_parallel * pipeline_parallel, **given, **whole}


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
