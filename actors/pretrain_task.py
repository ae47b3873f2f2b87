"""What the controller of a pretraining must know of it: where ranks meet, what they load, who keeps replicas."""

import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from actors.pretrain_worker import Order, ReplicaPlace
from cluster.config import ElasticSettings
from cluster.controller_messages import Join
from cluster.fleet import Fleet
from cluster.group_journal import GroupHistory
from cluster.node_agent import AgentPlace, NodeAgent
from cluster.policies.snapshot import place_replicas
from engines.process_groups import StoreAddress

ANSWER_S = 30.0


class PretrainAgent(NodeAgent):
    """A node agent that also serves its node's shards to the others, once there are others."""

    def __init__(self, place: AgentPlace) -> None:
        super().__init__(place)
        self._server: Any = None
        self._lock = threading.Lock()
        if len(place.living) > 1:
            threading.Thread(target=self.replica_server, name="replica-start", daemon=True).start()

    def replica_server(self) -> ReplicaPlace:
        """Where other nodes find this node's shards, and put replicas of theirs."""
        with self._lock:
            if self._server is None:
                from engines.snapshots import ReplicaServer  # torch comes with it, which takes seconds

                host, root = ray.util.get_node_ip_address(), self.place.folder.parent
                self._server = ReplicaServer(secrets.token_hex(16), host=host, root=root)
            return ReplicaPlace(self._server.host, self._server.port, self._server.token)


class PretrainTask:
    """See cluster.controller.Task.

    Args:
        state: the folder that snapshots are flushed to.
        store: where the ranks meet.
        replicated: every rank holds the whole state.
    """

    def __init__(
        self, group: str, state: Path, store: StoreAddress, settings: ElasticSettings, replicated: bool
    ) -> None:
        self.group, self.state, self.store, self.settings = group, state, store, settings
        self.replicated = replicated
        self._places: dict[str, ReplicaPlace] = {}

    def orders(self, join: Join, fleet: Fleet, history: GroupHistory, high_step: int) -> Mapping[str, Order]:
        ranks = join.ranks()
        nodes = [fleet.node_of[worker] for worker in ranks]
        places = self._replica_places(fleet, {*nodes, *join.restore.on})
        copies = 0 if self.replicated else self.settings.snapshot_replicas
        held = place_replicas(nodes, copies)
        skipped = tuple(one for window in history.skipped for one in range(window.first, window.last + 1))
        orders = {}
        for (worker, rank), node in zip(ranks.items(), nodes, strict=True):
            others = {name: place for name, place in places.items() if name != node}
            orders[worker] = Order(
                join.generation,
                rank,
                len(ranks),
                self.store,
                None if join.restore.source == "start" else join.restore.step,
                tuple(others.values()),
                tuple(place for name, place in others.items() if rank in held.get(name, ())),
                skipped,
                high_step,
            )
        return orders

    def stored(self) -> set[tuple[int, int]]:
        """Names of manifests: generation and step, see engines.snapshots.flush."""
        found = set()
        folder = self.state / "snapshots" / self.group / "manifests"
        for path in folder.iterdir() if folder.is_dir() else ():
            generation, _, step = path.name.partition("-")
            if generation.isdigit() and step.isdigit():
                found.add((int(generation), int(step)))
        return found

    def _replica_places(self, fleet: Fleet, nodes: set[str]) -> dict[str, ReplicaPlace]:
        """Of the nodes that live; none where there is one node only."""
        living = nodes & fleet.agents.keys()
        if len(living) < 2:
            return {}
        asked = {node: fleet.agents[node].replica_server.remote() for node in living if node not in self._places}
        for node, reference in asked.items():
            try:
                self._places[node] = ray.get(reference, timeout=ANSWER_S)
            except ray.exceptions.RayError:
                continue  # it is lost, which will be heard; a rank without replicas trains on
        return {node: self._places[node] for node in living if node in self._places}
