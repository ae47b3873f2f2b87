"""The executor's side of Ray: connect, check requests, submit attempts, cancel them.

Ray is imported when the first attempt must run: showing a finished run or a plan needs none. Ray never retries a step
(`max_retries=0`): a retry is the executor's decision.
"""

import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from infra.capacity import unplaceable
from infra.errors import ResourceError, StoreError
from infra.local_ray import LocalRay, RayServers, connect
from infra.machine import require_ray_token
from infra.ray_internals import MOST_TASKS, draining_nodes
from infra.storage import Store
from workflows.driver.settings import RunSettings
from workflows.graph.gangs import GangAttempt, Gangs
from workflows.graph.steps import StepOptions
from workflows.identity.names import import_roots
from workflows.worker.batch import bootstrap

NODES_AGE_S = 5.0
"""Seconds after which the list of a cluster's nodes is read again."""
JOINING = ("namespace", "runtime_env")
"""Arguments of ray.init that belong to the job; the others belong to the cluster."""
PREEMPTED = 3
"""AUTOSCALER_DRAIN_PREEMPTED of NodeDeathInfo.Reason in Ray's common.proto: a node's DeathReason."""
NODE_DIED = {"NodeDiedError", "LocalRayletDiedError"}
Done = Callable[[bytes | None, BaseException | None], None]


