"""A group's Ray actors: its workers, one agent per node, and the messages of both.

Who waits for whom: `wait` waits for the next message of any agent or of any starting worker; every other call only
sends. Workers and agents are detached and named by their group, so that a later controller finds them; agents end their
node's workers and themselves if the run has ended or no controller comes for long (see cluster.node.agent).
"""

import contextlib
import logging
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, NodeLabelSchedulingStrategy, NotIn

from cluster.core.history import Superseded
from cluster.node.agent import AgentPlace, AgentSettings, NodeAgent
from cluster.node.host_memory import group_folder
from cluster.node.rank_watch import Beat
from cluster.workers.named_actors import NAMESPACE, agent_name, end_agents, end_pending, end_workers, worker_name
from cluster.workers.ray_errors import name_fault
from infra.addresses import unreachable
from infra.capacity import show_bundle, unplaceable
from infra.errors import ResourceError

log = logging.getLogger(__name__)

BEAT_S = 0.4
"""Longest silence of a living agent."""
PROBE_S = 0.5
"""How long a raylet's port may take to accept a connection before its node counts as gone."""
BACK_S = 0.1
"""The same for lost nodes, which are all asked again at the same time."""
AGENT_STARTS = 3
"""A node where this many agents in a row did not start cannot be used."""
CALLS = 8
"""Threads of an actor: a call that takes long (a kill with its stacks) must not delay the others."""


@dataclass(frozen=True)
class AgentLost:
    """An agent's process has ended. `node_lives`: its node is alive, and another agent can be started there."""

    node: str
    node_lives: bool
    reason: str


@dataclass(frozen=True)
class Started:
    """A worker's process answers."""

    worker: str
    node: str


@dataclass(frozen=True)
class StartFailed:
    """A worker did not start."""

    worker: str
    error: Exception
    is_death: bool


News = Beat | AgentLost | Started | StartFailed


@dataclass(frozen=True)
class WorkerKind:
    """How workers are made: `actor_class(name, group, when it was ordered, *arguments)`, with a beacon and with
    `describe() -> (pid, node id)`."""

    actor_class: type
    arguments: Sequence[Any] = ()
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory: int = 0
    spread: bool = False
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def bundle(self) -> dict[str, float]:
        amounts = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": float(self.memory)}
        return {resource: amount for resource, amount in amounts.items() if amount > 0}


