"""SYNTHETIC node health traces: invented, not recorded. They show how a predictor treats such shapes, not how often
real nodes fail in them.

They are independent of the predictor: nothing of it is imported, and none of its thresholds is used. The shapes follow
published descriptions of failing hardware: corrected memory errors that accelerate before an uncorrected one, a fan
that dies, a link that degrades, a card that falls off the bus with bursts of PCIe replays; and failures without any
sign. Healthy nodes are as noisy as real ones: memory cells that report corrected errors at a steady rate, racks that
run hot by day, bursts of retransmissions when a neighbour congests the network, single throttling events.

A trace is one node's signals every `PERIOD_S` seconds; counters never fall.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

PERIOD_S = 60.0
DAY_S = 86400.0

FAILING = {"memory": 0.2, "cooling": 0.15, "link": 0.15, "bus": 0.1, "sudden": 0.4}
"""Shares of the kinds of failure; "sudden" has no precursor."""
HEALTHY = {"quiet": 0.55, "steady-errors": 0.15, "hot-rack": 0.15, "congested": 0.15}


@dataclass(frozen=True)
class SyntheticTrace:
    """A node's trace. `fails_at` is None if it stays healthy. `samples`: (time, {signal: value}) up to the failure."""

    node: str
    kind: str
    fails_at: float | None
    samples: tuple[tuple[float, dict[str, float]], ...]


def make_fleet(nodes: int, days: float, failing_share: float, seed: int) -> Iterator[SyntheticTrace]:
    """`nodes` traces, about `failing_share` of which end in a failure in the last three quarters of `days`."""
    dice = random.Random(f"synthetic health {seed}")
    for index in range(nodes):
        fails = dice.random() < failing_share
        kinds = FAILING if fails else HEALTHY
        kind = dice.choices(list(kinds), list(kinds.values()))[0]
        length = days * DAY_S
        fails_at = dice.uniform(0.25, 1.0) * length if fails else None
        yield make_trace(f"synthetic-{index}", kind, length, fails_at, random.Random(f"{seed} {index}"))


def make_trace(node: str, kind: str, length_s: float, fails_at: float | None, dice: random.Random) -> SyntheticTrace:
    """One node's trace; magnitudes and lead times are drawn for each node."""
    background = dict.fromkeys(("ecc_corrected", "pcie_replays", "retransmits", "link_errors", "throttles"), 0.0)
    base_temperature, swing = dice.uniform(48, 64), dice.uniform(1, 4)
    if kind == "hot-rack":
        base_temperature, swing = dice.uniform(70, 77), dice.uniform(3, 6)
    steady = dice.uniform(2, 40) / 3600 if kind == "steady-errors" else dice.choice([0.0, 0.0, 0.2 / 3600])
    lead = dice.lognormvariate(math.log(3 * 3600), 0.8)  # hours of warning, sometimes only minutes
    peak = {
        "memory": dice.uniform(60, 900) / 3600,
        "link": dice.uniform(100, 3000) / 3600,
        "bus": dice.uniform(40, 400) / 3600,
    }
    ramp = dice.uniform(15, 30)
    last_burst, until_burst = 0.0, dice.expovariate(1 / (8 * 3600.0))
    samples = []
    end = length_s if fails_at is None else fails_at
    for step in range(int(end / PERIOD_S)):
        now = step * PERIOD_S
        into = 0.0 if fails_at is None or kind == "sudden" else max(0.0, 1 - (fails_at - now) / lead)
        temperature = base_temperature + swing * math.sin(2 * math.pi * now / DAY_S) + dice.gauss(0, 0.8)
        background["ecc_corrected"] += _poisson(steady * PERIOD_S, dice)
        background["retransmits"] += _poisson(0.02 * PERIOD_S, dice)
        if dice.random() < 1e-4:
            background["throttles"] += 1
        if now > until_burst:
            last_burst, until_burst = now, now + dice.expovariate(1 / (8 * 3600.0))
        if kind == "congested" and now - last_burst < 1200:
            background["retransmits"] += _poisson(dice.uniform(1, 20) * PERIOD_S, dice)
            background["link_errors"] += _poisson(0.5, dice) * (dice.random() < 0.1)
        if into and kind == "memory":
            background["ecc_corrected"] += _poisson(
                peak["memory"] * math.expm1(4 * into) / math.expm1(4) * PERIOD_S, dice
            )
        if into and kind == "link":
            background["link_errors"] += _poisson(peak["link"] * into**2 * PERIOD_S, dice)
            background["retransmits"] += _poisson(5 * into * PERIOD_S, dice)
        if into and kind == "bus" and dice.random() < 0.3:
            background["pcie_replays"] += _poisson(peak["bus"] * into * PERIOD_S / 0.3, dice)
        if into and kind == "cooling":
            temperature += ramp * into
            background["throttles"] += _poisson(max(0.0, temperature - 83) * 0.3, dice)
        samples.append((now, {**background, "temperature_c": round(temperature, 1)}))
    return SyntheticTrace(node, kind, fails_at, tuple(samples))


def _poisson(mean: float, dice: random.Random) -> int:
    """Knuth's product of uniforms; a rounded normal above 50."""
    if mean > 50:
        return max(0, round(dice.gauss(mean, math.sqrt(mean))))
    count, product, floor = 0, dice.random(), math.exp(-mean)
    while product > floor:
        count += 1
        product *= dice.random()
    return count
