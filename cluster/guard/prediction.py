"""How likely a node is to fail soon, from the trends of its health signals. Pure: readings in, risk out.

A steady rate of corrected errors is normal for a node, an accelerating one is a sign: every counter is judged against
the node's own past, as a surprise. With k events in the last `recent_s` if the past rate predicts mu, a Poisson
variable reaches k with probability at most exp(-(k ln(k / mu) - k + mu)) (Chernoff); its exponent, the surprise in
nats, beyond a threshold that allows for how bursty the signal is, is evidence. A temperature is judged by the value
that its trend reaches within `horizon_s`, and by the node's earlier peaks. Until a node has a past as long as the
recent window, only events that should never happen (`always`) count. Signs combine as independent ones:
1 - product of (1 - p).
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.config import ElasticSettings
from cluster.node.health import GAUGES
from cluster.policies.decision import Decision
from cluster.policies.quarantine import decide_prediction


@dataclass(frozen=True)
class Sign:
    """How a counter's surprise becomes evidence. `most`: probability at any surprise; `surprise`: nats for half of it;
    `least`: fewer recent events are never a sign. `always`: even without a past to compare with."""

    most: float
    surprise: float
    least: float
    always: bool = False


SIGNS = {
    "ecc_uncorrected": Sign(0.95, 0.5, 1, always=True),
    "gpu_ecc_uncorrected": Sign(0.95, 0.5, 1, always=True),
    "gpu_remapped_rows": Sign(0.9, 1.0, 1, always=True),
    "ecc_corrected": Sign(0.9, 30.0, 10),
    "gpu_ecc_corrected": Sign(0.9, 30.0, 10),
    "pcie_replays": Sign(0.9, 30.0, 10),
    "link_errors": Sign(0.9, 60.0, 20),
    "throttles": Sign(0.8, 20.0, 5),
    "gpu_throttles": Sign(0.8, 8.0, 3),
    "oom_kills": Sign(0.3, 5.0, 2),
    "retransmits": Sign(0.3, 500.0, 200),
}
"""Neighbours cause retransmissions too, so they never drain a node on their own."""
LIMITS_C = {"temperature_c": 95.0, "gpu_temperature_c": 90.0}
"""Temperatures that hardware does not survive for long."""
RISING_C = 4.0
"""A temperature this far above the node's highest one so far is half a sign."""
LEAST_EVENTS_PER_S = 0.1 / 3600
"""The assumed past rate of a counter that has never moved."""
DAY_S = 24 * 3600.0
"""Until a node's daily range is known, a rising temperature counts only if it leads to the limit."""


@dataclass(frozen=True)
class Risk:
    """`probability` in [0, 1]; `signs` for people, strongest first, e.g. "ecc_corrected: 212 in 30 min, 3 expected"."""

    probability: float
    signs: str


class NodeTrend:
    """One node's signals over time. Costs as much as the samples of the recent window.

    Args:
        recent_s: the length of the recent window. horizon_s: how far ahead a temperature's trend is followed.
        past_s: time constant of the past rates.
    """

    def __init__(self, recent_s: float = 1800.0, horizon_s: float = 1800.0, past_s: float = 12 * 3600.0) -> None:
        self._recent_s, self._horizon_s, self._past_s = recent_s, horizon_s, past_s
        self._recent: deque[tuple[float, Mapping[str, float]]] = deque()
        self._rates: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        self._past: float = 0.0

    def observe(self, now: float, signals: Mapping[str, float]) -> None:
        """Take a reading. A counter that fell (a reboot) starts anew."""
        if self._recent and any(
            signals.get(name, 0.0) < value for name, value in self._recent[-1][1].items() if name not in GAUGES
        ):
            self._recent.clear()
        self._recent.append((now, dict(signals)))
        while len(self._recent) > 2 and self._recent[1][0] <= now - self._recent_s:
            left, then = self._recent.popleft(), self._recent[0]
            self._remember(left, then)

    def risk(self) -> Risk:
        """The risk as of the last reading; 0 until the readings fill a window."""
        if len(self._recent) < 2:
            return Risk(0.0, "")
        (began, first), (now, last) = self._recent[0], self._recent[-1]
        found: list[tuple[float, str]] = []
        for name, value in last.items():
            if name in SIGNS and name in first:
                found.append(self._counter(name, value - first[name], now - began))
            elif name in LIMITS_C:
                found.append(self._temperature(name))
        found = sorted((sign for sign in found if sign[0] > 0.01), reverse=True)
        survive = math.prod(1 - probability for probability, _ in found)
        return Risk(1 - survive, ", ".join(text for _, text in found))

    def _remember(self, left: tuple[float, Mapping[str, float]], then: tuple[float, Mapping[str, float]]) -> None:
        """Add samples that leave the window to the past: exponential averages of rates and temperatures."""
        passed = then[0] - left[0]
        if passed <= 0:
            return
        self._past += passed
        share = 1 - math.exp(-passed / min(self._past_s, self._past))
        for name, value in then[1].items():
            if name in LIMITS_C:
                peak = self._peaks.get(name, value)
                self._peaks[name] = max(value, peak - (peak - value) * passed / (7 * DAY_S))
            elif name in left[1]:
                rate = (value - left[1][name]) / passed
                old = self._rates.get(name, rate)
                self._rates[name] = old + share * (rate - old)

    def _counter(self, name: str, events: float, seconds: float) -> tuple[float, str]:
        sign = SIGNS[name]
        if self._past < self._recent_s and not sign.always:
            return 0.0, ""
        expected = max(self._rates.get(name, 0.0), LEAST_EVENTS_PER_S) * seconds
        if events < sign.least or events <= expected:
            return 0.0, ""
        surprise = events * math.log(events / expected) - events + expected
        probability = sign.most * surprise / (surprise + sign.surprise)
        return probability, f"{name}: {events:.0f} in {seconds / 60:.0f} min, {expected:.1f} expected"

    def _temperature(self, name: str) -> tuple[float, str]:
        points = [(at, signals[name]) for at, signals in self._recent if name in signals]
        if len(points) < 3 or points[-1][0] - points[0][0] < self._recent_s / 2:  # too short for a trend
            return 0.0, ""
        middle = sum(at for at, _ in points) / len(points)
        mean = sum(value for _, value in points) / len(points)
        spread = sum((at - middle) ** 2 for at, _ in points)
        slope = sum((at - middle) * (value - mean) for at, value in points) / spread if spread else 0.0
        ahead = mean + slope * (points[-1][0] - middle + self._horizon_s)
        rise = mean - self._peaks.get(name, mean) if self._past >= DAY_S else 0.0
        heat = 1 / (1 + math.exp(-(ahead - LIMITS_C[name]) / 2))
        drift = 0.6 / (1 + math.exp(-(rise - RISING_C) / 1.5)) if slope > 0 else 0.0
        text = f"{name}: {mean:.0f} C, {rise:+.0f} against its peak, {ahead:.0f} ahead"
        return max(heat * 0.9, drift), text


def decide_drain_ahead(node: str, trend: NodeTrend, settings: ElasticSettings) -> Decision:
    """drain or watch, logged with the signs."""
    risk = trend.risk()
    return decide_prediction(node, risk.probability, risk.signs, settings)
