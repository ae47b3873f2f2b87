"""The data of pretraining: a rank's micro-batches of any step, those of held-out text, and their loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from actors.pretrain.handover import local
from actors.pretrain.job import PretrainJob
from data.config import BatchSettings
from data.loader import DataLoader
from data.mixture import SampleIds
from data.tokenized import TokenWindows, document_segments
from engines.base import Batch, LossFn
from engines.collectives.ranks import Ranks
from engines.elastic.torch_learner import TorchLearner

NO_TARGET = -100
SAMPLE_TOKENS = 512
"""Tokens of a sample: enough to find a rank that computes wrongly."""


@dataclass(frozen=True)
class Texts:
    """A job's open token shards: training text, and held-out text if there is any."""

    trained: TokenWindows
    held_out: TokenWindows | None


def open_texts(job: PretrainJob) -> Texts:
    """Open every shard: once per process, not per generation.

    Raises:
        DataError: tokens are missing or damaged, or are shorter than one row.
    """
    length = job.settings.sequence_length
    trained = TokenWindows(local(job.tokens), length)
    return Texts(trained, None if job.held_out is None else TokenWindows(local(job.held_out), length))


@dataclass(frozen=True)
class StepBatches:
    """One rank's data of one step.

    Every rank has equally many `micro_batches`; an empty one holds a row without targets, so that all ranks join equal
    collectives.
    """

    micro_batches: list[Batch]
    tokens: int
    """Target tokens in the global batch."""
    window: int
    """The window of the data order that the step takes."""
    weight: float
    """This replica's computing over the average replica's; at least 1."""


class BatchLoader:
    """This rank's tensors of any step: a function of the step, the seed, the skipped windows, and the replicas.

    Args:
        texts: the job's tokens, if they are open already.
    """

    def __init__(
        self, job: PretrainJob, ranks: Ranks, skipped: tuple[int, ...] = (), texts: Texts | None = None
    ) -> None:
        settings = job.settings
        self._texts = texts or open_texts(job)
        batch = BatchSettings(size=settings.batch_size, growth=settings.batch_growth)
        self._data = DataLoader({"tokens": self._texts.trained}, batch, job.seed, skipped=skipped)
        self._settings, self._ranks = settings, ranks

    def micro_batches(self, step: int) -> StepBatches:
        """This rank's training data of `step`."""
        order, ranks = self._data.ids, self._ranks
        pieces = order.micro_batches(step, ranks.data_rank, ranks.data_size, self._settings.micro_batch_size)
        rows = sum(len(piece) for piece in pieces)
        return StepBatches(
            micro_batches=[self._fetch(piece) for piece in pieces],
            tokens=self.tokens(step),
            window=order.window(step),
            weight=max(1.0, rows * ranks.data_size / order.batch_size(step)),
        )

    def held_out(self, step: int) -> list[Batch]:
        """This rank's part of the held-out text, in equally many micro-batches on every rank; empty if the held-out
        loss is not measured after `step` steps. The rows in all are the same for any number of replicas."""
        every, windows = self._settings.validate_every, self._texts.held_out
        due = step == self._settings.steps or (every > 0 and step % every == 0)
        if windows is None or not due:
            return []
        ranks, size, rows = self._ranks, self._settings.micro_batch_size, self._held_out_rows()
        first, last = (rows * (ranks.data_rank + place) // ranks.data_size for place in (0, 1))
        own = [windows[row] for row in range(first, last)]
        pieces = [own[start : start + size] for start in range(0, -(-rows // ranks.data_size), size)]
        return [self._tensors(piece, windows) for piece in pieces]

    def tokens(self, step: int) -> int:
        """Target tokens in the global batch of a step."""
        return self._data.ids.batch_size(step) * self._settings.sequence_length

    def held_out_tokens(self) -> int:
        """Target tokens in the held-out text, over all replicas."""
        return self._held_out_rows() * self._settings.sequence_length

    def sample(self, step: int, replica: int) -> Batch:
        """The beginning of the first row of a replica's batch; the same on all ranks."""
        first, _ = self._data.ids.share_range(step, replica, self._ranks.data_size)
        batch = self._fetch(self._data.ids.batch(step)[first : first + 1])
        return {name: tensor[:, :SAMPLE_TOKENS] for name, tensor in batch.items() if tensor.dim() > 1}

    def _held_out_rows(self) -> int:
        assert self._texts.held_out is not None, "the job has no text held out"
        return min(len(self._texts.held_out), self._settings.validation_rows)

    def _fetch(self, ids: SampleIds) -> Batch:
        batch = self._tensors(self._data.fetch(ids), self._texts.trained)
        return {**batch, "samples": torch.tensor(ids.checksum())}

    def _tensors(self, rows: list[np.ndarray], windows: TokenWindows) -> Batch:
        """Windows of T + 1 tokens as a micro-batch [B, T]; without windows, one row without targets."""
        stacked = np.stack(rows or [windows[0]])  # [B, T + 1]
        inputs, targets = stacked[:, :-1], stacked[:, 1:] if rows else np.full_like(stacked[:, 1:], NO_TARGET)
        arrays = {"input_ids": inputs, "targets": targets}
        if self._settings.within_documents:
            segments, positions = document_segments(inputs, windows.index["end_id"])
            arrays |= {"segment_ids": segments, "position_ids": positions}
        return {name: torch.from_numpy(np.ascontiguousarray(a)).to(self._ranks.device) for name, a in arrays.items()}


def mean_loss(learner: TorchLearner, micro_batches: Sequence[Batch], tokens: int) -> float:
    """(collective) Mean -log p(target) in nats per token, over the `tokens` targets of all replicas."""
    summed = next_token_loss(tokens)
    found = learner.evaluate(micro_batches, lambda module, batch: summed(module, batch)[1]["loss"])
    parts: list[Any] = learner.ranks.gather(float(sum(found)))
    return sum(parts) / (learner.ranks.world_size // learner.ranks.data_size)


def next_token_loss(tokens: int, tick: Callable[[], None] | None = None) -> LossFn:
    """Sum of -log p(target) over this micro-batch / target tokens of the global batch, in nats per token.

    `tick` is called when backward begins. The metric "samples" is the sum of the checksums of the samples' ids.
    """

    def loss_fn(module: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        logits = module(batch["input_ids"], batch.get("position_ids"), batch.get("segment_ids"))  # [B, T, V]
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), batch["targets"].flatten(), ignore_index=NO_TARGET, reduction="sum"
        )
        loss = losses / tokens
        if tick is not None and loss.requires_grad:
            loss.register_hook(lambda gradient: tick())
        samples = {"samples": float(batch["samples"])} if "samples" in batch else {}
        return loss, {"loss": float(loss.detach()), **samples}

    return loss_fn
