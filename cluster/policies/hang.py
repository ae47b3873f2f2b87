"""Hangs, judged by progress against the run's own step time, and which ranks to suspect, from beacons alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from cluster.config import ElasticSettings
from cluster.decision import Decision, key

WAITING_PHASES = frozenset({"collective", "barrier", "wait"})
"""Phases in which a rank waits for others: it is a victim, not a culprit."""


@dataclass(frozen=True)
class Beacon:
    """What one rank last wrote into shared memory, as its node agent reads it.

    Example: rank 3 computes in step 120 after 411 collectives: Beacon(3, 120, "compute", 411, 5000.2, 5003.1).
    """

    rank: int
    step: int
    phase: str
    collectives: int
    """Collectives that this rank has entered in this generation."""
    entered_at: float
    """When it entered `phase`, in seconds of the agent's clock."""
    pulse_at: float
    """When the agent last saw the pulse change, which a thread of the process moves: it stands still in a stopped or
    GIL-locked process."""


def stall_limit_s(step_times: Iterable[float], settings: ElasticSettings) -> float:
    """Seconds without progress that count as a hang, from the run's recent step times (none yet: the first step)."""
    times = list(step_times)
    if not times:
        return settings.first_step_grace_s
    return max(settings.hang_floor_s, settings.hang_factor * median(times))


def decide_hang(stalled_s: float, step_times: Iterable[float], settings: ElasticSettings) -> Decision:
    """hang or wait. `stalled_s`: since any rank last entered a new step or collective."""
    times = list(step_times)
    limit = stall_limit_s(times, settings)
    usual = "hang_floor_s" if limit == settings.hang_floor_s else "hang_factor"
    name = usual if times else "first_step_grace_s"
    verb = "exceeds" if stalled_s > limit else "is within"
    text = f"no progress for {stalled_s:.1f} s {verb} the limit of {limit:.1f} s"
    return Decision("hang" if stalled_s > limit else "wait", text, key(name))


@dataclass(frozen=True)
class Suspects:
    """Ranks that hold the others up, and the sign that gave them away. No ranks: the fabric, not a process."""

    ranks: tuple[int, ...]
    sign: str


def stopped(beacons: Iterable[Beacon], now: float, settings: ElasticSettings) -> tuple[int, ...]:
    """Ranks whose process stands still, known before anything else stalls."""
    return tuple(sorted(b.rank for b in beacons if now - b.pulse_at > settings.pulse_timeout_s))


def suspects(beacons: Iterable[Beacon], now: float, settings: ElasticSettings) -> Suspects:
    """Whom to blame for a hang, the strongest sign first.

    1. Its pulse stands still. 2. It is outside a collective while others wait in one. 3. It has entered fewer
    collectives than the others (a deadlock by mismatched order). 4. Everyone waits in the same one: the fabric.
    """
    beacons = list(beacons)
    still = stopped(beacons, now, settings)
    if still:
        return Suspects(still, "pulse stands still")
    outside = tuple(sorted(b.rank for b in beacons if b.phase not in WAITING_PHASES))
    if outside:
        return Suspects(outside, "busy while the others wait")
    newest = max((b.collectives for b in beacons), default=0)
    behind = tuple(sorted(b.rank for b in beacons if b.collectives < newest))
    if behind:
        return Suspects(behind, "behind in collectives")
    return Suspects((), "all wait in the same collective")
