"""When a fault began, judged from the beats before the controller heard of it.

A dead or stopped process: the moment that its node agent saw. A hung one: its last sign of progress. A lost node: its
last beat. The ledgers count detection from there; a fault without a known start begins when the controller hears of it.
"""

import time

from cluster.core import messages as m
from cluster.node.rank_watch import Beat, Sight


class FaultTimes:
    """Times are by the controller's clock; an agent's report of the past is as late as its beat."""

    def __init__(self) -> None:
        self._beats: dict[str, float] = {}
        self._ends: dict[str, float] = {}
        self._progress: dict[str, tuple[tuple[int, str, int, float], float]] = {}

    def heard(self, beat: Beat, now: float) -> None:
        """Call this before deciding about the beat. Its travel time counts, as far as clocks agree."""
        said = now - (max(0.0, time.time() - beat.sent_at) if beat.sent_at else 0.0)
        self._beats[beat.node] = said
        for sight in beat.sights:
            self._see(sight, said)

    def age_s(self, event: m.Event, now: float) -> float:
        """Seconds since the start of the fault that `event` reports; 0 if that is unknown, or it reports none."""
        moments: list[float] = []
        if isinstance(event, m.NodesLost):
            moments = [self._beats[node] for node in event.nodes if node in self._beats]
        elif isinstance(event, m.WorkersLost):
            moments = [self._ends[worker] for worker in event.workers if worker in self._ends]
        elif isinstance(event, m.Suspected):
            for worker in event.workers:
                if worker in self._ends:
                    moments.append(self._ends[worker])
                elif worker in self._progress:
                    moments.append(self._progress[worker][1])
        return max(0.0, now - min(moments, default=now))

    def _see(self, sight: Sight, now: float) -> None:
        worker, record = sight.worker, sight.record
        if sight.out_s:
            self._ends.setdefault(worker, now - sight.out_s)
        else:
            self._ends.pop(worker, None)
        place = record.step, record.phase, record.ticks, record.entered_at
        if not sight.alive:
            self._progress.pop(worker, None)
        elif worker not in self._progress or self._progress[worker][0] != place:
            self._progress[worker] = place, now
