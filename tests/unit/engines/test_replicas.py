"""Replicas of shards on other nodes, by real ranks, one per node: complete again before anything relies on them."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from actors.pretrain.agent import PretrainAgent
from cluster.node.agent import AgentPlace
from engines.config import SnapshotSettings
from engines.elastic.learner import Recipe
from engines.snapshots import ReplicaServer, SnapshotName, node_folder, sealed
from tests.helpers.elastic_ranks import (
    MODEL,
    SETTINGS,
    STEPS,
    Group,
    Place,
    finish,
    losses,
    quiet_curve,
    running,
    shared_memory,
)


@dataclass
class Node:
    """A node's memory and its server."""

    memory: Path
    server: ReplicaServer

    @property
    def place(self) -> Place:
        return self.server.host, self.server.port, self.server.token

    def lose(self) -> None:
        self.server.close()
        shutil.rmtree(node_folder("run", self.memory))

    def generations(self) -> set[int]:
        return {name.generation for name in sealed(node_folder("run", self.memory))}


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    with shared_memory() as shared:
        found = []
        for number in range(4):
            memory = shared / f"node-{number}"
            memory.mkdir()
            found.append(Node(memory, ReplicaServer("secret", root=memory)))
        yield found
        for node in found:
            node.server.close()


def send(group: Group, nodes: Sequence[Node], members: Sequence[int], **go: object) -> None:
    """A ring of nodes: each keeps the replicas of the one before it."""
    for rank, member in enumerate(members):
        ring = [nodes[members[(rank + distance) % len(members)]].place for distance in range(1, len(members))]
        order = {"sources": tuple(ring), "holders": tuple(ring[:1]), **go}
        group.send_one(member, rank, len(members), **order)


def test_a_second_node_loss_right_after_the_first_recovery_loses_one_step(nodes: list[Node]) -> None:
    """Snapshots are taken every 4 steps. All stop after step 6; node 1 is lost; the others go on, and after one more
    step node 2 is lost, which held what was left of node 1: its shards of step 6 must be elsewhere by then."""
    recipe = Recipe(MODEL, SETTINGS, SnapshotSettings(every=4), seed=3)
    with running(4, recipe, "run", [node.memory for node in nodes]) as group:
        send(group, nodes, [0, 1, 2, 3], generation=0, fresh=True, until=6, stop=True)
        before = finish(group, [0, 1, 2, 3])
        group.processes[1].kill()
        nodes[1].lose()
        send(group, nodes, [0, 2, 3], generation=1, victim=1, at=7)
        said, _ = group.lose([0, 2, 3], victim=2, generation=1)
        nodes[2].lose()
        send(group, nodes, [0, 3], generation=2)
        after = finish(group, [0, 3])
    first = next(message[2] for message in said if message[0] == "joined")
    assert first.snapshot == SnapshotName(0, 6)
    assert after.joined.snapshot == SnapshotName(1, 6), after.joined
    curve = {**before.losses, **losses(said), **after.losses}
    assert [curve[step] for step in range(STEPS)] == pytest.approx(quiet_curve(), rel=1e-4)


def test_an_older_generation_is_kept_until_the_new_one_has_all_its_copies(nodes: list[Node]) -> None:
    """One rank of two has no access to its holder: nobody forgets anything, until a generation in which all have."""
    with running(2, Recipe(MODEL, SETTINGS, seed=3), "run", [node.memory for node in nodes[:2]]) as group:
        send(group, nodes, [0, 1], generation=0, fresh=True, until=2)
        finish(group, [0, 1])
        refusing = ((nodes[1].server.host, nodes[1].server.port, "another secret"),)
        group.send_one(0, 0, 2, generation=1, until=4, sources=(nodes[1].place,), holders=refusing)
        group.send_one(1, 1, 2, generation=1, until=4, sources=(nodes[0].place,), holders=(nodes[0].place,))
        assert finish(group, [0, 1]).joined.step == 2
        assert [node.generations() for node in nodes[:2]] == [{0, 1}, {0, 1}]
        send(group, nodes, [0, 1], generation=2, until=6)
        assert finish(group, [0, 1]).joined.step == 4
        assert [node.generations() for node in nodes[:2]] == [{2}, {2}]


def test_the_next_agent_of_a_node_serves_replicas_at_the_same_place(tmp_path: Path) -> None:
    """Ranks of other nodes were told where that is once, at the start of their generation."""
    place = AgentPlace("run", "node", tmp_path / "recua-run")
    first = PretrainAgent(place)
    served = first.replica_server()
    assert (place.folder / "replicas.json").stat().st_mode & 0o077 == 0
    first._server.close()  # as its end would
    second = PretrainAgent(place)
    assert second.replica_server() == served
    taken = PretrainAgent(AgentPlace("run", "node", tmp_path / "recua-run"))
    other = taken.replica_server()  # the port is not free
    assert other.port != served.port and other.token == served.token
    for agent in (second, taken):
        agent._server.close()
        agent.close(remove=True)
    first.close(remove=True)
    assert not place.folder.exists()
