"""Settings of the pools: how many processes train and sample, and the resources of each. No torch, no ray."""

from typing import Literal

from pydantic import Field

from infra.config import Cpus, Gpus, Seconds, Settings


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
