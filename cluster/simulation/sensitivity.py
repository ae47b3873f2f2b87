"""The effect of the pause in simulation: the same faults under other pauses, and where goodput falls below 0.98."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

from cluster.simulation.assumptions import SimulatedCluster
from cluster.simulation.failure_tables import Fault
from cluster.simulation.pauses import fixed
from cluster.simulation.run import Simulation

PAUSES_S = (0.0, 30.0, 90.0, 240.0)
TARGET = 0.98
CLOSE = 5e-5
MOST_REFINEMENTS = 2


@dataclass(frozen=True)
class Sensitivity:
    """Simulated goodput by pause (seconds of a re-forming at any size, detection apart), in order of the pause.

    `pause_at_98`: the pause at which it falls below 0.98; None if it does so without a pause, or for no pause tried.
    """

    points: tuple[tuple[float, float], ...]
    pause_at_98: float | None


def goodput_at(pause_s: float, cluster: SimulatedCluster, faults: Sequence[Fault]) -> float:
    """One simulated run with this pause."""
    return Simulation(replace(cluster, pause=fixed(pause_s)), faults).run().account.goodput


def sweep(
    cluster: SimulatedCluster,
    faults: Sequence[Fault],
    pauses_s: Sequence[float] = PAUSES_S,
    processes: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> Sensitivity:
    """Goodput at `pauses_s` in `processes` processes, then the crossing of 0.98 by false position."""
    once = partial(goodput_at, cluster=cluster, faults=tuple(faults))
    points: dict[float, float] = {}

    def note(pause_s: float, value: float) -> None:
        points[pause_s] = value
        say(f"pause {pause_s:.1f} s: simulated goodput {value:.4f}")

    if processes > 1:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            for pause_s, value in zip(pauses_s, pool.map(once, pauses_s), strict=True):
                note(pause_s, value)
    else:
        for pause_s in pauses_s:
            note(pause_s, once(pause_s))
    for _ in range(MOST_REFINEMENTS):
        guess = crossing(points)
        if guess is None or min(abs(value - TARGET) for value in points.values()) < CLOSE:
            break
        note(guess, once(guess))
    return Sensitivity(tuple(sorted(points.items())), crossing(points))


def crossing(points: dict[float, float]) -> float | None:
    """The point where the straight line between the neighbours of TARGET crosses it."""
    above = [pause for pause, value in points.items() if value >= TARGET]
    below = [pause for pause, value in points.items() if value < TARGET]
    if not above or not below or max(above) > min(below):
        return None
    left, right = max(above), min(below)
    share = (points[left] - TARGET) / (points[left] - points[right])
    return left + share * (right - left)
