"""Finds slow ranks from windows of their own computing times, which come from their beacons."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.config import ElasticSettings
from cluster.core.state_machine import StateMachine
from cluster.policies.decision import Decision
from cluster.policies.straggler import SlowRank, decide_straggler, slow_ranks


@dataclass(frozen=True)
class Straggler:
    """A slow worker and the decision about it; `unfit`: its node is taken out of use too."""

    worker: str
    slow: SlowRank
    decision: Decision
    unfit: bool


class StragglerWatch:
    """The watch of one group. A beat may report several steps at once: each then counts with their mean."""

    def __init__(self, settings: ElasticSettings) -> None:
        self._settings = settings
        self._last: dict[int, tuple[int, float]] = {}
        self._times: dict[int, list[float]] = defaultdict(list)
        self._streaks: dict[int, int] = {}
        self._said: set[tuple[str, str, str]] = set()

    def begin(self) -> None:
        """A generation has started: its ranks are new."""
        self._last.clear()
        self._times.clear()
        self._streaks.clear()

    def saw(self, rank: int, step: int, own_s: float) -> None:
        """A rank has computed for `own_s` seconds by itself in this generation, up to `step`."""
        last_step, last_s = self._last.setdefault(rank, (step, own_s))
        if step > last_step:
            steps = step - last_step
            self._times[rank] += [(own_s - last_s) / steps] * min(steps, self._settings.straggler_window)
            self._last[rank] = (step, own_s)

    def judge(self, core: StateMachine) -> Iterator[Straggler]:
        """At the end of a window: the slow ranks of every pipeline stage, compared within it because a stage has equal
        work. Each decision about a worker is reported once."""
        settings, members = self._settings, core.members
        if len(self._times) < len(members) or min(map(len, self._times.values())) < settings.straggler_window:
            return
        slow: list[SlowRank] = []
        for stage in range(settings.pipeline_parallel):
            first = stage * settings.tensor_parallel
            here = range(first, first + settings.tensor_parallel)
            own = {rank: times for rank, times in self._times.items() if rank % settings.block in here}
            slow += slow_ranks(own, self._streaks, settings)
        self._times.clear()
        self._streaks = {one.rank: one.windows for one in slow}
        for one in slow:
            worker = members[one.rank]
            if worker in core.roster.leaving or worker not in core.roster.node_of:
                continue
            node = core.roster.node_of[worker]
            unfit = core.roster.usable_outside(node) >= settings.min_workers
            affordable = _affordable(core, one, worker if not unfit else None, node)
            decision = decide_straggler(one, len(members), affordable, settings)
            about = (worker, decision.action, decision.key)
            if about not in self._said:
                self._said.add(about)
                yield Straggler(worker, one, decision, unfit)


def _affordable(core: StateMachine, slow: SlowRank, alone: str | None, node: str) -> bool:
    """Whether a spare is ready for every evicted rank, or the slowness costs all ranks more than the lost blocks.

    alone: the only worker to evict; None: all on `node`.
    """
    roster, settings = core.roster, core.settings
    going = {alone} if alone is not None else roster.on([node])
    if len(going & roster.joined) <= len(roster.standby - going):
        return True
    left = sum(going.isdisjoint(block) for block in core.blocks)
    return left >= settings.min_blocks and left * slow.ratio > len(core.blocks)