class RayTasks:
    """Attempts on Ray. Used only from the executor's loop thread, except `close`. It owns a Ray that it starts itself;
    see infra.local_ray for `on_lost`, `on_back` and `on_error`."""

    def __init__(
        self,
        settings: RunSettings,
        store: Store,
        on_lost: Callable[[str], None],
        on_back: Callable[[], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._settings = settings
        self._store = store
        self._on_lost = on_lost
        self._on_back = on_back
        self._on_error = on_error
        self._ray: Any = None
        self._joined = False
        self._local: LocalRay | None = None
        self._nodes: list[dict[str, float]] = []
        self._nodes_at = float("-inf")
        self._body: Callable[[bytes], bytes] | None = None
        self._gangs: Gangs | None = None
        self._tasks: dict[tuple[str, float, float, int | None], Any] = {}  # by step ("": none), and what it asks for

    def start(self) -> str:
        """Connect (once), refuse a store that other nodes cannot see, and return this driver's address for workers.

        Raises:
            ConfigError: no cluster at the address.
            SystemFault: a local Ray did not start in time.
            StoreError: a folder store that another node cannot see.
        """
        if self._ray is None:
            import ray

            address = self._settings.ray_address or os.environ.get("RAY_ADDRESS")
            if not ray.is_initialized() and address and address != "local":
                options = {name: value for name, value in self._settings.ray_options.items() if name in JOINING}
                require_ray_token(address, "ray_address")
                connect(ray, f"ray_address={address}", address=address, **options)
                self._joined = True
            elif not ray.is_initialized():
                self._local = LocalRay(
                    RayServers(ray, self._settings.ray_options),
                    self._settings.local_ray_restarts,
                    self._settings.retry_window_s,
                    "run",
                    "Committed steps stay: run it again to resume",
                    self._on_lost,
                    self._on_back,
                    self._on_error,
                )
            self._ray = ray
            self._check_visible()
        return str(self._ray.util.get_node_ip_address())

    def prepare(self, run: str) -> None:
        """Set the data that all attempts of this run share, a JSON object."""
        self._body = bootstrap(import_roots(), run)

    def check(self, call_id: str, options: StepOptions) -> str | None:
        """Refuse a request that no node of this cluster can ever meet. With `wait_for_nodes`, return a text instead,
        because an autoscaler may add nodes; None if the present nodes suffice.

        Raises:
            ResourceError: the message names the call, the setting and the largest available amount.
        """
        why = self._lacking(options)
        if why is not None and not self._settings.wait_for_nodes:
            raise ResourceError(f"{call_id} {why}")
        return why

    def _lacking(self, options: StepOptions) -> str | None:
        """Why the present nodes can never give it, all of them empty."""
        if (gang := options.whole_gang()) is not None:
            short = unplaceable(gang.bundles, gang.strategy, self.nodes())
            return short and f"asks for gang={gang}, but {short}: ask for less, or add nodes"
        wanted = {"CPU": options.num_cpus, "GPU": options.num_gpus, "memory": float(options.memory or 0)}
        nodes = self.nodes()
        if any(all(node.get(name, 0.0) >= amount for name, amount in wanted.items()) for node in nodes):
            return None
        settings = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        for name, amount in wanted.items():
            most = max((node.get(name, 0.0) for node in nodes), default=0.0)
            if amount > most:
                return (
                    f"asks for {settings[name]}={_shown(name, amount)}, but no node has more than "
                    f"{_shown(name, most)}: lower {settings[name]} of the step, or add a larger node"
                )
        return (
            f"asks for num_cpus={options.num_cpus:g}, num_gpus={options.num_gpus:g}, "
            f"memory={_shown('memory', wanted['memory'])}, and no single node has all of them"
        )

    def at_once(self, options: StepOptions) -> int:
        """The number of bodies that request only CPUs that the present nodes, all empty, run at the same time."""
        return sum(int(node.get("CPU", 0.0) / options.num_cpus) for node in self.nodes())

    def submit(self, call_id: str, step: str, options: StepOptions, payload: bytes, done: Done) -> Any:
        """Start one task with one or several attempts. `done(outcomes, error)` is called once, on one of Ray's threads.
        Ray shows the task under the name of its step."""
        resources = (options.num_cpus, options.num_gpus, options.memory)
        if (gang := options.whole_gang()) is not None:
            if self._gangs is None:
                self._gangs = Gangs(self._ray, self.is_lost)
            return self._gangs.submit(call_id, gang, self._task(*resources), (payload,), done)
        reference = self._named_task(step, *resources).remote(payload)

        def ended(future: Any) -> None:
            error = future.exception()
            done(None if error else future.result(), error)

        reference.future().add_done_callback(ended)
        return reference

    def cancel(self, reference: Any) -> None:
        """Kill the attempt's worker process (its reaper ends what it started)."""
        if self.is_lost():
            return
        if isinstance(reference, GangAttempt):
            reference.cancel()
            return
        with contextlib.suppress(Exception):  # it may have ended by itself
            self._ray.cancel(reference, force=True, recursive=True)

    def everywhere(self, function: Callable[[Any], Any], argument: Any, answer: Callable[[Any], None]) -> None:
        """Call `function(argument)` on every node, without resources, and `answer` with each result, on one of Ray's
        threads. Nodes that leave give no result."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = self._ray.remote(num_cpus=0, max_retries=0)(function)

        def ended(future: Any) -> None:
            if future.exception() is None:
                answer(future.result())

        for node in self._ray.nodes():
            if node["Alive"]:
                where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                reference = task.options(scheduling_strategy=where, name=function.__name__).remote(argument)
                reference.future().add_done_callback(ended)

    def was_preempted(self, error: BaseException) -> bool:
        """Whether the node that Ray's error names ended after a notice of preemption, which Ray's text does not say.

        A broken connection reveals the loss 10 s or more before Ray gives the node up and says why; until then the node
        is listed as draining. (Ray refuses a drain for another reason while a node has work.)
        """
        if self.is_local:
            return False
        named = re.search(r"node ID: ([0-9a-f]+)", str(error))
        if named is None:
            return False
        if named.group(1) in draining_nodes(self._ray):
            return True
        reasons = [node.get("DeathReason") for node in self._ray.nodes() if node["NodeID"] == named.group(1)]
        return PREEMPTED in reasons

    @property
    def is_local(self) -> bool:
        """Whether this run started its Ray, which no other driver uses."""
        return self._local is not None

    def is_lost(self) -> bool:
        """Whether the run's own Ray is lost and its successor does not run yet: no thread may call Ray."""
        return self._local is not None and self._local.is_lost()

    def judge(self, error: BaseException) -> None:
        """The node of an attempt is lost, by Ray's error: where that is the only one of a Ray of our own, and Ray has
        given it up though its processes are there (a stopped raylet), this Ray is of no more use. (A raylet that leaves
        by itself is given up a moment before it ends: by the time Ray answers, it may be another Ray that runs.)"""
        if self._local is None or type(error).__name__ not in NODE_DIED:
            return
        count = self._local.count
        if self._local.is_lost():
            return
        try:
            has_a_node = any(node["Alive"] for node in self._ray.nodes())
        except Exception:  # it ended while it was asked
            return
        if not has_a_node:
            self._local.condemn("it has given up its only node", count)

    def leave(self) -> None:
        """The run is ending: do not restart a local Ray that dies."""
        if self._local is not None:
            self._local.leave()

    def close(self) -> None:
        """Disconnect from the cluster; shut down a local Ray that this run started."""
        if self._gangs is not None:
            self._gangs.close()
        if self._local is not None:
            self._local.close()
        elif self._joined:
            self._ray.shutdown()

    def _task(self, num_cpus: float, num_gpus: float, memory: int | None) -> Any:
        asked = ("", num_cpus, num_gpus, memory)
        if asked not in self._tasks:
            self._tasks[asked] = self._new_task(num_cpus, num_gpus, memory)
        return self._tasks[asked]

    def _new_task(self, num_cpus: float, num_gpus: float, memory: int | None) -> Any:
        assert self._body is not None, "prepare() comes first"
        resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        if not num_gpus:  # with GPUs Ray ends the process after every task
            resources["max_calls"] = MOST_TASKS
        if memory is not None:
            resources["memory"] = memory
        return self._ray.remote(max_retries=0, retry_exceptions=False, **resources)(self._body)

    def _named_task(self, step: str, num_cpus: float, num_gpus: float, memory: int | None) -> Any:
        """Kept: Ray makes a class wherever options are given, which takes a quarter of a submission and 10 KB that only
        the garbage collector gets back."""
        asked = (step, num_cpus, num_gpus, memory)
        if asked not in self._tasks:
            self._tasks[asked] = self._task(num_cpus, num_gpus, memory).options(name=step)
        return self._tasks[asked]

    def nodes(self) -> list[dict[str, float]]:
        """What each live node has in all, by Ray's names: {"CPU": 2.0, "memory": 9e9, ...}. A Ray of our own keeps its
        one node as long as it lives."""
        age = time.monotonic() - self._nodes_at
        if age > NODES_AGE_S and not (self._nodes and self.is_local):
            self._nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self._nodes_at = time.monotonic()
        return self._nodes

    def look_again(self) -> None:
        """Forget the nodes of a lost Ray."""
        self._nodes, self._nodes_at = [], float("-inf")

    def _check_visible(self) -> None:
        """Check that all nodes share a folder store: every node must read a file that this driver just wrote."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        if len(nodes) < 2 or self._store.local_path("probe") is None:
            return
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        def sees(path: str) -> bool:
            import os

            return os.path.exists(path)

        key = f"probe/{uuid.uuid4().hex}"
        self._store.put(key, b"visible?")
        try:
            task = self._ray.remote(num_cpus=0, max_retries=0)(sees)
            where = {node["NodeID"]: NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes}
            path = str(self._store.local_path(key))
            answers = {name: task.options(scheduling_strategy=how).remote(path) for name, how in where.items()}
            for node in nodes:
                try:
                    seen = self._ray.get(answers[node["NodeID"]], timeout=60)
                except Exception:  # the node has left meanwhile, and need not see the store
                    continue
                if not seen:
                    raise StoreError(
                        f"--store {self._store.url}: node {node['NodeManagerAddress']} does not see this folder; "
                        "use a folder that all nodes share, or --store s3://bucket/prefix"
                    )
        finally:
            self._store.delete(key)


def _shown(name: str, amount: float) -> str:
    return f"{amount / (1 << 30):.3g}GiB" if name == "memory" else f"{amount:g}"
