"""A running group without processes, for tests of the guard."""

from cluster.config import ElasticSettings
from cluster.core import messages as m
from cluster.core.state_machine import StateMachine


def running(settings: ElasticSettings, nodes: list[str]) -> StateMachine:
    """A group whose worker wN is on nodes[N]; workers beyond `max_workers` are spares."""
    core = StateMachine(settings)
    core.handle(m.Tick(), 0)
    workers = [f"w{rank}" for rank in range(len(nodes))]
    core.handle(m.WorkersReady(dict(zip(workers, nodes, strict=True))), 1)
    core.handle(m.Joined(1, workers), 2)
    assert core.phase == "running"
    return core
