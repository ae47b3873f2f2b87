"""Which nodes may be used: verdicts on a burn-in, on a history of faults, on a predicted fault."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from cluster.config import ElasticSettings
from cluster.policies.decision import Decision, key


@dataclass(frozen=True)
class BurnIn:
    """A worker's measurements before it may join. Rates in any unit, the same on all nodes.

    Example: BurnIn("n7", True, True, 310.0, {"memory": 11.2, "loopback": 3.4, "peer": 1.1}).
    """

    node: str
    answer_correct: bool
    """Whether a fixed computation gave its known bits."""
    memory_correct: bool
    """Whether written patterns could be read back."""
    compute_rate: float
    bandwidths: Mapping[str, float]


def decide_burn_in(result: BurnIn, fleet: Sequence[BurnIn], settings: ElasticSettings) -> Decision:
    """accept or quarantine. `fleet`: burn-ins of other nodes of the same kind; if empty, only correctness is judged."""
    if not result.answer_correct:
        return Decision("quarantine", f"{result.node}: a computation with a known answer came out wrong", "none")
    if not result.memory_correct:
        return Decision("quarantine", f"{result.node}: memory returned other bytes than were written", "none")
    others = [one for one in fleet if one.node != result.node]
    if others:
        usual = median(one.compute_rate for one in others)
        if result.compute_rate < settings.burn_in_speed_ratio * usual:
            text = f"{result.node}: computes at {result.compute_rate:.3g}, the fleet's median is {usual:.3g}"
            return Decision("quarantine", text, key("burn_in_speed_ratio"))
    for name, rate in result.bandwidths.items():
        rates = [one.bandwidths[name] for one in others if name in one.bandwidths]
        if rates and rate < settings.burn_in_bandwidth_ratio * median(rates):
            text = f"{result.node}: {name} bandwidth {rate:.3g}, the fleet's median is {median(rates):.3g}"
            return Decision("quarantine", text, key("burn_in_bandwidth_ratio"))
    return Decision("accept", f"{result.node}: burn-in passed", key("burn_in_speed_ratio"))


def decide_history(node: str, fault_times: Sequence[float], now: float, settings: ElasticSettings) -> Decision:
    """accept or quarantine a node by its recent faults (those of its own making: deaths, hangs, wrong digests)."""
    recent = sum(now - time <= settings.quarantine_window_s for time in fault_times)
    text = f"{node}: {recent} faults in the last {settings.quarantine_window_s / 3600:g} h"
    action = "quarantine" if recent >= settings.quarantine_faults else "accept"
    return Decision(action, text, key("quarantine_faults"))


def decide_prediction(node: str, risk: float, signs: str, settings: ElasticSettings) -> Decision:
    """drain or watch a node that may fail by its health trends (`risk` from cluster.guard.prediction, 0 to 1)."""
    text = f"{node}: predicted risk {risk:.2f} ({signs or 'no sign'})"
    return Decision("drain" if risk >= settings.predicted_risk else "watch", text, key("predicted_risk"))
