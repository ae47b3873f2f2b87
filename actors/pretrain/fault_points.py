"""The points at which a schedule (`infra.fault_injection`) may break a rank of pretraining; by default none do.

By generation: `pretrain.generation-G.rank-R.join` (before the groups are formed), `.load` (they are formed,
nothing is read yet), `.step` (before a step's computation: its n-th hit is the process's n-th step of that generation),
`.finish` (before the model is saved). With the action `flip`, hit once per step: `.answer` (one bit of the network's
output, in that step and its replay), `.weights` (one bit of this rank's weights, after that step).

By the run's own step: `pretrain.step-S.rank-R.data` (before the batch is loaded), `.compute` (between forward
and backward of the first micro-batch, while the others wait in collectives), `.snapshot` (the state after S steps is
half written, beside the next step), `.flush` (the shard of that state is in the store, its receipt is not); with the
action `flip`, `.answer` (in that step and its replay) and `.weights` (after S steps).

`seat-R` in place of `rank-R`: rank R modulo N in a group of N ranks, so that a rank reaches the point however small the
group is by then.

By window of the data order, on any rank that trains on it: `pretrain.window-W.loss` with the actions `nan` and `spike`,
which change the loss itself. Bad data is bad every time: write `:*=nan`.
"""

import math
import re
from pathlib import Path

import torch

from actors.pretrain.bit_flips import answered_wrongly, flip_weight
from engines.base import Batch, LossFn
from engines.elastic.learner import ElasticLearner
from infra.fault_injection import FaultSchedule

BY_GENERATION = ("join", "load", "finish")
SEAT = re.compile(r"\.seat-(\d+)\.")
FACTORS = {"nan": math.nan, "spike": 40.0}


class FaultPoints:
    """See the module's docstring.

    Args:
        schedule: text for `infra.fault_injection`.
        taken: folder with the entries that have happened, so that they do not happen again to the
            replacement of a killed process, or when a step is computed again.
    """

    def __init__(self, schedule: str, taken: Path) -> None:
        self._schedule = FaultSchedule.parse(schedule, once=taken)
        self._seats = 1 + max(map(int, SEAT.findall(schedule)), default=-1)
        self._world_size = 1

    def sit(self, world_size: int) -> None:
        """Set the number of ranks in the group."""
        self._world_size = world_size

    def reach(self, moment: str, rank: int, number: int) -> None:
        """Reach a point. `number`: the generation or the step, depending on the moment. Callable from any thread."""
        for point in self._points("generation" if moment in BY_GENERATION else "step", number, rank, moment):
            self._schedule.reach(point)

    def count_step(self, rank: int, generation: int) -> None:
        """Count one hit of `.step`."""
        self._schedule.reach(f"pretrain.generation-{generation}.rank-{rank}.step")

    def in_answer(self, ask: LossFn, rank: int, generation: int, step: int) -> LossFn:
        """The loss function of one step; if a flip is due, of a network with a wrong output."""
        return answered_wrongly(ask) if self._flips(rank, generation, step, "answer") else ask

    def flip_weight(self, elastic: ElasticLearner, rank: int, generation: int) -> None:
        """Flip a bit of the weights if that is due; call it after a step."""
        assert elastic.learner is not None
        if self._flips(rank, generation, elastic.learner.step, "weights"):
            flip_weight(elastic)

    def _flips(self, rank: int, generation: int, step: int, moment: str) -> bool:
        by_generation = f"pretrain.generation-{generation}.rank-{rank}.{moment}"
        due = [self._schedule.take(point) for point in (by_generation, *self._points("step", step, rank, moment))]
        return "flip" in due

    def _points(self, scope: str, number: int, rank: int, moment: str) -> list[str]:
        """The points that a rank reaches at this moment."""
        seats = (f"seat-{seat}" for seat in range(rank, self._seats, self._world_size))
        return [f"pretrain.{scope}-{number}.{who}.{moment}" for who in (f"rank-{rank}", *seats)]

    def in_loss(self, ask: LossFn, rank: int, step: int, window: int) -> LossFn:
        """The loss function of one step with the points in it."""
        if not self._schedule.actions:
            return ask
        factor = FACTORS.get(self._schedule.take(f"pretrain.window-{window}.loss") or "", 1.0)

        def loss_fn(module: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
            loss, sums = ask(module, batch)
            self.reach("compute", rank, step)
            return (loss, sums) if factor == 1 else (loss * factor, {**sums, "loss": sums["loss"] * factor})

        return loss_fn
