"""One rank of pretraining: the loop that all ranks run in step.

Fault points (see `infra.faults`), hit once per step or save of one process: `pretrain.generation-G.rank-R.step` (before
the step's computation, while the others enter it) and `pretrain.generation-G.rank-R.save` (before a state is saved).
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from actors.config import PretrainSettings
from actors.process_group import process_groups
from cluster.worker import Seat, Worker
from data.config import BatchSettings
from data.loader import DataLoader
from data.tokenized import TokenWindows, document_segments
from engines import state_folder
from engines.base import Batch, LossFn
from engines.ranks import Ranks
from engines.torch_learner import LlamaConfig, TorchLearner, build
from infra.errors import StepError
from infra.faults import FaultSchedule

METRICS = "metrics.jsonl"
NO_TARGET = -100


@dataclass(frozen=True)
class PretrainJob:
    """What every rank is told; see `actors.pretrain.pretrain`."""

    tokens_dir: Path
    tokenizer_dir: Path
    model: LlamaConfig
    settings: PretrainSettings
    out: Path
    state: Path
    seed: int
    faults: str = ""


class PretrainWorker(Worker):
    """The actor class; `cluster.worker_group.WorkerGroup` makes one per rank."""

    def __init__(self, settings: PretrainSettings) -> None:
        self.settings = settings
        self.device = torch.device("cuda", 0) if settings.num_gpus > 0 else torch.device("cpu")
        torch.set_num_threads(settings.threads)

    def join(self, seat: Seat) -> None:
        """(collective) Also opens the process group and the mesh."""
        super().join(seat)
        self.groups = process_groups(seat, self.device, self.settings.optimizer.timeout)
        self.ranks = self.groups.form(lambda: Ranks.over_all(self.settings.tensor_parallel, self.device))

    def train(self, job: PretrainJob, resume: Path | None) -> Iterator[dict[str, Any]]:
        """(collective) Train to the end from a state or from scratch, save the model. Rank 0 yields a row per step."""
        assert self.seat is not None, "train() before join()"
        with self.groups.naming_lost_peers():
            yield from self._train(job, resume)

    def _train(self, job: PretrainJob, resume: Path | None) -> Iterator[dict[str, Any]]:
        assert self.seat is not None
        settings, ranks = job.settings, self.ranks
        faults = FaultSchedule.parse(job.faults)
        place = f"pretrain.generation-{self.seat.generation}.rank-{self.seat.rank}"
        learner = build_learner(job, ranks)
        if resume is not None:
            learner.load_state(resume)
        loader = BatchLoader(job, ranks)
        metrics = MetricsFile(job.state / METRICS, learner.step) if ranks.rank == 0 else None
        skipped = 0
        while learner.step < settings.steps:
            started, step = time.perf_counter(), learner.step
            micro_batches, tokens = loader.micro_batches(step)
            faults.reach(f"{place}.step")
            output = learner.train_step(micro_batches, next_token_loss(tokens))
            loss = ranks.sum(output.metrics)["loss"]
            skipped = 0 if output.committed else skipped + 1
            if skipped > settings.max_skipped_steps:
                raise StepError(
                    f"pretraining: the gradient was not finite in {skipped} steps in a row up to step {step}; lower "
                    f"pretrain.optimizer.learning_rate (max_skipped_steps = {settings.max_skipped_steps})"
                )
            if metrics is not None:
                row = {"step": step, "steps": settings.steps, "loss": loss, "lr": output.learning_rate}
                row |= {"grad_norm": output.grad_norm, "committed": output.committed, "tokens": tokens}
                row["tokens_per_s"] = round(tokens / (time.perf_counter() - started), 1)
                metrics.write(row)
                yield row
            if learner.step % settings.save_every == 0 or learner.step == settings.steps:
                faults.reach(f"{place}.save")
                save_state(learner, job, metrics)
        learner.save_hf(job.out)


def build_learner(job: PretrainJob, ranks: Ranks) -> TorchLearner:
    """(collective) The sharded network with its seeded start values, and its optimizer."""
    settings = job.settings
    optimizer = settings.optimizer
    if optimizer.total_steps == 0:
        optimizer = optimizer.model_copy(update={"total_steps": settings.steps})
    return build(
        job.model,
        optimizer,
        ranks,
        fsdp=settings.sharding == "fsdp",
        compile_blocks=settings.compile,
        seed=job.seed,
        tokenizer_dir=job.tokenizer_dir,
    )


def save_state(learner: TorchLearner, job: PretrainJob, metrics: "MetricsFile | None") -> None:
    """(collective) The state before the learner's next step; metrics of the steps before it are durable first."""
    if metrics is not None:
        metrics.sync()
    learner.save_state(state_folder.state_path(job.state, learner.step))
    if learner.rank == 0:
        state_folder.prune(job.state, job.settings.keep_states)


class BatchLoader:
    """This rank's tensors of any step: a function of the step, the seed and the number of replicas."""

    def __init__(self, job: PretrainJob, ranks: Ranks) -> None:
        settings = job.settings
        self._windows = TokenWindows(job.tokens_dir, settings.sequence_length)
        self._loader = DataLoader({"tokens": self._windows}, BatchSettings(size=settings.batch_size), job.seed)
        self._settings, self._ranks = settings, ranks

    def micro_batches(self, step: int) -> tuple[list[Batch], int]:
        """(micro-batches, target tokens in the whole global batch).

        Equally many on every rank; one that got no row holds a row without targets, so that all join equal collectives.
        """
        size, ranks = self._settings.micro_batch_size, self._ranks
        pieces = self._loader.micro_batches(step, ranks.data_rank, ranks.data_size, size)
        tokens = self._loader.ids.batch_size(step) * self._settings.sequence_length
        return [self._tensors(piece) for piece in pieces], tokens

    def _tensors(self, piece: list[np.ndarray]) -> Batch:
        rows = np.stack(piece or [self._windows[0]])  # [B, T + 1]
        inputs, targets = rows[:, :-1], rows[:, 1:] if piece else np.full_like(rows[:, 1:], NO_TARGET)
        arrays = {"input_ids": inputs, "targets": targets}
        if self._settings.within_documents:
            segments, positions = document_segments(inputs, self._windows.index["end_id"])
            arrays |= {"segment_ids": segments, "position_ids": positions}
        return {name: torch.from_numpy(np.ascontiguousarray(a)).to(self._ranks.device) for name, a in arrays.items()}


def next_token_loss(tokens: int) -> LossFn:
    """Sum of -log p(target) over this micro-batch / target tokens of the global batch, in nats per token."""

    def loss_fn(module: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        logits = module(batch["input_ids"], batch.get("position_ids"), batch.get("segment_ids"))  # [B, T, V]
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), batch["targets"].flatten(), ignore_index=NO_TARGET, reduction="sum"
        )
        loss = losses / tokens
        return loss, {"loss": float(loss.detach())}

    return loss_fn


class MetricsFile:
    """metrics.jsonl in the state folder: one row per step, each once; rows from `step` on are of a lost future."""

    def __init__(self, path: Path, step: int) -> None:
        kept = read_metrics(path, below=step)
        draft = path.with_suffix(".partial")
        draft.write_text("".join(json.dumps(row) + "\n" for row in kept))
        draft.replace(path)
        self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def read_metrics(path: Path, below: int) -> list[dict[str, Any]]:
    """Rows of the steps before `below`; a last line that a crash cut short is of a later step and is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] < below:
            rows.append(row)
    return rows
