"""The code inside a worker process of a group: its seat in the group, nothing about its computation.

A worker starts on standby (process up, imports done). `join` gives it a seat. The owner of the group, not the worker,
decides about restarts. Workers are ordinary owned actors: Ray ends them when their owner dies.
"""

import os
import socket
from dataclasses import dataclass
from typing import Any, Self

import ray

from infra.telemetry import hide_secrets_in_logs


@dataclass(frozen=True)
class Seat:
    """One worker's place in a group, e.g. rank 1 of 2 on 10.0.0.5, rendezvous 10.0.0.4:38211.

    `local_rank` counts the group's workers on the same node; ranks of one node are contiguous. Another group has
    another rendezvous port, so that nothing of an older one can connect to it.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    master_address: str
    master_port: int

    def environment(self) -> dict[str, str]:
        """The variables that torch.distributed, DeepSpeed and others read for an `env://` rendezvous."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


@dataclass(frozen=True)
class WorkerInfo:
    """The place of a worker's process."""

    pid: int
    node_id: str
    address: str


class Worker:
    """Base of every actor class that a `WorkerGroup` starts. Subclasses are plain classes, not `@ray.remote` ones."""

    seat: Seat | None = None
    _held_port: socket.socket | None = None

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """This runs before any subclass's own set-up."""
        hide_secrets_in_logs()
        return super().__new__(cls)

    def describe(self) -> WorkerInfo:
        """Answers as soon as the process is up and the class is imported."""
        return WorkerInfo(os.getpid(), ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())

    def reserve_port(self) -> int:
        """A free TCP port on this node, held until `release_port`.

        The socket is bound but does not listen: the kernel does not give the port to other processes that ask for any
        free one, but a rendezvous store, which binds with SO_REUSEADDR, can take it.
        """
        self.release_port()
        self._held_port = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
        self._held_port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held_port.bind(("", 0))
        return int(self._held_port.getsockname()[1])

    def release_port(self) -> None:
        if self._held_port is not None:
            self._held_port.close()
            self._held_port = None

    def join(self, seat: Seat) -> None:
        """Take a seat. Subclasses that need it set up their process group here, after calling this."""
        self.seat = seat
        os.environ.update(seat.environment())
