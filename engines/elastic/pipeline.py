"""One stage of a network that is cut over ranks by layers, and the schedule that brings micro-batches through them.

Who waits for whom: stage s waits for the hidden states of stage s - 1 and the gradients of stage s + 1, in the order of
1F1B (PipeDream-Flush, Narayanan et al. 2021: one forward, one backward, so that a stage keeps the activations of at
most as many micro-batches as there are stages from it on). All stages of a replica are given the same micro-batches, so
every one of them knows all shapes; only hidden states [B, T / tp, D] and their gradients travel.

What a stage waits for its neighbours (until they have sent, or are ready to take what it sends, and at the end until
the slowest stage is done) is the pipeline's bubble, and counted as such (see `engines.collectives.wait_times`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, schedules

from engines.base import Batch, LossFn
from engines.collectives.ranks import Ranks
from engines.collectives.wait_times import replaced
from models.llama import Llama

BUBBLE = "pipeline_bubble"


class Pipeline:
    """This rank's stage among the others.

    Micro-batches of one step may differ in rows and length: they are padded to the largest for the network, and cut
    back before the loss sees them. Where there are fewer than stages, empty ones are added.

    Args:
        module: this rank's stage; see `models.parallelize.cut`.
        dtype: of hidden states between the stages.
    """

    def __init__(self, module: Llama, ranks: Ranks, dtype: torch.dtype) -> None:
        assert ranks.mesh is not None and ranks.stages > 1
        self._module, self._ranks, self._dtype = module, ranks, dtype
        self._group = ranks.mesh["pp"].get_group()
        self._split = ranks.mesh["tp"].size()
        self._last = dist.get_global_rank(self._group, ranks.stages - 1)
        self._made: tuple[tuple[int, ...], Schedule1F1B] | None = None
        self._finish: Callable[[Tensor, Tensor], Tensor] | None = None

    def train(self, micro_batches: Sequence[Batch], loss_fn: LossFn) -> dict[str, float]:
        """(collective) Forward and backward of all micro-batches; the replica's metric sums, on all of its stages."""
        metrics: dict[str, float] = {}

        def finish(logits: Tensor, number: int) -> Tensor:
            loss, sums = loss_fn(_Answers(logits), micro_batches[number])
            for name, value in sums.items():
                metrics[name] = metrics.get(name, 0.0) + value
            return loss

        self._run(micro_batches, loss_fn, finish, backward=True)
        gathered: list[Any] = [None] * self._ranks.stages
        with self._ranks.waits.counted_as(BUBBLE):  # the last stage has them, and is done before the first one
            dist.all_gather_object(gathered, metrics, group=self._group)
        last: dict[str, float] = gathered[-1]
        return last

    def evaluate(self, micro_batches: Sequence[Batch], fn: Callable[[nn.Module, Batch], Any]) -> list[Any]:
        """(collective) `fn` per micro-batch without gradients, on all stages of the replica."""
        found: dict[int, Any] = {}

        def finish(logits: Tensor, number: int) -> Tensor:
            found[number] = fn(_Answers(logits), micro_batches[number])
            return logits.new_zeros(())

        self._run(micro_batches, fn, finish, backward=False)
        results = [[found[number] for number in sorted(found)]]
        dist.broadcast_object_list(results, src=self._last, group=self._group)
        return results[0]

    def add_twin(self, gradient: Tensor) -> None:
        """(first and last stage) Add the other's gradient of the tied matrix that both hold; the same bits on both."""
        other = self._ranks.stages - 1 - self._ranks.stage
        peer, received = dist.get_global_rank(self._group, other), torch.empty_like(gradient)
        sent = gradient.contiguous()
        ends = [dist.P2POp(kind, t, peer, self._group) for kind, t in ((dist.isend, sent), (dist.irecv, received))]
        for work in dist.batch_isend_irecv(ends):
            work.wait()
        gradient.add_(received)

    def broadcast(self, tensor: Tensor, stage: int) -> None:
        """(collective) The content that `tensor` has on one stage, on all stages."""
        dist.broadcast(tensor, dist.get_global_rank(self._group, stage), group=self._group)

    def _run(
        self,
        micro_batches: Sequence[Batch],
        ask: Callable[[nn.Module, Batch], Any],
        finish: Callable[[Tensor, int], Tensor],
        backward: bool,
    ) -> None:
        asked = [_network_inputs(ask, batch) for batch in micro_batches]
        count = max(len(asked), self._ranks.stages)
        rows, tokens = (max(a["tokens"].shape[d] for a in asked) for d in (0, 1))
        inputs = {name: _stack([a[name] for a in asked], count, rows, tokens) for name in asked[0]}
        ids = inputs.pop("tokens")
        first = (ids,) if self._ranks.stage == 0 else ()
        numbers = torch.arange(count, device=self._ranks.device)

        def padded_loss(logits: Tensor, number: Tensor) -> Tensor:
            chunk = int(number.item())
            if chunk >= len(asked):
                return logits.sum() * 0
            own_rows, own_tokens = asked[chunk]["tokens"].shape
            return finish(logits[:own_rows, :own_tokens], chunk)

        schedule = self._schedule(count, rows, tokens)
        self._finish = padded_loss
        run: Callable[..., Any] = schedule.step if backward else schedule.eval
        try:
            with replaced(schedules, "_wait_batch_p2p", functools.partial(self._ranks.waits.counting_as, BUBBLE)):
                run(*first, target=numbers, return_outputs=False, **inputs)
        except RuntimeError as error:
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None  # what happened inside the network, not the schedule's list of its shapes
        finally:
            self._finish = None

    def _schedule(self, count: int, rows: int, tokens: int) -> Schedule1F1B:
        """(collective) For so many micro-batches of one shape; kept until the shape changes."""
        shape = (count, rows, tokens)
        if self._made is None or self._made[0] != shape:
            ids = torch.empty(rows, tokens, dtype=torch.long, device="meta")
            width = self._module.config.dim
            hidden = torch.empty(rows, tokens // self._split, width, dtype=self._dtype, device="meta")
            hidden.requires_grad_()
            logits = torch.empty(rows, tokens, self._module.config.vocab_size, dtype=self._dtype, device="meta")
            stage, stages = self._ranks.stage, self._ranks.stages
            ends = PipelineStage(
                self._module,
                stage,
                stages,
                self._ranks.device,
                input_args=ids if stage == 0 else hidden,
                output_args=logits.requires_grad_() if stage == stages - 1 else hidden,
                group=self._group,
            )
            self._made = shape, Schedule1F1B(ends, count, loss_fn=self._loss, scale_grads=False)
        return self._made[1]

    def _loss(self, logits: Tensor, number: Tensor) -> Tensor:
        assert self._finish is not None
        return self._finish(logits, number)


class _AskedFor(Exception):
    """A loss function has come to its call of the network."""


class _Asks(nn.Module):
    """Stands for the network while we find out what a loss function gives it."""

    def forward(self, tokens: Tensor, positions: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
        raise _AskedFor(tokens, positions, segment_ids)


class _Answers(nn.Module):
    """Stands for the network whose logits are known."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self._logits = logits

    def forward(self, *inputs: Tensor | None) -> Tensor:
        return self._logits


def _network_inputs(fn: Callable[[nn.Module, Batch], Any], batch: Batch) -> dict[str, Tensor]:
    """What `fn` gives the network: tokens, positions and, where it does, segment_ids, all [B, T]."""
    try:
        fn(_Asks(), batch)
    except _AskedFor as asked:
        tokens, positions, segments = asked.args
    else:
        raise ValueError("with pipeline_parallel > 1 a loss function has to call the network")
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
    found = {"tokens": tokens, "positions": positions.expand_as(tokens)}
    return found if segments is None else {**found, "segment_ids": segments}


def _stack(tensors: Sequence[Tensor], count: int, rows: int, tokens: int) -> Tensor:
    """`count` micro-batches below each other, each padded with 0 to [rows, tokens]."""
    padded = [F.pad(tensor, (0, tokens - tensor.shape[1], 0, rows - tensor.shape[0])) for tensor in tensors]
    padded += [torch.zeros_like(padded[0])] * (count - len(padded))
    return torch.cat(padded)
