"""`DeepSpeedLearner`: any Hugging Face model in training under ZeRO 0 to 3, behind the `Learner` protocol.

Losses arrive divided by their global denominators, so gradients are sums over micro-batches and ranks: DeepSpeed's
division by the accumulation count is off (`managed_gradient_accumulation`), its average over ranks is replaced by a
sum (stages 0 to 2) or undone on the loss (stage 3, which only averages). Several learners and frozen scorers live in
one process; each call marked (collective) is made by all ranks, in the same order.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engines import random_state
from engines.base import Batch, LossFn, StepOutput
from engines.config import LearnerSettings
from engines.deepspeed import process_group, snapshots, state
from engines.deepspeed.zero import ZeroModel
from engines.forward import to_device
from engines.hf_folder import Head, load_model, save_model
from engines.optimizer import learning_rate
from engines.snapshots import Piece, SnapshotReader, Snapshots

NO_CLIP = 1e30
GATHER_ELEMENTS = 2**26
"""Elements gathered together when sharded parameters are exported (256 MiB in fp32)."""


def build(
    folder: Path,
    settings: LearnerSettings,
    *,
    rank: int = 0,
    world_size: int = 1,
    address: str | None = None,
    store: dist.Store | None = None,
    head: Head = "lm",
    frozen: bool = False,
) -> "DeepSpeedLearner":
    """(collective) Load `folder` for training, or for scoring only when `frozen`.

    The first learner of a process joins the group at `address` (host:port) or `store`; later ones share it.

    Raises:
        CheckpointError: `folder` is no whole model.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    process_group.join(rank, world_size, address, store, settings.timeout)
    model = load_model(Path(folder), head, getattr(torch, settings.dtype), settings.seed)
    return DeepSpeedLearner(model, settings, source=Path(folder), frozen=frozen)


class DeepSpeedLearner:
    """One rank of one model; implements `engines.base.Learner`. Build it with `build`."""

    def __init__(
        self, model: torch.nn.Module, settings: LearnerSettings, source: Path | None = None, frozen: bool = False
    ) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.settings = settings
        self.step = 0  # committed optimizer steps
        self.snapshots: Snapshots | None = None
        """Takes this rank's state after every step; see `engines.snapshots`."""
        self.data_position: dict[str, Any] = {}
        """What the loop needs beside `step` to find its data again (skipped windows); JSON, kept in snapshots."""
        self._pieces: list[Piece] | None = None
        self.source = source
        self.frozen = frozen
        self._model: Any = model
        self._prepare()
        if frozen and settings.zero_stage < 3:
            self._engine: Any = None
            self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self.module: torch.nn.Module = model.to(self._device).eval()
            return
        deepspeed = process_group.load_deepspeed()
        self._engine = deepspeed.initialize(
            model=model,
            optimizer=None if frozen else _optimizer(model, settings),
            config=deepspeed_config(settings, self.world_size, frozen),
            dist_init_required=False,
        )[0]
        self._device = torch.device(self._engine.device)
        self.module = self._engine

    # ---- training ----------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: Sequence[Batch], loss_fn: LossFn) -> StepOutput:
        """(collective) Sum gradients over micro-batches and ranks, clip, apply if finite everywhere.

        Every rank passes the same number of micro-batches.
        """
        assert not self.frozen, "a frozen model cannot train"
        self._engine.train()
        rate = self._set_learning_rate()
        scale = self.world_size if self.settings.zero_stage == 3 else 1
        metrics: dict[str, float] = {}
        for batch in micro_batches:
            loss, sums = loss_fn(self._engine, to_device(batch, self._device))
            self._engine.backward(loss * scale if scale > 1 else loss, scale_wrt_gas=False)
            for name, value in sums.items():
                metrics[name] = metrics.get(name, 0.0) + value
        if self.snapshots is not None:
            self.snapshots.settle()  # the weights may change only once they are copied
        self._engine.step()
        committed = bool(self._engine.was_step_applied())
        norm = float(self._engine.get_global_grad_norm()) if committed else math.inf
        self.step += committed
        self.take_snapshot()
        return StepOutput(norm, rate, committed, metrics)

    def evaluate(self, micro_batches: Sequence[Batch], fn: Callable[[torch.nn.Module, Batch], Any]) -> list[Any]:
        """Results of `fn(module, micro-batch)` in eval mode, without gradients. (collective under ZeRO-3)"""
        self.module.eval()
        with torch.no_grad():
            return [fn(self.module, to_device(batch, self._device)) for batch in micro_batches]

    def learning_rate(self, step: int) -> float:
        """Of the optimizer step after `step` committed ones."""
        return learning_rate(self.settings, step)

    # ---- weights -----------------------------------------------------------------------------------------------

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(collective) Full tensors in HF names; under stages 0 to 2 the live ones: use them before training on.

        Every rank must exhaust the iterator.
        """
        if self.settings.zero_stage < 3:
            yield from ((name, parameter.detach()) for name, parameter in self._model.named_parameters())
            return
        for group in _groups(list(self._model.named_parameters())):
            yield from self._gathered(group)

    def _gathered(self, group: list[tuple[str, torch.nn.Parameter]]) -> list[tuple[str, torch.Tensor]]:
        deepspeed = process_group.load_deepspeed()
        with deepspeed.zero.GatheredParameters([parameter for _, parameter in group]):
            return [(name, parameter.detach().clone()) for name, parameter in group]

    def save_hf(self, folder: Path) -> None:
        """(collective) A folder that plain transformers and vLLM load, with the source's tokenizer; rank 0 writes."""
        tensors = {}
        for name, tensor in self.export():
            if self.rank == 0:
                tensors[name] = tensor.cpu()
        if self.rank == 0:
            save_model(self._model, tensors, self.source, Path(folder))
        dist.barrier()

    def save_state(self, folder: Path) -> None:
        """(collective) fp32 weights, Adam moments and step, for any world size and ZeRO stage; rank 0 writes."""
        assert not self.frozen, "a frozen model has no training state"
        state.save(self._zero_model(), self.step, Path(folder))

    def load_state(self, folder: Path) -> None:
        """(collective) Resume exactly where `save_state` was called.

        Raises:
            CheckpointError: no complete state there, or one of another architecture.
        """
        assert not self.frozen, "a frozen model has no training state"
        self.step = state.load(self._zero_model(), Path(folder))

    def take_snapshot(self) -> None:
        """Begin to copy the state before the next step, where `snapshots` is set and wants this step."""
        if self.snapshots is not None:
            self._pieces = self._pieces or snapshots.pieces(self._zero_model())
            progress = {
                "step": self.step,
                "data": self.data_position,
                "random": random_state.capture(self._device),
            }
            self.snapshots.take(self.step, self._pieces, progress)

    def load_snapshot(self, reader: SnapshotReader) -> None:
        """The state of a snapshot, from any number of ranks and any stage to this one, without a collective.

        Raises:
            CheckpointError: it is of another model, not whole or not intact; the state is then undefined.
        """
        assert not self.frozen, "a frozen model has no training state"
        progress = snapshots.load(self._zero_model(), reader)
        self.step, self.data_position = int(progress["step"]), progress["data"]
        if (progress["of_rank"], progress["of_world"]) == (self.rank, self.world_size):
            random_state.apply(progress["random"], self._device)

    def close(self) -> None:
        """Free the model. The group stays, for the process's other learners; `process_group.leave` ends it."""
        if self._engine is not None:
            self._engine.destroy()
        self._engine = self._model = self._pieces = None
        self.module = torch.nn.Identity()

    # ---- details -----------------------------------------------------------------------------------------------

    def _zero_model(self) -> ZeroModel:
        return ZeroModel(self._model, self._engine.optimizer, self.settings.zero_stage, self.rank)

    def _prepare(self) -> None:
        if self.frozen:
            self._model.requires_grad_(False)
            return
        self._model.requires_grad_(True)
        if self.settings.activation_checkpointing:
            decoder = getattr(self._model, "model", self._model)
            target = self._model if hasattr(self._model, "gradient_checkpointing_enable") else decoder
            target.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _set_learning_rate(self) -> float:
        rate = self.learning_rate(self.step)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        return rate


