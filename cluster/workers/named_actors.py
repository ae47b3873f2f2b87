"""The detached actors of a group, which any controller finds by name: GROUP/WORKER and GROUP/agent/NODE."""

import contextlib
from collections.abc import Iterable
from typing import Any

import ray

from infra.ray_internals import pending_actors

NAMESPACE = "recua"


def agent_name(group: str, node: str) -> str:
    return f"{group}/agent/{node}"


def worker_name(group: str, worker: str) -> str:
    return f"{group}/{worker}"


def end_workers(group: str) -> None:
    """End every worker of a group that Ray still knows."""
    for name in _names(group):
        if not name.startswith(agent_name(group, "")):
            _end(name)


def end_agents(group: str, nodes: Iterable[str]) -> None:
    """End the agents of lost nodes, which Ray may take for alive for a while."""
    for node in nodes:
        _end(agent_name(group, node))


def end_pending(group: str) -> None:
    """End the group's actors that wait for resources: they would start long after its end, without a controller."""
    for name in pending_actors(ray):
        if name.startswith(f"{group}/"):
            _end(name)


def end_group(group: str, leader: int, timeout_s: float = 15.0) -> None:
    """End agents and workers of controllers before number `leader`; the group's memory stays.

    Raises:
        Superseded: a later controller leads the group.
    """
    agents: list[Any] = []
    for name in _names(group):
        if name.startswith(agent_name(group, "")):
            with contextlib.suppress(ValueError):  # it has ended meanwhile
                agents.append(ray.get_actor(name, namespace=NAMESPACE))
    for closing in [agent.close.remote(False, leader) for agent in agents]:
        try:
            ray.get(closing, timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError:
            continue  # it is gone or stuck: its workers are ended below
    end_workers(group)
    for name in _names(group):
        _end(name)


def _names(group: str) -> list[str]:
    found = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in found if one["namespace"] == NAMESPACE and one["name"].startswith(f"{group}/")]


def _end(name: str) -> None:
    with contextlib.suppress(Exception):  # it has ended meanwhile
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
