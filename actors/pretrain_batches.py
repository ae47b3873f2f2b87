"""The data of pretraining: a rank's micro-batches of any step, and the loss of one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from actors.config import PretrainSettings
from actors.handover import local
from actors.pretrain_job import PretrainJob
from data.config import BatchSettings
from data.loader import DataLoader
from data.mixture import SampleIds
from data.tokenized import TokenWindows, document_segments
from engines.base import Batch, LossFn
from engines.collectives.ranks import Ranks
from engines.elastic.torch_learner import TorchLearner

NO_TARGET = -100
SAMPLE_TOKENS = 512
"""As long as a sample needs to be to find a rank that computes wrongly."""


def token_windows(job: PretrainJob) -> TokenWindows:
    """What is trained on. Opens every shard: once a process, not once a generation. Raises DataError."""
    return TokenWindows(local(job.tokens), job.settings.sequence_length)


class BatchLoader:
    """This rank's tensors of any step: a function of the step, the seed, the windows left out, and the replicas.

    Args:
        windows: the job's tokens, where they are open already.
    """

    def __init__(
        self, job: PretrainJob, ranks: Ranks, skipped: tuple[int, ...] = (), windows: TokenWindows | None = None
    ) -> None:
        settings = job.settings
        self._windows = windows or token_windows(job)
        batch = BatchSettings(size=settings.batch_size, growth=settings.batch_growth)
        self._loader = DataLoader({"tokens": self._windows}, batch, job.seed, skipped=skipped)
        self._settings, self._ranks = settings, ranks

    def tokens(self, step: int) -> int:
        """Target tokens in the global batch of a step."""
        return self._loader.ids.batch_size(step) * self._settings.sequence_length

    def window(self, step: int) -> int:
        """Of the data order, that a step takes."""
        return self._loader.ids.window(step)

    def weight(self, step: int) -> float:
        """How much more than the average replica this one has to compute in a step: 1 where it is not more."""
        ids, replicas = self._loader.ids, self._ranks.data_size
        first, end = ids.share_range(step, self._ranks.data_rank, replicas)
        return max(1.0, (end - first) * replicas / ids.batch_size(step))

    def micro_batches(self, step: int) -> tuple[list[Batch], int]:
        """(micro-batches, target tokens in the whole global batch).

        Equally many on every rank; one that got no row holds a row without targets, so that all join equal collectives.
        """
        size, ranks = self._settings.micro_batch_size, self._ranks
        pieces = self._loader.ids.micro_batches(step, ranks.data_rank, ranks.data_size, size)
        return [self._tensors(piece) for piece in pieces], self.tokens(step)

    def sample(self, step: int, replica: int) -> Batch:
        """The beginning of the first row of a replica's batch: the same on all of them."""
        first, _ = self._loader.ids.share_range(step, replica, self._ranks.data_size)
        batch = self._tensors(self._loader.ids.batch(step)[first : first + 1])
        return {name: tensor[:, :SAMPLE_TOKENS] for name, tensor in batch.items() if tensor.dim() > 1}

    def _tensors(self, ids: SampleIds) -> Batch:
        batch = tensors(self._loader.fetch(ids), self._windows, self._settings, self._ranks)
        return {**batch, "samples": torch.tensor(ids.checksum())}


class HeldOut:
    """The loss on text that is never trained on: the same rows every time, whatever the replicas.

    Raises:
        DataError: the text is shorter than one row.
    """

    def __init__(self, job: PretrainJob, learner: TorchLearner) -> None:
        assert job.held_out is not None
        self._settings, self._learner = job.settings, learner
        self._windows = TokenWindows(local(job.held_out), job.settings.sequence_length)
        self.rows = min(len(self._windows), job.settings.validation_rows)

    def due(self, steps: int) -> bool:
        """Whether it is measured after so many steps."""
        every = self._settings.validate_every
        return steps == self._settings.steps or (every > 0 and steps % every == 0)

    def loss(self) -> float:
        """(collective) Mean -log p(target) in nats per token."""
        ranks, size = self._learner.ranks, self._settings.micro_batch_size
        first, last = (self.rows * (ranks.data_rank + place) // ranks.data_size for place in (0, 1))
        own = [self._windows[row] for row in range(first, last)]
        most = -(-self.rows // ranks.data_size)
        pieces = [own[start : start + size] for start in range(0, most, size)]  # equally many on every rank
        batches = [tensors(piece, self._windows, self._settings, ranks) for piece in pieces]
        summed = next_token_loss(self.rows * self._settings.sequence_length)
        found = self._learner.evaluate(batches, lambda module, batch: summed(module, batch)[1]["loss"])
        parts: list[Any] = ranks.gather(float(sum(found)))
        return sum(parts) / (ranks.world_size // ranks.data_size)


def tensors(rows: list[np.ndarray], windows: TokenWindows, settings: PretrainSettings, ranks: Ranks) -> Batch:
    """Windows of T + 1 tokens as a micro-batch [B, T]; no windows are one row without targets."""
    stacked = np.stack(rows or [windows[0]])  # [B, T + 1]
    inputs, targets = stacked[:, :-1], stacked[:, 1:] if rows else np.full_like(stacked[:, 1:], NO_TARGET)
    arrays = {"input_ids": inputs, "targets": targets}
    if settings.within_documents:
        segments, positions = document_segments(inputs, windows.index["end_id"])
        arrays |= {"segment_ids": segments, "position_ids": positions}
    return {name: torch.from_numpy(np.ascontiguousarray(a)).to(ranks.device) for name, a in arrays.items()}


def next_token_loss(tokens: int, tick: Callable[[], None] | None = None) -> LossFn:
    """Sum of -log p(target) over this micro-batch / target tokens of the global batch, in nats per token.

    `tick` is called where backward begins. The metric "samples" adds up the checksums of the samples' ids.
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
