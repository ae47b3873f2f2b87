"""Settings of the learners and the generators. Torch-free, so that `recua --help` stays fast."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from infra.config import Seconds, Seed, Settings

Dtype = Literal["float32", "bfloat16", "float16"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class LearnerSettings(Settings):
    """One model in training, the same on every rank."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards over the ranks: 0 nothing, 1 optimizer states, 2 also gradients, 3 also parameters."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""

    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after the warm-up; it ends at `total_steps`."""

    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up from 0."""

    total_steps: int = Field(default=0, ge=0)
    """Optimizer steps of the whole schedule; 0 keeps the peak after the warm-up."""

    final_learning_rate: float = Field(default=0.1, ge=0, le=1)
    """Where the schedule ends, as a fraction of the peak."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's beta1 and beta2."""

    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""

    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's decoupled weight decay, on matrices only (norms and biases are not decayed)."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the global gradient norm to this; 0 switches clipping off."""

    dtype: Dtype = "float32"
    """Precision of weights and activations; bfloat16 keeps fp32 master weights. Without bf16 units take float32."""

    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    threads: int = Field(default=0, ge=0)
    """Intra-op threads of this rank's process; 0 leaves them as they are."""

    seed: Seed = 0
    """Seeds the initialisation of what the folder does not hold (a new scalar head)."""

    timeout: Seconds = 600.0
    """Seconds after which a collective on a live but silent peer fails."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> "LearnerSettings":
        if self.total_steps and self.warmup_steps > self.total_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceeds total_steps {self.total_steps}")
        return self


class SnapshotSettings(Settings):
    """Training state in host memory, taken beside the training."""

    every: int = Field(default=1, ge=1)
    """Steps between snapshots; an infrastructure fault costs at most this many."""

    keep: int = Field(default=2, ge=1)
    """Whole snapshots kept while the next is written: a rank's host memory is one more than this times its shard, three
    more with `milestones`, and two more after doubtful steps (a NaN, a spike of the loss) if there is room."""

    milestones: int = Field(default=0, ge=0)
    """Steps between snapshots that stay in memory for longer, the newest two of them, beyond `keep`; 0 keeps none."""

    replicas: int = Field(default=1, ge=0)
    """Copies of every shard on other nodes; 0 survives lost processes but no lost node."""

    flush_every: int = Field(default=0, ge=0)
    """Steps between snapshots that also go to the store, in the background; 0 sends none."""

    flush_keep: int = Field(default=2, ge=1)
    """Complete snapshots that stay in the store."""


class GeneratorSettings(Settings):
    """One vLLM engine."""

    dtype: Dtype = "float32"
    """Precision of weights and activations. CPUs without bf16 units want float32."""

    kv_cache_gib: float = Field(default=0.5, ge=0)
    """Memory for the KV cache in GiB, reserved at the start; 0 derives it from `gpu_memory_utilization`."""

    max_model_len: int = Field(default=512, gt=1)
    """Longest prompt plus answer in tokens."""

    max_num_seqs: int = Field(default=256, gt=0)
    """Sequences decoded together."""

    max_num_batched_tokens: int = Field(default=8192, gt=0)
    """Tokens of prompts and answers in one engine step; bounds activation memory."""

    enforce_eager: bool = True
    """Skip compilation and CUDA graphs: a faster start, and no loss for toy models on CPU."""

    tensor_parallel: int = Field(default=1, gt=0)
    """Devices that one engine spans."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of each device's memory that vLLM may take."""

    threads: int = Field(default=1, gt=0)
    """CPU threads of the engine's process."""

    seed: Seed = 0
    """Seeds the sampler of requests that carry no seed of their own."""

    weight_backend: Literal["shared_memory", "nccl", "ipc"] = "shared_memory"
    """How new weights arrive: shared_memory on CPU, nccl across GPUs, ipc on the same GPU."""

    shared_folder: Path = Path("/dev/shm")
    """Where the shared_memory backend puts weights: a folder in memory that both sides see."""

    start_timeout: Seconds = 600.0
    """Seconds until the engine must answer for the first time."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> "GeneratorSettings":
        if self.max_num_batched_tokens < self.max_model_len:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_model_len {self.max_model_len}"
            )
        return self
