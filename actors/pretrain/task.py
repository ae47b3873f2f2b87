"""The task of a pretraining's group for its controller: meeting point, states to load, holders of replicas."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray

from actors.pretrain.agent import ReplicaPlace
from actors.pretrain.job import Order
from cluster.config import ElasticSettings
from cluster.controller.fleet import Fleet
from cluster.core.history import GroupHistory
from cluster.core.messages import Join
from cluster.policies.snapshot import place_replicas
from engines.collectives.process_groups import StoreAddress
from infra.errors import StoreError
from infra.storage import Store

log = logging.getLogger(__name__)

ANSWER_S = 30.0


class PretrainTask:
    """See cluster.controller.lead.Task.

    Args:
        snapshots: the store that snapshots are flushed to.
        store: the meeting point of the ranks.
        replicated: every rank holds the whole state.
    """

    def __init__(
        self, group: str, snapshots: Store, store: StoreAddress, settings: ElasticSettings, replicated: bool
    ) -> None:
        self.group, self.store, self.settings = group, store, settings
        self.replicated = replicated
        self._snapshots = snapshots
        self._looking: Future[set[tuple[int, int]]] | None = None
        self._looker = ThreadPoolExecutor(1, thread_name_prefix="stored")
        self._stored: set[tuple[int, int]] | None = None
        self._places: dict[str, tuple[Any, ReplicaPlace]] = {}  # by node; a replaced agent serves at another address

    def orders(self, join: Join, fleet: Fleet, history: GroupHistory, high_step: int) -> Mapping[str, Order | None]:
        """A place for every member, None for all other workers."""
        ranks = join.ranks()
        nodes = [fleet.node_of[worker] for worker in ranks]
        places = self._replica_places(fleet, {*nodes, *join.restore.on})
        copies = 0 if self.replicated else self.settings.snapshot_replicas
        held = place_replicas(nodes, copies)
        skipped = tuple(one for window in history.skipped for one in range(window.first, window.last + 1))
        orders: dict[str, Order | None] = {}
        for (worker, rank), node in zip(ranks.items(), nodes, strict=True):
            others = {name: place for name, place in places.items() if name != node}
            orders[worker] = Order(
                generation=join.generation,
                rank=rank,
                world_size=len(ranks),
                store=self.store,
                at_most=None if join.restore.source == "start" else join.restore.step,
                sources=tuple(others.values()),
                holders=tuple(place for name, place in others.items() if rank in held.get(name, ())),
                skipped=skipped,
                high_step=high_step,
                verified=min(history.verified, join.restore.step),
            )
        return {**dict.fromkeys(fleet.node_of), **orders}

    def stored(self, fresh: bool = False) -> set[tuple[int, int]]:
        """The snapshots known to be whole in the store. The first call and one with `fresh` ask the store; others
        return the last answer and ask again in the background: a controller does not wait for a slow store.

        Raises:
            StoreError: the first call got no answer.
        """
        if self._stored is None:
            self._stored = self._look()
        elif fresh:
            self._refresh()
        elif self._looking is None or self._looking.done():
            if self._looking is not None:
                try:
                    self._stored = self._looking.result()
                except StoreError as error:
                    log.warning("%s; what it has is asked again", error)
            self._looking = self._looker.submit(self._look)
        return self._stored

    def _refresh(self) -> None:
        try:
            self._stored = self._look()
        except StoreError as error:
            log.warning("%s; what it has is not known now", error)

    def _look(self) -> set[tuple[int, int]]:
        """(generation, step) from the names of manifests, see engines.snapshots.flush."""
        found = set()
        for key in self._snapshots.list(f"snapshots/{self.group}/manifests"):
            generation, _, step = key.rpartition("/")[2].partition("-")
            if generation.isdigit() and step.isdigit():
                found.add((int(generation), int(step)))
        return found

    def _replica_places(self, fleet: Fleet, nodes: set[str]) -> dict[str, ReplicaPlace]:
        """The replica servers of live nodes; none if there is only one node."""
        living = nodes & fleet.agents.keys()
        if len(living) < 2:
            return {}
        known = {node: found for node, found in self._places.items() if found[0] is fleet.agents.get(node)}
        asked = {node: fleet.agents[node].replica_server.remote() for node in living - known.keys()}
        for node, reference in asked.items():
            try:
                known[node] = fleet.agents[node], ray.get(reference, timeout=ANSWER_S)
            except ray.exceptions.RayError:
                continue  # it is lost, which a beat will show; a rank without replicas trains on
        self._places = known
        return {node: place for node, (_, place) in known.items() if node in living}
