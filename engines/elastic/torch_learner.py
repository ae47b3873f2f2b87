"""The torch-native learner: one rank of a model in training, sharded by `models.parallelize` or not at all.

Sharding is not its business: it sees parameters (plain tensors or DTensors) and gradients that are sums. The state that
it saves has the parameters' names and global shapes, so that any other mesh loads it.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from engines import random_state
from engines.base import Batch, LossFn, StepOutput
from engines.collectives.ranks import Ranks
from engines.config import LearnerSettings
from engines.elastic.sharded_adamw import MOMENTS, ShardedAdamW
from engines.hf_folder import LICENCES, copy_files
from engines.optimizer import learning_rate
from engines.snapshots import Piece, SnapshotReader, Snapshots, restore
from infra.errors import CheckpointError
from models.hf_format import to_hf_name
from models.llama import Llama, LlamaConfig, parameter_shapes
from models.parallelize import allocate, fill, is_sharded, materialize, parallelize, stage_of
from models.tokenizers import Tokenizer, load_tokenizer
from models.weights import read_tensors, save_hf

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from engines.elastic.pipeline import Pipeline

__all__ = ["LlamaConfig", "TorchLearner", "build"]

log = logging.getLogger(__name__)

RECENT = 128
"""Losses that a learner keeps, with its state."""


def build(
    config: LlamaConfig,
    settings: LearnerSettings,
    ranks: Ranks,
    *,
    fsdp: bool,
    compile_blocks: bool = False,
    seed: int | None = 0,
    tokenizer_dir: Path | None = None,
    weights_dir: Path | None = None,
    moved: Callable[[], None] = lambda: None,
) -> "TorchLearner":
    """(collective) A learner of a new network, sharded over `ranks`, with the weights of an HF folder, or else with the
    start values of `seed`, the same on every mesh.

    `fsdp` shards over the replicas, else they stay whole; see `models.parallelize.parallelize` for the rest. Without
    either the weights are left as memory had them: load a state before the first step. `moved` is called before every
    tensor.

    Raises:
        CheckpointError: the folder's weights are not of this network.
    """
    with torch.device("meta"):
        model = Llama(config)
    parallelize(
        model=model,
        mesh=ranks.mesh,
        fsdp=fsdp,
        activation_checkpointing=settings.activation_checkpointing,
        compile_blocks=compile_blocks,
        dtype=getattr(torch, settings.dtype),
    )
    if seed is not None and weights_dir is None:
        materialize(model, ranks.device, seed, moved)
    else:
        allocate(model, ranks.device)
    if weights_dir is not None:
        fill(model, read_tensors(weights_dir, config, torch.float32), moved)
    reduces = fsdp and ranks.mesh is not None
    return TorchLearner(model, settings, ranks, reduces_gradients=reduces, tokenizer_dir=tokenizer_dir)


class TorchLearner:
    """AdamW on one (possibly sharded) module.

    Args:
        module: already on its device and already sharded; fp32 parameters.
        settings: optimizer and schedule; `zero_stage`, `dtype` and `activation_checkpointing` are about how the module
            was made, not read here.
        ranks: the mesh that the module is sharded over.
        reduces_gradients: True when backward itself sums gradients over the replicas (FSDP); False when the learner
            has to (replicated parameters).
        tokenizer_dir: of the tokenizer that is saved into every HF folder.
    """

    def __init__(
        self,
        module: Llama,
        settings: LearnerSettings,
        ranks: Ranks,
        *,
        reduces_gradients: bool,
        tokenizer_dir: Path | None = None,
    ) -> None:
        self.module: torch.nn.Module = module
        self.settings, self.ranks, self.config = settings, ranks, module.config
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.step = 0
        """Steps taken, committed or not: the next one's place in schedule and data."""
        self.snapshots: Snapshots | None = None
        """Takes this rank's state after every step; see `engines.snapshots`."""
        self.data_position: dict[str, Any] = {}
        """What the loop needs beside `step` to find its data again (skipped windows); JSON, kept in snapshots."""
        self.last_step: dict[str, Any] = {}
        """What the ranks agreed on for step `step - 1`: grad_norm, lr, committed, metrics added up over the replicas.
        Kept in snapshots, so that a rank that resumes from one knows the outcome of the step before it."""
        self.losses: list[float] = []
        """Of the last `RECENT` steps, oldest first, NaN where the update was not applied. Kept in snapshots too."""
        self.reduces_gradients = reduces_gradients
        self._tokenizer_dir = tokenizer_dir
        self._pieces: list[Piece] | None = None
        self._shapes = parameter_shapes(self.config) if ranks.stages > 1 else {}
        self.optimizer = ShardedAdamW(module, settings, self.world_size, ranks.stages)
        self._pipeline = _pipeline(module, ranks, settings) if ranks.stages > 1 else None

    def learning_rate(self, step: int) -> float:
        """Of step `step` = 0, 1, ...; constant after the warm-up when `total_steps` is 0."""
        return learning_rate(self.settings, step)

    def train_step(self, micro_batches: Sequence[Batch], loss_fn: LossFn) -> StepOutput:
        """(collective) One optimizer step. Every rank passes equally many micro-batches (FSDP gathers in each)."""
        with self.ranks.waits.watching():
            return self._train_step(micro_batches, loss_fn)

    def _train_step(self, micro_batches: Sequence[Batch], loss_fn: LossFn) -> StepOutput:
        self.module.train()
        metrics = self._backward(micro_batches, loss_fn)
        if not self.reduces_gradients:
            self._sum_gradients()
        if self._pipeline is not None and self.optimizer.twin is not None:
            self._pipeline.add_twin(self.optimizer.gradient(self.optimizer.twin))
        rate = self.learning_rate(self.step)
        grad_norm = self.optimizer.clip()
        if self.snapshots is not None:
            with self.ranks.waits.waiting("checkpoint_stall"):  # the weights may change only once they are copied
                sealed = self.snapshots.settle()
            self.ranks.copies_missing = sealed is None or bool(sealed.problems)
        if committed := self.ranks.should_commit(grad_norm, metrics):
            self.optimizer.update(rate)
        self.optimizer.clear_gradients()
        self.step += 1
        self.last_step = {"grad_norm": grad_norm, "lr": rate, "committed": committed, **self.ranks.totals}
        loss = float(self.ranks.totals.get("loss", math.nan)) if committed else math.nan
        self.losses = [*self.losses[1 - RECENT :], loss]
        self.take_snapshot()
        return StepOutput(grad_norm, rate, committed, metrics)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch], fn: Callable[[torch.nn.Module, Batch], Any]) -> list[Any]:
        """(collective when sharded) `fn` per micro-batch in eval mode; equally many on every rank."""
        self.module.eval()
        if self._pipeline is not None:
            return self._pipeline.evaluate(micro_batches, fn)
        return [fn(self.module, micro_batch) for micro_batch in micro_batches]

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(collective) Full tensors in HF names, one at a time; valid until the next one is asked for."""
        if self._pipeline is not None:
            yield from self._export_stages(self._pipeline)
            return
        for name, parameter in self.module.named_parameters():
            yield to_hf_name(name), _full(parameter.detach())

    def save_hf(self, folder: Path) -> None:
        """(collective) A folder that plain transformers and vLLM load; rank 0 gathers and writes.

        What is wrong with its tokenizer does not keep a model from being saved: it is logged. The licences that lie
        beside the tokenizer go along.
        """
        if self.rank == 0:
            save_hf(self.export(), self.config, folder, self._tokenizer())
            if self._tokenizer_dir is not None:
                copy_files(LICENCES, self._tokenizer_dir, folder)
        else:
            for _ in self.export():  # take part in the gathers
                pass
        self.ranks.barrier()

    def _tokenizer(self) -> Tokenizer | None:
        try:
            return load_tokenizer(self._tokenizer_dir) if self._tokenizer_dir is not None else None
        except CheckpointError as error:
            log.warning("the model is saved without a tokenizer: %s", error)
            return None

    def take_snapshot(self, due: bool = False) -> None:
        """Begin to copy the state before the next step, where `snapshots` is set and wants this step, or it is due."""
        if self.snapshots is not None:
            tensors = len(self._shapes) * (1 + len(MOMENTS)) if self.ranks.stages > 1 else 0
            self.snapshots.take(self.step, self.pieces(), self._progress(), tensors, due)

    def load_snapshot(self, reader: SnapshotReader) -> None:
        """The state of a snapshot, from any mesh to this one, without a collective.

        Raises:
            CheckpointError: it is of another model, not whole or not intact; the state is then undefined.
        """
        restore(self.pieces(), reader)
        progress = reader.progress(self.rank)
        self.step, self.data_position = int(progress["step"]), progress["data"]
        self.last_step, self.losses = progress["last_step"], progress.get("losses", [])
        self.optimizer.updates = progress["updates"]
        if (progress["of_rank"], progress["of_world"]) == (self.rank, self.world_size):
            random_state.apply(progress["random"], self.ranks.device)

    def pieces(self) -> list[Piece]:
        """This rank's part of weights and moments: the live tensors, and where each lies in the whole."""
        if self._pieces is None:
            stage = f"pp={self.ranks.stage}" if self.ranks.stages > 1 else ""
            self._pieces = [_piece(name, tensor, stage) for name, tensor in self.optimizer.state().items()]
        return self._pieces

    def close(self) -> None:
        """Drop model and optimizer; the process can then build another learner."""
        self.optimizer.close()
        self._pieces = self._pipeline = None
        del self.module

    def _progress(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "updates": self.optimizer.updates,
            "data": self.data_position,
            "last_step": self.last_step,
            "losses": self.losses,
            "random": random_state.capture(self.ranks.device),
        }

    def _backward(self, micro_batches: Sequence[Batch], loss_fn: LossFn) -> dict[str, float]:
        """(collective) Add up the gradients of all micro-batches; their metric sums."""
        if self._pipeline is not None:
            return self._pipeline.train(micro_batches, loss_fn)
        metrics: dict[str, float] = {}
        for micro_batch in micro_batches:
            loss, sums = loss_fn(self.module, micro_batch)
            loss.backward()
            for name, value in sums.items():
                metrics[name] = metrics.get(name, 0.0) + value
        return metrics

    def _export_stages(self, pipeline: "Pipeline") -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor from the first stage that holds it, in the order of the whole network."""
        for name, shape in self._shapes.items():
            stage = stage_of(self.config, name, self.ranks.stages)
            if stage == self.ranks.stage:
                tensor = _full(self.optimizer.parameters[name].detach()).contiguous()
            else:
                tensor = torch.empty(shape, dtype=torch.float32, device=self.ranks.device)
            pipeline.broadcast(tensor, stage)
            yield to_hf_name(name), tensor

    def _sum_gradients(self) -> None:
        """Sum over the replicas in one all-reduce of one flat buffer."""
        for parameter in self.optimizer.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = self.optimizer.gradients()
        if self.ranks.data is None or self.ranks.data_size == 1:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=self.ranks.data.get_group())
        pieces = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])


def _pipeline(module: Llama, ranks: Ranks, settings: LearnerSettings) -> "Pipeline":
    from engines.elastic.pipeline import Pipeline  # torch's schedules take 0.7 s of CPU to import

    return Pipeline(module, ranks, getattr(torch, settings.dtype))


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _piece(name: str, tensor: torch.Tensor, stage: str) -> Piece:
    if not is_sharded(tensor):
        return replace(Piece.whole(name, tensor), place=stage)
    chunks = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
    assert len(chunks) == 1, f"{name} is in {len(chunks)} pieces on one rank"
    return Piece(name, tensor.to_local(), tuple(tensor.shape), tuple(chunks[0].offsets), _place(tensor, stage))


def _place(tensor: "DTensor", stage: str) -> str:
    """Where this rank sits among those that hold other pieces, e.g. "shard=1,tp=0"; replicas of it sit there too."""
    mesh = tensor.device_mesh
    names, coordinate = mesh.mesh_dim_names or (), mesh.get_coordinate() or ()
    cut = zip(names, coordinate, tensor.placements, strict=True)
    places = [f"{name}={position}" for name, position, placed in cut if not placed.is_replicate()]
    return ",".join([*filter(None, [stage]), *places])
