"""Preemption notices: leave before the deadline at a step boundary, as late as is safe, so that no step is lost."""

import math
from dataclasses import dataclass

from cluster.config import ElasticSettings
from cluster.policies.decision import Decision, key


@dataclass(frozen=True)
class DrainView:
    """One notice, seen now. Times in seconds of the same clock; e.g. now 100, deadline 220, steps of 2 s; an infinite
    deadline is a risk without a time."""

    node: str
    now: float
    deadline: float
    step_s: float
    """The run's own median step time; 0 if no step has been seen."""
    pause_s: float
    """Measured seconds of the last re-forming; 0 if there was none."""
    covered: bool
    """Whether ready spares can take every place on the node (or it has no ranks)."""


def leave_by(view: DrainView, settings: ElasticSettings) -> float:
    """The last moment to ask for a step boundary: the present step, one more, a pause and the margin still fit."""
    return view.deadline - settings.drain_margin_s - 2 * view.step_s - view.pause_s


def decide_drain(view: DrainView, settings: ElasticSettings) -> Decision:
    """leave-at-boundary, hold (until `leave_by`, for a replacement that warms up) or leave-now (no boundary fits)."""
    left = view.deadline - view.now
    notice = f"{view.node} may go at any time" if math.isinf(left) else f"{view.node} goes in {left:.1f} s"
    if left < view.step_s + settings.drain_margin_s:
        return Decision("leave-now", f"{notice}, less than a step of {view.step_s:.1f} s", key("drain_margin_s"))
    if view.covered:
        return Decision("leave-at-boundary", f"{notice}, replacements are ready", key("spares"))
    if view.now >= leave_by(view, settings):
        return Decision("leave-at-boundary", f"{notice}, no time for a replacement", key("drain_margin_s"))
    until = leave_by(view, settings) - view.now
    wait = "until a replacement is ready" if math.isinf(until) else f"up to {until:.1f} s for a replacement to warm up"
    return Decision("hold", f"{notice}, {wait}", key("drain_margin_s"))
