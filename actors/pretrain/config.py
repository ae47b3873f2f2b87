"""Settings of pretraining (a recipe's section). No torch, no ray."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.config import ElasticSettings
from data.config import Growth
from engines.config import LearnerSettings
from infra.config import Cpus, Gpus, Settings
from infra.errors import ConfigError
from infra.storage import parse_store


class PretrainSettings(Settings):
    """Next-token training from scratch with the torch-native learner."""

    optimizer: LearnerSettings = LearnerSettings(learning_rate=1e-3, eps=1e-5, warmup_steps=20)
    """AdamW, schedule, precision. `total_steps` 0 means `steps`; `zero_stage` (DeepSpeed's) is not read."""
    steps: int = Field(default=300, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=32, ge=1)
    """Rows per optimizer step, over all ranks; any number, also one that the ranks do not divide."""
    batch_growth: Growth = ()
    """(first step, rows) pairs in rising order: from that step on a batch has that many rows (Llama 3: 4M, 8M, then
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
