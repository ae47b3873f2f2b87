"""Measures the controller's own cost: the real state machine gets the events of a run of n ranks.

Only the messages are simulated. For every size: one start up to "running", then `ROUNDS` lost nodes, each with its
abort, re-forming on spares and snapshot messages; and beats of every node agent for a while.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.config import ElasticSettings
from cluster.core import messages as m
from cluster.core.beat_board import BeatBoard
from cluster.core.state_machine import StateMachine
from cluster.policies.hang import RankProgress
from cluster.policies.snapshot import place_replicas

SIZES = (8, 64, 512, 4096, 16384, 100_000)
GPUS_PER_NODE = 8
ROUNDS = 3


@dataclass(frozen=True)
class ControllerCost:
    """CPU seconds of one core, at `ranks` ranks on nodes of 8."""

    ranks: int
    recovery_s: float
    """CPU seconds of the core from a lost node until training resumes, over all messages of that recovery."""
    decision_s: float
    """Its longest single answer (the pause grows by about this much)."""
    snapshot_s: float
    """Bookkeeping of one snapshot: a message from every node agent."""
    beat_s: float
    """One beat of one node agent with the beacons of 8 ranks."""

    def to_json(self) -> dict[str, Any]:
        return {name: value if name == "ranks" else float(f"{value:.3g}") for name, value in asdict(self).items()}


def measure(ranks: int) -> ControllerCost:
    """About 2 s of computing at 100,000 ranks."""
    fleet = _Fleet(ranks)
    recoveries = [fleet.lose_a_node() for _ in range(ROUNDS)]
    recovery, decision = min(recoveries)
    return ControllerCost(ranks, recovery, decision, fleet.snapshot(), fleet.beats())


def measure_sizes(sizes: Sequence[int] = SIZES) -> list[ControllerCost]:
    return [measure(ranks) for ranks in sizes]


class _Fleet:
    """Node agents that answer for all their workers in one message."""

    def __init__(self, ranks: int) -> None:
        self.per_node = min(GPUS_PER_NODE, ranks // 2)  # a snapshot needs another node to survive one
        self.settings = ElasticSettings(min_workers=1, max_workers=ranks, spares=self.per_node)
        self.core = StateMachine(self.settings)
        self.now, self.nodes, self.step = 0.0, 0, 0
        self.ranks = ranks
        self._spawned: list[str] = []
        self.tell(m.Tick())
        self.start_ordered()
        self.form()

    def tell(self, event: m.Event) -> float:
        """CPU seconds of the answer."""
        self.now += 1e-6
        started = time.thread_time()
        commands = self.core.handle(event, self.now)
        passed = time.thread_time() - started
        for command in commands:
            if isinstance(command, m.Spawn):
                self._spawned += command.workers
        return passed

    def start_ordered(self) -> list[float]:
        spent, waiting = [], self._spawned
        self._spawned = []
        for first in range(0, len(waiting), self.per_node):
            here = dict.fromkeys(waiting[first : first + self.per_node], f"n{self.nodes}")
            self.nodes += 1
            spent.append(self.tell(m.WorkersReady(here)))
        return spent

    def by_node(self) -> list[tuple[str, ...]]:
        found: dict[str, list[str]] = {}
        for worker in self.core.roster.joined:
            found.setdefault(self.core.roster.node_of[worker], []).append(worker)
        return [tuple(workers) for workers in found.values()]

    def form(self) -> list[float]:
        spent = [self.tell(m.Joined(self.core.generation, workers)) for workers in self.by_node()]
        assert self.core.phase == "running", self.core.phase
        self.step += 10
        self.tell(m.Progress(self.core.generation, self.step, 6.0))
        self.snapshot()
        return spent

    def lose_a_node(self) -> tuple[float, float]:
        """(CPU seconds of the whole recovery, of its longest single answer)."""
        node = self.core.roster.node_of[self.core.blocks[len(self.core.blocks) // 2][0]]
        spent = [self.tell(m.NodesLost((node,), f"{node} died"))]
        aborting = self.core.generation
        spent += [self.tell(m.AbortAcked(aborting, workers)) for workers in self.by_node()]
        spent += self.form()
        spent += self.start_ordered()
        return sum(spent), max(spent)

    def snapshot(self) -> float:
        nodes = [self.core.roster.node_of[worker] for worker in self.core.members]
        placed = place_replicas(nodes, self.settings.snapshot_replicas)
        generation = self.core.generation
        words = [m.SnapshotHeld(generation, self.step, self.ranks, {node: held}) for node, held in placed.items()]
        return sum(self.tell(word) for word in words)

    def beats(self) -> float:
        board = BeatBoard(self.settings)
        board.begin(1, 0.0)
        nodes = min(self.ranks // self.per_node, 2000)
        started, rounds = time.thread_time(), 3
        for round_ in range(1, rounds + 1):
            for node in range(nodes):
                ranks = range(node * self.per_node, (node + 1) * self.per_node)
                at = float(round_)
                beacons = [RankProgress(rank, round_, "compute", round_, at, at) for rank in ranks]
                board.beat(f"n{node}", 1, beacons, float(round_))
            board.silent_nodes(float(round_))
            board.judge(float(round_))
        return (time.thread_time() - started) / (rounds * max(nodes, 1))
