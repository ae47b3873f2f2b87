"""Slow ranks. All ranks take equally long for a synchronous step; their computing times without waiting differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from cluster.config import ElasticSettings
from cluster.policies.decision import Decision, key


@dataclass(frozen=True)
class SlowRank:
    """`ratio`: its median computing time over the median rank's, e.g. 1.5. `windows`: how often in a row so far."""

    rank: int
    ratio: float
    windows: int


def slow_ranks(
    compute_s: Mapping[int, Sequence[float]], streaks: Mapping[int, int], settings: ElasticSettings
) -> tuple[SlowRank, ...]:
    """Ranks that were slow in this window, slowest first.

    Args:
        compute_s: rank -> seconds of forward, backward and optimizer per step, waiting excluded; ranks with fewer than
            half a window of steps are not judged. With pipelining pass the ranks of one stage at a time: stages differ.
        streaks: rank -> windows in a row in which it was slow before this one.
    """
    enough = max(1, settings.straggler_window // 2)
    own = {
        rank: median(times[-settings.straggler_window :]) for rank, times in compute_s.items() if len(times) >= enough
    }
    if len(own) < 2:
        return ()
    typical = median(own.values())
    found = [
        SlowRank(rank, seconds / typical, streaks.get(rank, 0) + 1)
        for rank, seconds in own.items()
        if typical > 0 and seconds > settings.straggler_ratio * typical
    ]
    return tuple(sorted(found, key=lambda slow: (-slow.ratio, slow.rank)))


def decide_straggler(slow: SlowRank, group: int, affordable: bool, settings: ElasticSettings) -> Decision:
    """report or evict. `group`: ranks in all; `affordable`: a spare is ready, or enough whole blocks remain without it.

    Without a spare an eviction costs a whole block; it pays only if the slowdown of all ranks costs more than that.
    """
    what = f"rank {slow.rank} computes {slow.ratio:.2f}x as long as the median rank, window {slow.windows}"
    if not settings.straggler_evict:
        return Decision("report", what, key("straggler_evict"))
    if slow.windows < settings.straggler_evict_after:
        return Decision("report", what, key("straggler_evict_after"))
    if not affordable:
        return Decision("report", f"{what}; nothing can take its place", key("spares"))
    return Decision("evict", f"{what} of {group} ranks that wait for it", key("straggler_evict_after"))
