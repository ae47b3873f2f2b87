"""Who may join: new workers are let in once they have measured what is asked, and it is good enough."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config import ElasticSettings
from cluster.decision import Decision
from cluster.fitness import Fitness
from cluster.wire_speed import SinkAddress

PATIENCE_S = 10.0
"""How long a measurement that was asked for is waited for."""


@dataclass(frozen=True)
class Answer:
    """`decision.action`: accept, quarantine, measure (the machine where `again`, and the way to `peer`) or wait."""

    decision: Decision
    again: bool = False
    peer: SinkAddress | None = None


WAIT = Answer(Decision("wait", "it measures", "none"))


class Admission:
    """Of one group."""

    def __init__(self, settings: ElasticSettings) -> None:
        self._fitness = Fitness(settings)
        self._sinks: dict[str, SinkAddress] = {}
        self._asked: dict[str, tuple[int, float]] = {}

    def heard(self, node: str, sink: SinkAddress | None) -> None:
        """A node takes bytes there."""
        if sink is not None:
            self._sinks[node] = sink

    def lose(self, node: str, workers: Iterable[str]) -> None:
        """They are gone."""
        self._sinks.pop(node, None)
        self._fitness.forget(workers)

    def ask(self, worker: str, node: str, note: Mapping[str, Any] | None, now: float) -> Answer:
        """A worker on standby, and what its beacon says that it measured; None: its kind measures nothing."""
        if note is None:
            return Answer(Decision("accept", f"{worker} measures nothing", "none"))
        asked, at = self._asked.get(worker, (0, now))
        if asked == note["number"] and now - at < PATIENCE_S:
            return WAIT
        peer = next((sink for other, sink in self._sinks.items() if other != node), None)
        if peer is not None and "peer" not in note["bandwidths"] and asked == 0:
            self._asked[worker] = note["number"], now
            return Answer(Decision("measure", "the way to another node", "none"), peer=peer)
        decision = self._fitness.judge(worker, node, note)
        if decision.action != "again" or asked == note["number"]:
            self._asked.pop(worker, None)
            return Answer(Decision("accept", decision.reason, decision.key) if decision.action == "again" else decision)
        self._asked[worker] = note["number"], now
        return Answer(Decision("measure", decision.reason, decision.key), again=True, peer=peer)
