"""Hangs and their suspects, judged by progress in the beacons alone: in training against the run's own step time, while
joining a generation against a limit of its own."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from statistics import median

from cluster.config import ElasticSettings
from cluster.policies.decision import Decision, key

WAITING_PHASES = frozenset({"collective", "barrier", "wait"})
"""Phases in which a rank waits for others: victims, not culprits."""
MEETING_PHASES = frozenset({"form", "wait"})
"""The same while joining a generation."""
ELSEWHERE = "fetch"
"""The joining phase that waits for storage or another node's memory, which has deadlines of its own."""


@dataclass(frozen=True)
class RankProgress:
    """A rank's last record in shared memory, as its node agent reads it.

    Example: rank 3 computes in step 120 after 411 collectives: RankProgress(3, 120, "compute", 411, 5000.2, 5003.1).
    """

    rank: int
    step: int
    phase: str
    collectives: int
    """Collectives that this rank has entered in this generation."""
    entered_at: float
    """When it entered `phase`, by the agent's clock in seconds."""
    pulse_at: float
    """When the agent last saw the pulse change. A thread of the process moves it: it stops in a stopped or GIL-locked
    process."""


def stall_limit_s(step_times: Iterable[float], settings: ElasticSettings) -> float:
    """Seconds without progress that count as a hang, from the run's recent step times; if empty, for the first step."""
    times = list(step_times)
    if not times:
        return settings.first_step_grace_s
    return max(settings.hang_floor_s, settings.hang_factor * median(times))


def decide_hang(stalled_s: float, step_times: Iterable[float], settings: ElasticSettings) -> Decision:
    """hang or wait. `stalled_s`: seconds since any rank last entered a new step or collective."""
    times = list(step_times)
    limit = stall_limit_s(times, settings)
    usual = "hang_floor_s" if limit == settings.hang_floor_s else "hang_factor"
    name = usual if times else "first_step_grace_s"
    verb = "exceeds" if stalled_s > limit else "is within"
    text = f"no progress for {stalled_s:.1f} s {verb} the limit of {limit:.1f} s"
    return Decision("hang" if stalled_s > limit else "wait", text, key(name))


@dataclass(frozen=True)
class Suspects:
    """Ranks that hold up the others, and the sign of it. No ranks: the fabric is at fault, not a process."""

    ranks: tuple[int, ...]
    sign: str


def stopped(ranks: Iterable[RankProgress], now: float, settings: ElasticSettings) -> tuple[int, ...]:
    """Ranks whose process stands still; known before anything else stalls."""
    return tuple(sorted(one.rank for one in ranks if now - one.pulse_at > settings.pulse_timeout_s))


def suspects(ranks: Iterable[RankProgress], now: float, settings: ElasticSettings) -> Suspects:
    """The ranks to blame for a hang, by the strongest sign that there is.

    1. Its pulse stands still. 2. It is outside a collective while others wait in one. 3. It has entered fewer
    collectives than the others (a deadlock by mismatched order). 4. All wait in the same one: the fabric is at fault.
    """
    ranks = list(ranks)
    still = stopped(ranks, now, settings)
    if still:
        return Suspects(still, "pulse stands still")
    outside = tuple(sorted(one.rank for one in ranks if one.phase not in WAITING_PHASES))
    if outside:
        return Suspects(outside, "busy while the others wait")
    newest = max((one.collectives for one in ranks), default=0)
    behind = tuple(sorted(one.rank for one in ranks if one.collectives < newest))
    if behind:
        return Suspects(behind, "behind in collectives")
    return Suspects((), "all wait in the same collective")


@dataclass(frozen=True)
class Joining:
    """A rank's progress in joining a generation.

    Example: rank 2, after 4 stages, builds its network; its last progress was 3.5 s ago: Joining(2, 4, "build", 3.5).
    """

    rank: int
    stage: float
    """Stages so far, which are the same on all ranks; infinite if it has joined, -1 if it has not reported yet."""
    phase: str = "join"
    still_s: float = 0.0
    """Seconds since its last sign of progress, without the time in which it had no processor."""


def decide_join(ranks: Iterable[Joining], settings: ElasticSettings) -> tuple[Decision, Suspects]:
    """hang (with the ranks to blame) or wait.

    A rank is to blame if it makes no progress in its own work, or is still in a meeting that all others have left. This
    holds only if at least one rank waits for it, and at most half of the ranks are so (otherwise the cause is not in
    the ranks). All else is left to `join_timeout_s`: ranks that do not leave after that are killed.
    """
    ranks, limit = list(ranks), settings.join_stall_s
    still = [rank for rank in ranks if rank.still_s > limit]
    blamed = [rank for rank in still if rank.stage < inf and rank.phase not in (*MEETING_PHASES, ELSEWHERE)]
    sign = "busy while the others wait"
    if not blamed:
        last = min((rank.stage for rank in ranks), default=inf)
        behind = [rank for rank in ranks if rank.stage == last]
        blamed = behind if len(behind) == 1 and behind[0] in still and behind[0].phase in MEETING_PHASES else []
        sign = "has not left a meeting that the others have left"
    waited_for = any(rank.phase in MEETING_PHASES or rank.stage == inf for rank in ranks if rank not in blamed)
    if not blamed or not waited_for or 2 * len(blamed) > len(ranks):
        return Decision("wait", "every rank gets on, or waits for one that does", key("join_stall_s")), Suspects((), "")
    longest = max(rank.still_s for rank in blamed)
    where = ", ".join(sorted({rank.phase for rank in blamed}))
    text = f"no progress for {longest:.1f} s in {where}, on the way into a generation, exceeds {limit:g} s"
    return Decision("hang", text, key("join_stall_s")), Suspects(tuple(sorted(rank.rank for rank in blamed)), sign)
