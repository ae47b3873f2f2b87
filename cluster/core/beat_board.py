"""What the controller knows from the node agents' beats: silent nodes, stopped ranks, and the last progress.

The cost of a beat grows with the ranks that it reports; silence is found in constant time per silent node.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from statistics import median

from cluster.config import ElasticSettings
from cluster.policies.decision import Decision
from cluster.policies.hang import RankProgress, Suspects, decide_hang, stall_limit_s, stopped, suspects

REMEMBERED_STEPS = 32
DOUBT = 5.0
"""A hang without a culprit (the fabric, or a crowded machine) must last this many times as long."""


class BeatBoard:
    """Beacons of one generation, by rank. Times are by the controller's clock."""

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
        """Start a generation: data of older ones is dropped, the run's step times stay."""
        self.generation, self.ranks = generation, {}
        self.newest_step, self._collectives, self._moved_at = -1, 0, now

    def beat(self, node: str, generation: int, ranks: Iterable[RankProgress], now: float) -> tuple[int, ...]:
        """Take one node agent's beat; ranks of other generations are ignored. Returns the stopped ranks there."""
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
        """Discount the time that a rank stood still because its machine had no processor for it: that is no hang."""
        self._moved_at = min(now, self._moved_at + seconds)

    def deafen(self, node: str) -> None:
        """The node's agent has ended and a new one takes seconds to start: until it beats, silence says nothing."""
        self._last_beat.pop(node, None)
        self._deaf.add(node)

    def forget(self, node: str) -> None:
        """Forget a lost node."""
        self._last_beat.pop(node, None)
        self._deaf.discard(node)

    @property
    def step_s(self) -> float:
        """Median of the recent step times; 0 before the second step."""
        return median(self.step_times) if self.step_times else 0.0

    def stalled_s(self, now: float) -> float:
        """Seconds since anything last moved in this generation."""
        return now - self._moved_at

    def silent_nodes(self, now: float) -> list[str]:
        """Nodes without a beat for `node_timeout_s`; each is returned once, until it beats again."""
        silent = []
        while self._last_beat:
            node, at = next(iter(self._last_beat.items()))
            if now - at <= self._settings.node_timeout_s:
                break
            silent.append(node)
            del self._last_beat[node]
        return silent

    def judge(self, now: float) -> tuple[Decision, Suspects | None]:
        """hang or wait; for a hang also the suspects. Ranks are examined only if nothing has moved for long."""
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
