"""What the controller knows from the node agents' beats: who is silent, when anything last moved, who is stopped.

One beat costs as much as the ranks that it tells of; silence is found in constant time per silent node.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from statistics import median

from cluster.config import ElasticSettings
from cluster.policies.decision import Decision
from cluster.policies.hang import RankProgress, Suspects, decide_hang, stall_limit_s, stopped, suspects

REMEMBERED_STEPS = 32
DOUBT = 5.0
"""A hang that no rank is to blame for (the fabric, or a crowded machine) must last so many times as long."""


class BeatBoard:
    """Beacons of one generation, by rank. Times are the controller's clock."""

    def __init__(self, settings: ElasticSettings) -> None:
        self._settings = settings
        self._last_beat: OrderedDict[str, float] = OrderedDict()
        self._deaf: set[str] = set()
        self.generation = 0
        self.ranks: dict[int, RankProgress] = {}
        self.step_times: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self.newest_step = -1
        self._collectives = 0
        self._moved_at = self._stepped_at = 0.0

    def begin(self, generation: int, now: float) -> None:
        """A generation runs: what older ones did is void, the run's step times stay."""
        self.generation, self.ranks = generation, {}
        self.newest_step, self._collectives, self._moved_at = -1, 0, now

    def beat(self, node: str, generation: int, ranks: Iterable[RankProgress], now: float) -> tuple[int, ...]:
        """One node agent's word; ranks of another generation are ignored. Returns ranks there that stand still."""
        self._deaf.discard(node)
        self._last_beat[node] = now
        self._last_beat.move_to_end(node)
        if generation != self.generation:
            return ()
        ranks = tuple(ranks)
        for one in ranks:
            self.ranks[one.rank] = one
            if one.step > self.newest_step:
                if self.newest_step >= 0:
                    steps = one.step - self.newest_step
                    self.step_times.append((now - self._stepped_at) / steps)
                self.newest_step, self._stepped_at, self._moved_at = one.step, now, now
            if one.collectives > self._collectives:
                self._collectives, self._moved_at = one.collectives, now
        return stopped(ranks, now, self._settings)

    def excuse(self, seconds: float, now: float) -> None:
        """A rank stood still for so long because its machine had no processor for it: that is no hang."""
        self._moved_at = min(now, self._moved_at + seconds)

    def deafen(self, node: str) -> None:
        """Its agent has ended and another one starts, which takes seconds: until that beats, silence says nothing."""
        self._last_beat.pop(node, None)
        self._deaf.add(node)

    def forget(self, node: str) -> None:
        """It is lost."""
        self._last_beat.pop(node, None)
        self._deaf.discard(node)

    @property
    def step_s(self) -> float:
        """Median of the recent step times; 0 before the second step."""
        return median(self.step_times) if self.step_times else 0.0

    def stalled_s(self, now: float) -> float:
        """Since anything last moved in this generation."""
        return now - self._moved_at

    def silent_nodes(self, now: float) -> list[str]:
        """Nodes without a beat for `node_timeout_s`; each is named once, until it beats again."""
        silent = []
        while self._last_beat:
            node, at = next(iter(self._last_beat.items()))
            if now - at <= self._settings.node_timeout_s:
                break
            silent.append(node)
            del self._last_beat[node]
        return silent

    def judge(self, now: float) -> tuple[Decision, Suspects | None]:
        """hang or wait; for a hang also whom to suspect. Ranks are looked at only when nothing has moved for long."""
        if self._deaf:
            self._moved_at = now
        stalled = self.stalled_s(now)
        decision = decide_hang(stalled, self.step_times, self._settings)
        if decision.action != "hang":
            return decision, None
        whom = suspects(self.ranks.values(), now, self._settings)
        if not whom.ranks and stalled < DOUBT * stall_limit_s(self.step_times, self._settings):
            return Decision("wait", f"{decision.reason}, but {whom.sign}", decision.key), None
        return decision, whom
