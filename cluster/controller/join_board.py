"""How far each rank is on its way into a generation, from its node's beats.

A rank's last sign of progress is its stage, and when it entered or stirred in that (see cluster.node.beacons). The time
without progress counts from the first beat that showed this sign to the last one: a missing beat says nothing about the
ranks.
"""

from collections.abc import Iterable
from math import inf

from cluster.config import ElasticSettings
from cluster.node.rank_watch import Sight
from cluster.policies.decision import Decision
from cluster.policies.hang import Joining, Suspects, decide_join


class JoinBoard:
    """The joining ranks of one generation at a time."""

    def __init__(self, settings: ElasticSettings) -> None:
        self._settings = settings
        self.generation = 0
        self._ranks: dict[int, Joining] = {}
        self._signs: dict[int, tuple[tuple[int, float], float]] = {}

    def begin(self, generation: int, world_size: int) -> None:
        """`world_size` ranks were told to join."""
        self.generation = generation
        self._ranks = {rank: Joining(rank, -1) for rank in range(world_size)}
        self._signs = {}

    def saw(self, sights: Iterable[Sight]) -> bool:
        """Take one node's beat; whether any rank has made progress since the last one."""
        moved = False
        for sight in sights:
            record = sight.record
            if not sight.alive or record.generation != self.generation or record.rank not in self._ranks:
                continue
            stage = record.ticks if record.state == "joining" else inf
            sign, idle_s = (record.ticks, record.entered_at), sight.phase_age - sight.starved_s
            known, since = self._signs.get(record.rank, (None, 0.0))
            if known != sign:
                self._signs[record.rank], since, moved = (sign, idle_s), idle_s, True
            self._ranks[record.rank] = Joining(record.rank, stage, record.phase, max(0.0, idle_s - since))
        return moved

    def judge(self) -> tuple[Decision, Suspects]:
        """See cluster.policies.hang.decide_join."""
        return decide_join(self._ranks.values(), self._settings)

    @property
    def longest_s(self) -> float:
        """The longest time that any rank has made no progress."""
        return max((rank.still_s for rank in self._ranks.values()), default=0.0)
