"""A group of N ranks as Ray actors on a placement group, under one generation.

Who waits for whom: the owner waits for the workers (`run`, `stream`), never the other way round. Workers wait for each
other only inside their own collectives; when one dies, the owner hears it from Ray (about 15 ms for a process) and
raises a `SystemFault` at once, without waiting for the survivors' collectives to time out. The group then counts as
broken: `shutdown` it and start a new one with the next generation.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.workers.ray_errors import name_fault
from cluster.workers.seat import Seat, Worker, WorkerInfo
from infra.bundles import show_bundle, unplaceable
from infra.errors import ResourceError, StepTimeout, SystemFault
from infra.processes import process_start

log = logging.getLogger(__name__)

DYING_S = 10.0
"""What the kernel may take to end a process that got SIGKILL."""
DEATH_GRACE_S = 1.0
"""How long a rank's ordinary error waits for the death that may have caused it (survivors of a dead rank raise too)."""


class WorkerGroup:
    """N ranks of `actor_class` (a plain subclass of `cluster.workers.seat.Worker`).

    Args:
        actor_class: built with `actor_args` and `actor_kwargs` in every process.
        world_size: number of ranks.
        num_cpus, num_gpus, memory: per rank; memory in bytes, 0 = not reserved.
        strategy: Ray placement: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.
        env: environment variables of every worker process, e.g. {"OMP_NUM_THREADS": "1"}.
        name: prefix of the actors' and the placement group's names. They are unique among live groups; a placement
            group of the same name and an older owner is removed first, so that a restarted owner gets its resources.
        generation: counts the lives of this group under one owner.
        placement: a placement group to live in (a step's `context().placement_group()`), which its owner removes; else
            the ranks get one of their own.
        start_timeout_s: until the placement group is ready, and again until all workers have answered.

    Use it as a context manager, or call `start` and `shutdown`.
    """

    def __init__(
        self,
        actor_class: type[Worker],
        world_size: int,
        *,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        memory: int = 0,
        strategy: str = "PACK",
        env: Mapping[str, str] | None = None,
        name: str = "group",
        generation: int = 0,
        placement: PlacementGroup | None = None,
        start_timeout_s: float = 120.0,
        actor_args: Sequence[Any] = (),
        actor_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, not {world_size}")
        self.actor_class, self.world_size, self.generation, self.name = actor_class, world_size, generation, name
        self.strategy, self.start_timeout_s = strategy, start_timeout_s
        self.env = {"OMP_NUM_THREADS": str(max(1, int(num_cpus))), **(env or {})}
        self.actor_args, self.actor_kwargs = tuple(actor_args), dict(actor_kwargs or {})
        self.bundle = {"CPU": num_cpus, "GPU": num_gpus, "memory": float(memory)}
        self.bundle = {resource: amount for resource, amount in self.bundle.items() if amount > 0}
        self.workers: list[Any] = []
        self.infos: list[WorkerInfo] = []
        self._given = placement
        self._placement: PlacementGroup | None = None

    def __enter__(self) -> "WorkerGroup":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def start(self) -> "WorkerGroup":
        """Reserve, spawn, wait until every process answers, then seat them all under this generation.

        Raises:
            ResourceError: the cluster can never give this many ranks of this size.
            StepTimeout: it could, but did not within `start_timeout_s`.
            SystemFault: a worker died while starting. A user's error in the constructor raises as StepError.
        """
        try:
            if self._given is None:
                self._placement = self._reserve()
            home, bundles = self._placement or self._given, range(self.world_size)
            assert home is not None
            self.workers = [self._spawn(home, index, index if self._placement else -1) for index in bundles]
            self.infos = self._gather("describe", [() for _ in self.workers], timeout_s=self.start_timeout_s)
            self._order_by_node()
            port = self.run_on(0, "reserve_port")
            self._gather("join", [(seat,) for seat in self._seats(port)], timeout_s=self.start_timeout_s)
        except BaseException:
            self.shutdown()
            raise
        log.info("group %s generation %d: %d ranks up", self.name, self.generation, self.world_size)
        return self

    def run(self, method: str, *args: Any, per_rank: Sequence[tuple] | None = None, **kwargs: Any) -> list[Any]:
        """Call `method` on every rank and return the results in rank order.

        Rank r gets `*per_rank[r], *args, **kwargs`. The first failure of any rank is raised at once.

        Raises:
            NodeLost, Preempted, OutOfMemory: a worker died.
            RecuaError: what the method itself raised, if it was one of ours; any other error arrives as StepError.
        """
        rank_args = per_rank if per_rank is not None else [()] * self.world_size
        if len(rank_args) != self.world_size:
            raise ValueError(f"per_rank has {len(rank_args)} entries for {self.world_size} ranks")
        return self._gather(method, [(*own, *args) for own in rank_args], kwargs)

    def run_on(self, rank: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call `method` on one rank only."""
        reference = getattr(self.workers[rank], method).remote(*args, **kwargs)
        return self._collect({reference: rank}, None)[rank]

    def stream(self, method: str, *args: Any, **kwargs: Any) -> Iterator[tuple[int, Any]]:
        """Call a generator `method` on every rank; yield (rank, value) as values appear, until all ranks ended.

        The workers do not wait for the reader. Failures as in `run`, at once, even with values still unread.
        """
        streams: dict[Any, int] = {
            getattr(worker, method).options(num_returns="streaming").remote(*args, **kwargs): rank
            for rank, worker in enumerate(self.workers)
        }
        while streams:
            ready, _ = ray.wait(list(streams), num_returns=1)
            source: Any = ready[0]
            rank = streams[source]
            try:
                value = ray.get(next(source))
            except StopIteration:
                del streams[source]
                continue
            except Exception as error:
                del streams[source]
                raise self._explain(rank, error, streams) from error
            yield rank, value

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

    def _gather(
        self,
        method: str,
        rank_args: Sequence[tuple],
        kwargs: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> list[Any]:
        pending = {
            getattr(worker, method).remote(*own, **(kwargs or {})): rank
            for rank, (worker, own) in enumerate(zip(self.workers, rank_args, strict=True))
        }
        values = self._collect(pending, timeout_s)
        return [values[rank] for rank in range(self.world_size)]

    def _collect(self, pending: dict[Any, int], timeout_s: float | None) -> dict[int, Any]:
        values: dict[int, Any] = {}
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while pending:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=remaining)
            if not ready:
                ranks = sorted(pending.values())
                raise StepTimeout(f"group {self.name}: ranks {ranks} did not answer within {timeout_s:g} s")
            rank = pending.pop(ready[0])
            try:
                values[rank] = ray.get(ready[0])
            except Exception as error:
                raise self._explain(rank, error, pending) from error
        return values

    def _explain(self, rank: int, error: Exception, others: Mapping[Any, int]) -> Exception:
        """Name the first cause: a rank that raised because a neighbour died is not it."""
        fault = name_fault(error, self._label(rank))
        if fault.is_death:
            return fault.error
        waiting = dict(others)
        deadline = time.monotonic() + DEATH_GRACE_S
        while waiting and (remaining := deadline - time.monotonic()) > 0:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=remaining)
            for reference in ready:
                death = self._death_in(reference, waiting.pop(reference))
                if death is not None:
                    return death
        return fault.error

    def _death_in(self, reference: Any, rank: int) -> SystemFault | None:
        try:
            while True:
                ray.get(next(reference) if hasattr(reference, "__next__") else reference)
                if not hasattr(reference, "__next__"):
                    return None
        except StopIteration:
            return None
        except Exception as error:
            fault = name_fault(error, self._label(rank))
            return fault.error if fault.is_death and isinstance(fault.error, SystemFault) else None

    def _label(self, rank: int) -> str:
        where = f" (pid {self.infos[rank].pid} on {self.infos[rank].address})" if rank < len(self.infos) else ""
        return f"rank {rank} of group {self.name}, generation {self.generation}{where}"

    def _reserve(self) -> PlacementGroup:
        self._refuse_impossible()
        name = f"{self.name}/placement"
        for identity, entry in placement_group_table().items():
            if entry["name"] == name and entry["state"] != "REMOVED":
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identity))))
        reserved = placement_group([self.bundle] * self.world_size, strategy=self.strategy, name=name)
        if not reserved.wait(self.start_timeout_s):
            remove_placement_group(reserved)
            raise StepTimeout(
                f"group {self.name}: {self.world_size} x {self.bundle} were not free within {self.start_timeout_s:g} s "
                f"(available now: {_amounts(ray.available_resources(), self.bundle)})"
            )
        return reserved

    def _refuse_impossible(self) -> None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if why := unplaceable([self.bundle] * self.world_size, self.strategy, nodes):
            asked = f"{self.world_size} ranks x ({show_bundle(self.bundle)}), {self.strategy}"
            raise ResourceError(f"group {self.name} asks for {asked}, but {why}")

    def _spawn(self, placement: PlacementGroup, index: int, bundle: int) -> Any:
        """Rank `index` in one bundle, or in any of them (-1)."""
        scheduling = PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=bundle)
        remote_class = ray.remote(self.actor_class).options(
            num_cpus=self.bundle.get("CPU", 0),
            num_gpus=self.bundle.get("GPU", 0),
            memory=self.bundle.get("memory"),
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=scheduling,
            runtime_env={"env_vars": self.env},
            name=f"{self.name}/generation-{self.generation}/worker-{index}",
        )
        return remote_class.remote(*self.actor_args, **self.actor_kwargs)

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
                generation=self.generation,
                address=self.infos[rank].address,
                master_address=self.infos[0].address,
                master_port=port,
            )
            for rank, node in enumerate(nodes)
        ]


def _amounts(available: Mapping[str, float], wanted: Mapping[str, float]) -> str:
    return ", ".join(f"{available.get(resource, 0.0):g} {resource}" for resource in wanted)


def _await_exit(pid: int, start: str, deadline: float) -> None:
    """Wait until a process of this node is gone; one that outlives Ray's kill (stopped, stuck) gets SIGKILL."""
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
