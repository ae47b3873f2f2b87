"""Admits new workers once they have made the requested measurements with good results."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config import ElasticSettings
from cluster.guard.fitness import Fitness
from cluster.node.wire_speed import SinkAddress
from cluster.policies.decision import Decision

PATIENCE_S = 10.0
"""Longest wait for a requested measurement."""
PEERS = 2
"""A worker that cannot reach this many nodes has a bad node itself."""


@dataclass(frozen=True)
class AdmissionAnswer:
    """`decision.action`: accept, quarantine, measure (the machine if `again`, and the way to `peer`) or wait."""

    decision: Decision
    again: bool = False
    peer: SinkAddress | None = None


@dataclass(frozen=True)
class _Asked:
    """The last request to a worker: after which measurement, when, and for the way to which nodes so far."""

    number: int
    at: float
    peers: tuple[str, ...] = ()


WAIT = AdmissionAnswer(Decision("wait", "it measures", "none"))


class Admission:
    """The admission of one group's workers."""

    def __init__(self, settings: ElasticSettings) -> None:
        self._fitness = Fitness(settings)
        self._sinks: dict[str, SinkAddress] = {}
        self._asked: dict[str, _Asked] = {}

    def heard(self, node: str, sink: SinkAddress | None) -> None:
        """A node reports the sink that takes its bytes."""
        if sink is not None:
            self._sinks[node] = sink

    def lose(self, node: str, workers: Iterable[str]) -> None:
        """Forget a node and workers that are gone."""
        self._sinks.pop(node, None)
        self._fitness.forget(workers)

    def ask(self, worker: str, node: str, note: Mapping[str, Any] | None, now: float) -> AdmissionAnswer:
        """Judge a worker on standby by the measurements in its beacon; None: its kind measures nothing."""
        if note is None:
            return AdmissionAnswer(Decision("accept", f"{worker} measures nothing", "none"))
        asked = self._asked.get(worker, _Asked(0, now))
        silent = asked.number == note["number"]
        if silent and now - asked.at < PATIENCE_S:
            return WAIT
        rates = note["bandwidths"]
        unreached = rates.get("peer") == 0.0
        others = [other for other in self._sinks if other != node]
        fresh = [other for other in others if other not in asked.peers]
        in_doubt = unreached and len([one for one in asked.peers if one in others]) < PEERS  # those may be gone
        if fresh and not silent and (in_doubt or (asked.number == 0 and "peer" not in rates)):
            return self._measure(worker, note, now, fresh[0], Decision("measure", "the way to another node", "none"))
        if in_doubt:
            note = {**note, "bandwidths": {name: rate for name, rate in rates.items() if name != "peer"}}
        decision = self._fitness.judge(worker, node, note)
        if decision.action != "again" or silent:
            self._asked.pop(worker, None)
            if decision.action == "again":
                decision = Decision("accept", decision.reason, decision.key)
            return AdmissionAnswer(decision)
        again = Decision("measure", decision.reason, decision.key)
        return self._measure(worker, note, now, next(iter([*fresh, *others]), None), again, again=True)

    def _measure(
        self, worker: str, note: Mapping[str, Any], now: float, peer: str | None, why: Decision, again: bool = False
    ) -> AdmissionAnswer:
        asked = self._asked.get(worker, _Asked(0, now)).peers
        peers = asked if peer is None or peer in asked else (*asked, peer)
        self._asked[worker] = _Asked(note["number"], now, peers)
        return AdmissionAnswer(why, again=again, peer=None if peer is None else self._sinks[peer])