class Fleet:
    """The processes of one group.

    Args:
        group: its name, unique in the cluster.
        agent_class: cluster.node.agent.NodeAgent or a subclass.
        settings: of the agents; `settings.leader` is the number of this fleet's controller.
        nodes_come: the cluster may add nodes by itself.
    """

    def __init__(
        self,
        group: str,
        kind: WorkerKind,
        agent_class: type[NodeAgent] = NodeAgent,
        settings: AgentSettings | None = None,
        *,
        nodes_come: bool = False,
    ) -> None:
        self.group, self.kind, self.agent_class = group, kind, agent_class
        self.settings, self.nodes_come = settings or AgentSettings(), nodes_come
        self.agents: dict[str, Any] = {}
        self.node_of: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        self._numbers: dict[str, int] = {}
        self._opened: dict[str, float] = {}
        self._listening: dict[Any, str] = {}
        self._starting: dict[Any, str] = {}
        self._sent: list[Any] = []
        self._lost: set[str] = set()
        self._failed_starts: dict[str, int] = {}

    # ---- nodes

    def folder(self, node: str) -> Path:
        """The group's folder in a node's shared memory."""
        return group_folder(node, self.group)

    def open_agents(self) -> list[str]:
        """Start an agent on every live node that could hold a worker; returns the nodes that had none before."""
        alive = [node for node in ray.nodes() if node["Alive"]]
        found = [node for node in alive if _could_hold(node["Resources"], self.kind.bundle)]
        living = tuple(node["NodeID"] for node in alive)
        known = self.agents.keys() | self._lost
        new = [node["NodeID"] for node in found if node["NodeID"] not in known]
        for node in new:
            self.open_agent(node, living)
        return new

    def open_agent(self, node: str, living: tuple[str, ...] | None = None) -> None:
        """Find this group's agent on a node, or start one."""
        if living is None:
            living = tuple(one["NodeID"] for one in ray.nodes() if one["Alive"])
        place = AgentPlace(self.group, node, self.folder(node), self.settings, living, end_pending)
        agent = (
            ray.remote(self.agent_class)
            .options(
                name=agent_name(self.group, node),
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=CALLS,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(place)
        )
        self.agents[node] = agent
        self._numbers[node] = 0
        self._opened[node] = time.monotonic()

    def lose_node(self, node: str) -> None:
        """Treat the node as gone, even if Ray takes some seconds to notice: its name never comes back."""
        self._lost.add(node)
        self._drop_agent(node)

    def look_for_lost(self) -> None:
        """Ask the agents of lost nodes again if Ray has not given the node up and its raylet takes connections: a link
        may have been cut and healed. An agent that answers with a beat is back; see `regain_node`."""
        if not (away := self._lost - self.agents.keys()):
            return
        found = [one for one in ray.nodes() if one["Alive"] and one["NodeID"] in away]
        places = {(one["NodeManagerAddress"], one["NodeManagerPort"]): one["NodeID"] for one in found}
        for place in places.keys() - unreachable(places, BACK_S).keys():
            self.open_agent(places[place])

    def regain_node(self, node: str) -> None:
        """The node was not gone after all."""
        self._lost.discard(node)

    def unanswered(self, after_s: float) -> list[str]:
        """Nodes whose agent was started this long ago and has not answered since."""
        now = time.monotonic()
        return [node for node in self.agents if not self._numbers[node] and now - self._opened[node] > after_s]

    def address(self, node: str) -> str:
        """A node's address in Ray."""
        return next((str(one["NodeManagerAddress"]) for one in ray.nodes() if one["NodeID"] == node), "?")

    def _drop_agent(self, node: str) -> None:
        self.agents.pop(node, None)
        self._listening = {reference: other for reference, other in self._listening.items() if other != node}

    def refuse_impossible(self, count: int) -> None:
        """Raises ResourceError if the cluster can never hold `count` workers."""
        if self.nodes_come:
            return
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if why := unplaceable([self.kind.bundle] * count, "PACK", nodes):
            asked = f"{count} ranks x ({show_bundle(self.kind.bundle)})"
            raise ResourceError(f"group {self.group} asks for {asked}, but {why}")

    # ---- workers

    def spawn(self, workers: Iterable[str], avoid: Collection[str]) -> None:
        """Start workers; `wait` reports each when it answers or could not start."""
        kind = self.kind
        strategy: Any = "SPREAD" if kind.spread else "DEFAULT"
        if avoid:
            strategy = NodeLabelSchedulingStrategy(hard={"ray.io/node-id": NotIn(*sorted(avoid))})
        for worker in workers:
            handle: Any = (
                ray.remote(kind.actor_class)
                .options(
                    name=worker_name(self.group, worker),
                    namespace=NAMESPACE,
                    lifetime="detached",
                    num_cpus=kind.num_cpus,
                    num_gpus=kind.num_gpus,
                    memory=kind.memory or None,
                    max_restarts=0,
                    max_task_retries=0,
                    max_concurrency=CALLS,
                    scheduling_strategy=strategy,
                    runtime_env={"env_vars": dict(kind.env)},
                )
                .remote(worker, self.group, time.time(), *kind.arguments)
            )
            self._handles[worker] = handle
            self._starting[handle.describe.remote()] = worker

    def adopt(self, worker: str, node: str) -> bool:
        """Take over a worker that an earlier controller started."""
        self.node_of[worker] = node
        if worker not in self._handles:
            try:
                self._handles[worker] = ray.get_actor(worker_name(self.group, worker), namespace=NAMESPACE)
            except ValueError:
                return False
        return True

    def tell(self, worker: str, method: str, *arguments: Any) -> None:
        """Call a worker without waiting; its beacon will show the outcome."""
        if worker in self._handles:
            self._sent.append(getattr(self._handles[worker], method).remote(*arguments))
            del self._sent[:-1000]

    def ask(self, worker: str, method: str, *arguments: Any, timeout_s: float = 30.0) -> Any:
        """Call a worker and wait for its answer."""
        return ray.get(getattr(self._handles[worker], method).remote(*arguments), timeout=timeout_s)

    def kill(self, workers: Collection[str], reason: str) -> list[Any]:
        """SIGKILL workers after taking their stacks; returns references to {worker: location of its stacks}."""
        references = []
        for node, mine in self._by_node(workers).items():
            if node in self.agents:
                references.append(self.agents[node].kill.remote(sorted(mine), reason, self.settings.leader))
        self._forget(worker for worker in workers if worker not in self.node_of)
        return references

    def dismiss(self, workers: Collection[str]) -> None:
        """End workers that are no longer needed."""
        self._forget(workers)

    def bury(self, node: str, workers: Collection[str]) -> None:
        """Let a node's agent forget dead workers that the controller knows of."""
        self._sent.append(self.agents[node].discard.remote(sorted(workers), self.settings.leader))
        self._forget(workers)

    def close(self, remove: bool, timeout_s: float = 15.0) -> None:
        """End every process; `remove` frees the group's memory."""
        for worker in list(self._handles):
            with contextlib.suppress(Exception):  # it may have ended already
                ray.kill(self._handles[worker], no_restart=True)
        closing = [agent.close.remote(remove, self.settings.leader) for agent in self.agents.values()]
        ray.wait(closing, num_returns=len(closing), timeout=timeout_s) if closing else None
        for agent in self.agents.values():
            with contextlib.suppress(Exception):
                ray.kill(agent, no_restart=True)
        self.agents.clear()
        self._handles.clear()
        with contextlib.suppress(Exception):  # the cluster may be shutting down
            end_workers(self.group)
            end_agents(self.group, self._lost)

    # ---- listening

    def wait(self, timeout_s: float, rows: Callable[[str], tuple[int, int]]) -> list[News]:
        """The next messages, or none after `timeout_s`. `rows(node)`: the rows to ask for, (first step, floor)."""
        listening = set(self._listening.values())
        for node, agent in self.agents.items():
            if node not in listening:
                wanted = self._numbers[node], BEAT_S, *rows(node)
                self._listening[agent.listen.remote(*wanted, self.settings.leader)] = node
        pending = [*self._listening, *self._starting]
        if not pending:
            time.sleep(timeout_s)
            return []
        ready, _ = ray.wait(pending, num_returns=1, timeout=timeout_s)
        return [self._heard(reference) for reference in ready]

    def _heard(self, reference: Any) -> News:
        if reference in self._listening:
            node = self._listening.pop(reference)
            try:
                beat: Beat = ray.get(reference)
            except ray.exceptions.RayError as error:
                if isinstance(cause := getattr(error, "cause", None), Superseded):
                    raise cause from None
                reason = str(error).strip().splitlines()[-1]
                log.warning("agent of node %s: %s", node[:12], reason)
                with contextlib.suppress(Exception):  # usually it has ended already
                    ray.kill(self.agents[node], no_restart=True)
                self._drop_agent(node)
                return self._lost_agent(node, reason, at_start=getattr(error, "actor_init_failed", False))
            self._numbers[node] = beat.number
            self._failed_starts.pop(node, None)
            for sight in beat.sights:
                self.node_of[sight.worker] = node
            return beat
        worker = self._starting.pop(reference)
        try:
            _, node = ray.get(reference)
        except Exception as error:
            fault = name_fault(error, f"worker {worker} of group {self.group}")
            self._forget([worker])
            return StartFailed(worker, fault.error, fault.is_death)
        self.node_of[worker] = node
        return Started(worker, node)

    def _lost_agent(self, node: str, reason: str, at_start: bool) -> AgentLost:
        if not self.node_lives(node):
            return AgentLost(node, False, "its raylet is gone")
        self._failed_starts[node] = failed = self._failed_starts.get(node, 0) + at_start
        return AgentLost(node, failed < AGENT_STARTS, f"its agent does not start: {reason}")

    def node_lives(self, node: str) -> bool:
        """Whether a node's raylet still takes connections: a dead raylet refuses at once, a dead machine is silent.

        Ray itself needs 12 s or more to notice.
        """
        entry = next((one for one in ray.nodes() if one["NodeID"] == node), None)
        if entry is None or not entry["Alive"]:
            return False
        try:
            address = (entry["NodeManagerAddress"], entry["NodeManagerPort"])
            with socket.create_connection(address, timeout=PROBE_S):
                return True
        except OSError:
            return False

    def _by_node(self, workers: Iterable[str]) -> dict[str, set[str]]:
        found: dict[str, set[str]] = defaultdict(set)
        for worker in workers:
            if worker in self.node_of:
                found[self.node_of[worker]].add(worker)
        return found

    def _forget(self, workers: Iterable[str]) -> None:
        """Forget workers; Ray ends a process that has no beacon yet."""
        for worker in list(workers):
            handle = self._handles.pop(worker, None)
            self.node_of.pop(worker, None)
            if handle is not None:
                with contextlib.suppress(Exception):
                    ray.kill(handle, no_restart=True)


def _could_hold(resources: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0.0) >= amount for name, amount in bundle.items())
