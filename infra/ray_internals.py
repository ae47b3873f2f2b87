"""Every use of Ray's private API, in one file: check it with each new version of Ray (now 2.60).

The module `ray` is an argument, because nothing in `infra` imports it.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from infra import setup_worker

MOST_TASKS = 1 << 30
"""Ray counts a worker process's runs of a function, and ends a process that has reached this limit."""


SPARE = {"dashboard": "start_api_server", "autoscaler": "start_monitor", "log_monitor": "start_log_monitor"}
"""Servers that a Ray of one machine can do without, and what starts each."""


@contextlib.contextmanager
def few_servers(ray: Any, keep: tuple[str, ...] = ()) -> Iterator[None]:
    """A Ray that starts within has no spare servers except those to `keep`: no autoscaler, which has no node to add; no
    log monitor, which only `log_to_driver` needs; no dashboard, which `include_dashboard=False` starts all the same,
    and waits for. That halves what a start takes."""
    node = ray._private.node.Node
    starts = {name: getattr(node, name) for server, name in SPARE.items() if server not in keep}
    try:
        for name in starts:
            setattr(node, name, lambda *_, **__: None)
        with quick_starts(ray):
            yield
    finally:
        for name, start in starts.items():
            setattr(node, name, start)


@contextlib.contextmanager
def quick_starts(ray: Any) -> Iterator[None]:
    """The nodes of a Ray that starts within start their worker processes with `infra.setup_worker`."""
    constants = ray._private.ray_constants
    name = constants.SETUP_WORKER_FILENAME
    try:
        constants.SETUP_WORKER_FILENAME = setup_worker.__file__  # joined to a folder, an absolute path stays as it is
        yield
    finally:
        constants.SETUP_WORKER_FILENAME = name


def own_worker(ray: Any) -> Any:
    """Ray's client in this process, with its node and threads."""
    return ray._private.worker.global_worker


def raylet_socket(ray: Any) -> str | None:
    """The socket of the raylet that this process is connected to; None if it is not connected."""
    name = getattr(own_worker(ray).node, "raylet_socket_name", None)
    return name if ray.is_initialized() else None


def end_after_this_task(ray: Any) -> None:
    """Let Ray end this worker process once the running task's result is sent. Its owner does not count that as a
    failure and sends no other task here."""
    runs = own_worker(ray).function_actor_manager._num_task_executions
    runs.update(dict.fromkeys(runs, MOST_TASKS - 1))


def draining_nodes(ray: Any) -> dict[str, float]:
    """Nodes that Ray drains (`ray drain-node`, an autoscaler, or a hook before a pod stops): {node id: deadline in
    seconds since the epoch, infinite if none was given}.

    Ray shows a drain 3 to 7 ms after the request. The deadline is advisory: Ray itself ends nothing then.
    """
    drained: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return {node: milliseconds / 1000 if milliseconds else math.inf for node, milliseconds in drained.items()}


def pending_actors(ray: Any) -> list[str]:
    """Names of the actors that wait for resources."""
    waiting = ray._private.state.state.actor_table(None, None, "PENDING_CREATION")
    return [str(actor["Name"]) for actor in waiting.values()]


def has_ended(ray: Any, job: str) -> bool:
    """Whether the driver of a job has ended; Ray's head knows within a second. The public API needs the dashboard,
    which may not run."""
    return any(entry["JobID"] == job and entry["IsDead"] for entry in ray._private.state.jobs())


def serve_controller(ray: Any) -> Any:
    """The controller actor of Ray Serve.

    Raises:
        ValueError: Serve is not running.
    """
    names = ray.serve._private.constants
    return ray.get_actor(names.SERVE_CONTROLLER_NAME, namespace=names.SERVE_NAMESPACE)
