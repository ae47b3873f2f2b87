"""The torch-native learner: one rank of a model in training, sharded by `models.parallelize` or not at all.

Sharding is not its business: it sees parameters (plain tensors or DTensors) and gradients that are sums. The state that
it saves has the parameters' names and global shapes, so that any other mesh loads it.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from engines import state_folder
from engines.base import Batch, LossFn, StepOutput
from engines.config import LearnerSettings
from engines.optimizer import decayed_groups, learning_rate
from engines.ranks import Ranks
from infra.errors import CheckpointError
from models.hf_format import to_hf_name
from models.llama import Llama, LlamaConfig
from models.parallelize import materialize, parallelize
from models.tokenizer import Tokenizer, load_tokenizer
from models.weights import save_hf

__all__ = ["LlamaConfig", "TorchLearner", "build"]


def build(
    config: LlamaConfig,
    settings: LearnerSettings,
    ranks: Ranks,
    *,
    fsdp: bool,
    compile_blocks: bool = False,
    seed: int = 0,
    tokenizer_dir: Path | None = None,
) -> "TorchLearner":
    """(collective) A learner of a new network, sharded over `ranks`, with the start values of `seed` on every mesh.

    `fsdp` shards over the replicas, else they stay whole; see `models.parallelize.parallelize` for the rest.
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
    materialize(model, ranks.device, seed)
    tokenizer = load_tokenizer(tokenizer_dir) if tokenizer_dir is not None else None
    reduces = fsdp and ranks.mesh is not None
    return TorchLearner(model, settings, ranks, reduces_gradients=reduces, tokenizer=tokenizer)


class TorchLearner:
    """AdamW on one (possibly sharded) module.

    Args:
        module: already on its device and already sharded; fp32 parameters.
        settings: optimizer and schedule; `zero_stage`, `dtype` and `activation_checkpointing` are about how the module
            was made, not read here.
        ranks: the mesh that the module is sharded over.
        reduces_gradients: True when backward itself sums gradients over the replicas (FSDP); False when the learner
            has to (replicated parameters).
        tokenizer: saved into every HF folder.
    """

    def __init__(
        self,
        module: Llama,
        settings: LearnerSettings,
        ranks: Ranks,
        *,
        reduces_gradients: bool,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.module: torch.nn.Module = module
        self.settings, self.ranks, self.config = settings, ranks, module.config
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.step = 0
        """Steps taken, committed or not: the next one's place in schedule and data."""
        self._reduces_gradients = reduces_gradients
        self._tokenizer = tokenizer
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            decayed_groups(module, settings),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        for parameter in self._parameters.values():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=ranks.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def learning_rate(self, step: int) -> float:
        """Of step `step` = 0, 1, ...; constant after the warm-up when `total_steps` is 0."""
        return learning_rate(self.settings, step)

    def train_step(self, micro_batches: Sequence[Batch], loss_fn: LossFn) -> StepOutput:
        """(collective) One optimizer step. Every rank passes equally many micro-batches (FSDP gathers in each)."""
        self.module.train()
        metrics: dict[str, float] = {}
        for micro_batch in micro_batches:
            loss, sums = loss_fn(self.module, micro_batch)
            loss.backward()
            for name, value in sums.items():
                metrics[name] = metrics.get(name, 0.0) + value
        if not self._reduces_gradients:
            self._sum_gradients()
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        grad_norm = self._clip()
        if committed := self.ranks.should_commit(grad_norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return StepOutput(grad_norm, rate, committed, metrics)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch], fn: Callable[[torch.nn.Module, Batch], Any]) -> list[Any]:
        """(collective when sharded) `fn` per micro-batch in eval mode; equally many on every rank."""
        self.module.eval()
        return [fn(self.module, micro_batch) for micro_batch in micro_batches]

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(collective) Full tensors in HF names, one at a time; valid until the next one is asked for."""
        for name, parameter in self.module.named_parameters():
            yield to_hf_name(name), _full(parameter.detach())

    def save_hf(self, folder: Path) -> None:
        """(collective) A folder that plain transformers and vLLM load; rank 0 gathers and writes."""
        if self.rank == 0:
            save_hf(self.export(), self.config, folder, self._tokenizer)
        else:
            for _ in self.export():  # take part in the gathers
                pass
        self.ranks.barrier()

    def save_state(self, folder: Path) -> None:
        """(collective) Weights, optimizer and step as a DCP checkpoint, appearing under its name only when whole.

        `folder` must be on a file system that all ranks see.
        """
        draft = state_folder.partial(folder)
        if self.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        self.ranks.barrier()
        writer = dcp.FileSystemWriter(draft, sync_files=True)
        dcp.save(self._state(), storage_writer=writer, no_dist=self.ranks.mesh is None)
        own = [file.name for file in draft.glob(f"__{self.rank}_*")]
        if self.rank == 0:
            own.append(".metadata")
        files: dict[str, list] = {}
        for part in self.ranks.gather(state_folder.checksums(draft, own)):
            files.update(part)  # type: ignore[call-overload]
        if self.rank == 0:
            state_folder.seal(folder, files)
        self.ranks.barrier()

    def load_state(self, folder: Path) -> None:
        """(collective) The inverse of `save_state`, from any mesh to this one.

        Raises:
            CheckpointError: the state is damaged, or is of a model with other parameters.
        """
        self._refuse_damaged(folder)
        state = self._state()
        try:
            dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=self.ranks.mesh is None)
        except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"state {folder} does not fit this model: {error}") from error
        self.step = int(state["progress.step"].item())
        updates = float(state["progress.updates"].item())
        for parameter in self._parameters.values():
            self.optimizer.state[parameter]["step"].fill_(updates)

    def close(self) -> None:
        """Drop model and optimizer; the process can then build another learner."""
        self.optimizer.state.clear()
        self.optimizer.param_groups.clear()
        self._parameters.clear()
        del self.module

    def _state(self) -> dict[str, torch.Tensor]:
        """Everything needed to go on, by global name. Tensors are the live ones: loading writes into them."""
        state: dict[str, torch.Tensor] = {}
        updates = 0.0
        for name, parameter in self._parameters.items():
            moments = self.optimizer.state[parameter]
            state[f"model.{name}"] = parameter.detach()
            state[f"exp_avg.{name}"] = moments["exp_avg"]
            state[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
            updates = float(moments["step"].item())
        state["progress.step"] = torch.tensor(self.step)
        state["progress.updates"] = torch.tensor(updates, dtype=torch.float64)
        return state

    def _refuse_damaged(self, folder: Path) -> None:
        problem = None
        if self.rank == 0:
            try:
                state_folder.verify(folder)
            except CheckpointError as error:
                problem = str(error)
        found = self.ranks.gather(problem)[0]
        if found is not None:
            raise CheckpointError(str(found))

    def _sum_gradients(self) -> None:
        """Sum over the replicas in one all-reduce of one flat buffer."""
        gradients = []
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif isinstance(parameter.grad, DTensor):  # sequence parallelism leaves norms' gradients as partial sums
                parameter.grad = parameter.grad.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
            gradients.append(_local(parameter.grad))
        if self.ranks.mesh is None or self.ranks.data_size == 1:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=self.ranks.mesh["dp"].get_group())
        pieces = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])

    def _clip(self) -> float:
        """Scale the gradient to `max_grad_norm` if it is longer; returns its length before."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = _full(norm)
        if self.settings.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self.settings.max_grad_norm, norm)
        return float(norm.item())


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
