"""N ranks as Ray actors on a placement group.

Who waits for whom: the owner waits for the workers (`cluster.workers.gather`), never the other way round. Workers wait
for each other only inside their own collectives. The group does not repair itself: if one rank dies, `shutdown` it and
start a new one.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.workers.gather import gather
from cluster.workers.seat import Seat, Worker, WorkerInfo
from infra.capacity import show_bundle, unplaceable
from infra.errors import ResourceError, StepTimeout
from infra.processes import process_start

log = logging.getLogger(__name__)

STRATEGY = "PACK"
"""Ray's placement strategy: as few nodes as possible."""
DYING_S = 10.0
"""Seconds that the kernel may take to end a process after SIGKILL."""


class WorkerGroup:
    """N ranks of `actor_class` (a plain subclass of `cluster.workers.seat.Worker`).

    Args:
        actor_class: built without arguments in every process.
        world_size: number of ranks.
        num_cpus, num_gpus: per rank.
        env: environment variables of every worker process, e.g. {"OMP_NUM_THREADS": "1"}.
        name: prefix of the actors' and the placement group's names, unique among live groups.
        start_timeout_s: limit for the placement group, and again for the answers of all workers.
    """

    def __init__(
        self,
        actor_class: type[Worker],
        world_size: int,
        *,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        env: Mapping[str, str] | None = None,
        name: str = "group",
        start_timeout_s: float = 120.0,
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, not {world_size}")
        self.actor_class, self.world_size = actor_class, world_size
        self.name, self.start_timeout_s = name, start_timeout_s
        self.env = {"OMP_NUM_THREADS": str(max(1, int(num_cpus))), **(env or {})}
        self.bundle = {"CPU": num_cpus, "GPU": num_gpus}
        self.bundle = {resource: amount for resource, amount in self.bundle.items() if amount > 0}
        self.workers: list[Any] = []
        self.infos: list[WorkerInfo] = []
        self._placement: PlacementGroup | None = None

    def start(self) -> "WorkerGroup":
        """Reserve resources, spawn, wait until every process answers, then seat them all.

        Raises:
            ResourceError: the cluster can never hold this many ranks of this size.
            StepTimeout: it could, but did not within `start_timeout_s`.
            SystemFault: a worker died while starting. A user's error in the constructor raises as StepError.
        """
        try:
            self._placement = self._reserve()
            self.workers = [self._spawn(self._placement, index) for index in range(self.world_size)]
            self.infos = self._gather([worker.describe.remote() for worker in self.workers])
            self._order_by_node()
            (port,) = self._gather([self.workers[0].reserve_port.remote()])
            seats = zip(self.workers, self._seats(port), strict=True)
            self._gather([worker.join.remote(seat) for worker, seat in seats])
        except BaseException:
            self.shutdown()
            raise
        log.info("group %s: %d ranks up", self.name, self.world_size)
        return self

    def shutdown(self, timeout_s: float = 10.0) -> None:
        """Kill every worker, wait until Ray confirms their deaths, return the resources. Safe to call twice."""
        workers, infos, self.workers, self.infos = self.workers, self.infos, [], []
        here = ray.get_runtime_context().get_node_id() if infos else ""
        starts = {info.pid: process_start(info.pid) for info in infos if info.node_id == here}
        for worker in workers:
            ray.kill(worker, no_restart=True)
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None
        deadline = time.monotonic() + timeout_s
        for pid, start in starts.items():
            if start is not None:
                _await_exit(pid, start, deadline)

    def _gather(self, references: Sequence[Any]) -> list[Any]:
        return gather(references, f"group {self.name}: rank", self.start_timeout_s)

    def _reserve(self) -> PlacementGroup:
        self._refuse_impossible()
        name = f"{self.name}/placement"
        reserved = placement_group([self.bundle] * self.world_size, strategy=STRATEGY, name=name)
        if not reserved.wait(self.start_timeout_s):
            remove_placement_group(reserved)
            raise StepTimeout(
                f"group {self.name}: {self.world_size} x {self.bundle} were not free within {self.start_timeout_s:g} s "
                f"(available now: {_amounts(ray.available_resources(), self.bundle)})"
            )
        return reserved

    def _refuse_impossible(self) -> None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if why := unplaceable([self.bundle] * self.world_size, STRATEGY, nodes):
            asked = f"{self.world_size} ranks x ({show_bundle(self.bundle)}), {STRATEGY}"
            raise ResourceError(f"group {self.name} asks for {asked}, but {why}")

    def _spawn(self, placement: PlacementGroup, index: int) -> Any:
        scheduling = PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=index)
        remote_class = ray.remote(self.actor_class).options(
            num_cpus=self.bundle.get("CPU", 0),
            num_gpus=self.bundle.get("GPU", 0),
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=scheduling,
            runtime_env={"env_vars": self.env},
            name=f"{self.name}/worker-{index}",
        )
        return remote_class.remote()

    def _order_by_node(self) -> None:
        first_seen: dict[str, int] = {}
        for info in self.infos:
            first_seen.setdefault(info.node_id, len(first_seen))
        order = sorted(range(self.world_size), key=lambda index: first_seen[self.infos[index].node_id])
        self.workers = [self.workers[index] for index in order]
        self.infos = [self.infos[index] for index in order]

    def _seats(self, port: int) -> list[Seat]:
        nodes = [info.node_id for info in self.infos]
        return [
            Seat(
                rank=rank,
                world_size=self.world_size,
                local_rank=nodes[:rank].count(node),
                local_world_size=nodes.count(node),
                address=self.infos[rank].address,
                master_address=self.infos[0].address,
                master_port=port,
            )
            for rank, node in enumerate(nodes)
        ]


def _amounts(available: Mapping[str, float], wanted: Mapping[str, float]) -> str:
    return ", ".join(f"{available.get(resource, 0.0):g} {resource}" for resource in wanted)


def _await_exit(pid: int, start: str, deadline: float) -> None:
    """Wait until a process of this node is gone; a process that outlives Ray's kill (stopped, stuck) gets SIGKILL."""
    killed = False
    while process_start(pid) == start:
        if not killed and time.monotonic() >= deadline:
            log.warning("worker process %d outlived its kill, sending SIGKILL", pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed = True
        if time.monotonic() >= deadline + DYING_S:
            return
        time.sleep(0.005)