class ClippingAdamW(torch.optim.AdamW):
    """AdamW that clips by the global norm first, and leaves everything alone when that norm is not finite.

    For stage 0, where DeepSpeed calls it directly with gradients that are the same on every rank, so that every rank
    decides alike. DeepSpeed reads `overflow` and `_global_grad_norm`, as it does from ZeRO's own optimizers.
    """

    max_norm = NO_CLIP
    overflow = False
    _global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        return None if self.overflow else super().step(closure)


def _optimizer(model: torch.nn.Module, settings: LearnerSettings) -> torch.optim.Optimizer:
    """torch's fused AdamW (DeepSpeed's would be compiled at first use); vectors (norms, biases) are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if settings.zero_stage else ClippingAdamW
    optimizer = kind(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )
    if isinstance(optimizer, ClippingAdamW):
        optimizer.max_norm = settings.max_grad_norm or NO_CLIP
    return optimizer


def deepspeed_config(settings: LearnerSettings, world_size: int, frozen: bool = False) -> dict[str, Any]:
    """DeepSpeed's own JSON configuration. Batch sizes are nominal: the caller owns the micro-batches."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "managed_gradient_accumulation": False,
        "gradient_clipping": (settings.max_grad_norm or NO_CLIP) if settings.zero_stage else 0.0,
        "zero_optimization": {"stage": settings.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }
    if settings.zero_stage < 3:
        config["gradient_allreduce_op"] = "sum"
    if settings.dtype != "float32":
        config["bf16" if settings.dtype == "bfloat16" else "fp16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _groups(
    parameters: list[tuple[str, torch.nn.Parameter]],
) -> Iterator[list[tuple[str, torch.nn.Parameter]]]:
    """Neighbours up to GATHER_ELEMENTS together: few collectives for small models, bounded memory for large ones."""
    group: list[tuple[str, torch.nn.Parameter]] = []
    elements = 0
    for name, parameter in parameters:
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        if group and elements + size > GATHER_ELEMENTS:
            yield group
            group, elements = [], 0
        group.append((name, parameter))
        elements += size
    if group:
        yield group
