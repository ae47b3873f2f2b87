"""The two small protocols that third-party runtimes sit behind, and the records that cross them.

A `Learner` is one rank's view of one trained model (torch-native or DeepSpeed). A `Generator` samples token ids
(vLLM). Neither knows Ray: `actors/` puts them into processes. Weights go learner -> generator as a `WeightUpdate`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

Batch = Mapping[str, torch.Tensor]
"""One micro-batch: name -> tensor, first dimension = sequences. Always has `input_ids` [B, T] and `attention_mask`
[B, T] (padded on the right) or, when packed, `position_ids` [B, T] and `segment_ids` [B, T] (0 = padding)."""

LossFn = Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, dict[str, float]]]
"""(module, micro-batch) -> (loss, metric sums). The loss is already divided by the *global* denominator (over all ranks
and micro-batches), so that the learner only ever sums: over micro-batches and over ranks."""


@dataclass(frozen=True)
class StepOutput:
    """What one optimizer step did.

    `grad_norm` before clipping; `metrics` are sums over this rank's micro-batches (all-reduce them to report).
    `committed` is False when the gradient was not finite and nothing was applied.
    """

    grad_norm: float
    learning_rate: float
    committed: bool
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightUpdate:
    """Weights on their way to generators.

    `backend` is the vLLM weight-transfer engine ("shared_memory" on CPU, "nccl" or "ipc" on GPU); `names`, `dtypes`
    and `shapes` describe the tensors in HF naming; `location` is what the backend needs to find the bytes
    (e.g. {"path": "/dev/shm/..."}); `version` is what every later completion carries.
    """

    version: str
    backend: str
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    location: dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature=0` is greedy. `stop_token_ids` end an answer and stay in it."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 64
    n: int = 1
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Completion:
    """One sampled answer, e.g. token_ids (52, 17, 5), logprobs (-0.1, -0.7, 0.0), "stop", "v3".

    `token_ids` [T] end with the stop token when there was one; `logprobs` [T] are the sampler's own.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str  # "stop" | "length"
    weight_version: str


class Learner(Protocol):
    """One rank of one model in training. Every method marked (collective) is called by all ranks together."""

    rank: int
    world_size: int
    module: torch.nn.Module

    def train_step(self, micro_batches: Sequence[Batch], loss_fn: LossFn) -> StepOutput:
        """(collective) Accumulate, sum over ranks, clip, and apply if the gradient is finite on every rank."""
        ...

    def evaluate(self, micro_batches: Sequence[Batch], fn: Callable[[torch.nn.Module, Batch], Any]) -> list[Any]:
        """Run `fn` per micro-batch in eval mode without gradients. (collective under ZeRO-3)"""
        ...

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(collective) Full tensors in HF names, one at a time, for generators and for `save_hf`."""
        ...

    def save_hf(self, folder: Path) -> None:
        """(collective) A folder that plain transformers and vLLM load; rank 0 writes."""
        ...

    def close(self) -> None:
        """Free the model; the process can then build another learner."""
        ...


class Generator(Protocol):
    """A sampling engine with versioned weights."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """`prompts` [P][T_p] token ids -> completions [P][n], in order. A prompt too long is a ValueError."""
        ...

    def update_weights(self, update: WeightUpdate) -> None:
        """Swap the weights in place, drop caches, carry the new version from here on."""
        ...

    def load_weights(self, folder: Path, version: str) -> None:
        """The same from a saved HF folder of the same architecture."""
        ...

    @property
    def weight_version(self) -> str: ...

    def close(self) -> None: ...
