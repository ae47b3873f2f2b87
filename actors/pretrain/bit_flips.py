"""Flips bits on purpose, as a broken memory cell or arithmetic unit does; for tests and demonstrations."""

from typing import Any

import torch

from engines.base import Batch, LossFn
from engines.elastic.learner import ElasticLearner

BIT = 1 << 20
"""The flipped bit of a float32: roughly an eighth of its value."""


def flip_weight(elastic: ElasticLearner) -> None:
    """Flip one bit of this rank's weights, after they were copied into the last snapshot."""
    assert elastic.learner is not None and elastic.snapshots is not None
    elastic.snapshots.settle()
    piece = next(piece for piece in elastic.learner.pieces() if piece.tensor.numel())
    piece.tensor.view(-1).view(torch.int32)[0] ^= BIT


def answered_wrongly(loss_fn: LossFn) -> LossFn:
    """The same loss, of a network with one wrong bit in its answer."""

    def wrong(module: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        return loss_fn(_Wrong(module), batch)

    return wrong


class _Wrong(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._inner = [module]  # in a list, so that it is not a submodule

    def forward(self, *inputs: Any) -> torch.Tensor:
        logits: torch.Tensor = self._inner[0](*inputs)
        error = torch.zeros_like(logits, dtype=torch.float32)
        value = logits.detach().flatten()[:1].float()
        error.view(-1)[0] = (value.view(torch.int32) ^ BIT).view(torch.float32)[0] - value[0]
        return logits + error.to(logits.dtype)
