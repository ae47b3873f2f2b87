"""One run with kills: which rank is killed when, and the pauses between completed steps.

The same for all cases. A rank is killed with SIGKILL at `PHASE` of a step, in the backward pass, while all ranks
exchange gradients. A step is completed when the first rank reports it; a step that is computed again after a restart
does not count. The usual time is the median between two steps of the undisturbed whole group.
"""

import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

from bench.recovery.job import RANKS

QUIET_STEPS = 8
"""Steps of the whole group before each kill."""
PHASE = 0.6
"""The fraction of a step at which the kill happens; the forward pass takes about a third."""


@dataclass(frozen=True)
class Step:
    """A step completed at `time` (seconds since the epoch) by `ranks` ranks."""

    time: float
    number: int
    ranks: int


@dataclass(frozen=True)
class Kill:
    time: float
    rank: int


class Course:
    """Records every completed step; kills the next rank each time the whole group has trained `QUIET_STEPS` steps.

    Args:
        kills: their total number, rank after rank.
    """

    def __init__(self, kills: int) -> None:
        self.steps: list[Step] = []
        self.kills: list[Kill] = []
        self.over = False
        """Whether the group has recovered from the last kill."""
        self._wanted = kills
        self._quiet = 0

    def step(self, number: int, at: float, pids: dict[int, int], *, ranks: int, ready: bool = True) -> None:
        """Step `number` was completed. `pids`: process of each rank; not `ready`: wait before the next kill."""
        if self.steps and number <= self.steps[-1].number:
            return
        self.steps.append(Step(at, number, ranks))
        self._quiet = self._quiet + 1 if ready and ranks == RANKS else 0
        if self._quiet <= QUIET_STEPS:
            return
        self._quiet = 0
        if len(self.kills) == self._wanted:
            self.over = True
            return
        rank = len(self.kills) % RANKS
        usual = median(b.time - a.time for a, b in pairwise(self.steps[-QUIET_STEPS - 1 :]))
        delay = at + PHASE * usual - time.time()
        threading.Timer(max(0.0, delay), self._kill, (rank, pids[rank])).start()

    def resized(self, number: int, ranks: int) -> None:
        """From step `number` on there are `ranks` ranks, also for steps that were reported before this call."""
        self.steps = [replace(step, ranks=ranks) if step.number >= number else step for step in self.steps]

    def _kill(self, rank: int, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.kills.append(Kill(time.time(), rank))

    def usual_s(self) -> float:
        """Median time between two steps of the whole group, those around a kill or a change of size left out."""
        return median(
            b.time - a.time
            for a, b in pairwise(self.steps)
            if a.ranks == b.ranks == RANKS and not any(a.time < kill.time <= b.time for kill in self.kills)
        )

    def outcomes(self) -> list[dict[str, Any]]:
        """Per kill, seconds:

        gap_s             longest time between two completed steps until the next kill, beyond the usual time
        gaps_s            the sum of the two longest: shrinking and growing back
        back_s            from the kill until the whole group has completed a step again
        steps_meanwhile   steps that fewer ranks completed until then
        """
        usual, found = self.usual_s(), []
        ends = [kill.time for kill in self.kills[1:]] + [self.steps[-1].time]
        for kill, end in zip(self.kills, ends, strict=True):
            pairs = [(a, b) for a, b in pairwise(self.steps) if kill.time < b.time <= end]
            longest = sorted(pairs, key=lambda pair: pair[1].time - pair[0].time)[-2:]
            gaps = [max(0.0, b.time - a.time - usual) for a, b in longest]
            after = longest[-1][1].time
            back = next(b.time for _, b in pairs if b.time >= after and b.ranks == RANKS)
            smaller = sum(1 for _, b in pairs if b.time < back and b.ranks < RANKS)
            one = {"rank": kill.rank, "gap_s": gaps[-1], "gaps_s": sum(gaps), "back_s": back - kill.time}
            found.append({**{name: round(value, 4) for name, value in one.items()}, "steps_meanwhile": smaller})
        return found
