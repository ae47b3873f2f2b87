"""Which new workers may join: their machines' measurements against the rest of the group.

A wrong answer is final. A slow one is not: a machine that many processes share is slow at times, so speed is judged
only if the worker had its processor to itself, against the median of at least `FLEET` other nodes of the same kind,
and after `ATTEMPTS` measurements, of which the best counts. Without such a comparison speed is no reason to refuse.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from cluster.config import ElasticSettings
from cluster.policies.decision import Decision
from cluster.policies.quarantine import BurnIn, decide_burn_in

FLEET = 2
ATTEMPTS = 3
CROWDED = 0.1
"""Share of time without a processor above which a measurement shows only that the machine is crowded."""


class Fitness:
    """Judges one group's workers. Notes are those of beacons: {"attempt", "kind", "crowded", "answer_correct",
    "memory_correct", "compute_rate", "bandwidths"}."""

    def __init__(self, settings: ElasticSettings) -> None:
        self._settings = settings
        self._best: dict[str, dict[str, BurnIn]] = {}

    def judge(self, worker: str, node: str, note: Mapping[str, Any]) -> Decision:
        """accept, quarantine, or again (the worker should measure once more)."""
        right = note["answer_correct"], note["memory_correct"]
        measured = BurnIn(node, *right, note["compute_rate"], note["bandwidths"])
        if not all(right):
            return decide_burn_in(measured, (), self._settings)
        known = self._best.setdefault(note["kind"], {})
        if note["crowded"] <= CROWDED:
            known[worker] = measured = _best(measured, known.get(worker))
        others = [one for one in known.values() if one.node != node]
        if worker not in known or len({one.node for one in others}) < FLEET:
            others = []
        decision = decide_burn_in(measured, others, self._settings)
        if decision.action == "accept":
            return decision
        if note["attempt"] < ATTEMPTS:
            return Decision("again", decision.reason, decision.key)
        del known[worker]  # not a reference for others
        return decision

    def forget(self, workers: Iterable[str]) -> None:
        """Forget workers that are gone."""
        for known in self._best.values():
            for worker in workers:
                known.pop(worker, None)


def _best(one: BurnIn, other: BurnIn | None) -> BurnIn:
    """The better of two measurements of a worker."""
    if other is None:
        return one
    names = one.bandwidths.keys() | other.bandwidths.keys()
    bandwidths = {name: max(one.bandwidths.get(name, 0.0), other.bandwidths.get(name, 0.0)) for name in names}
    return BurnIn(one.node, True, True, max(one.compute_rate, other.compute_rate), bandwidths)
