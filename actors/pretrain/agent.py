"""The node agent of a pretraining. It does not import torch, which would delay its start by two seconds."""

import json
import secrets
import threading
from dataclasses import dataclass

import ray

from cluster.node.agent import AgentPlace, NodeAgent
from engines.snapshots import ReplicaServer
from infra.storage.files import appear

SERVED = "replicas.json"
"""The file with port and token of a node's replica server, in the group's folder."""


@dataclass(frozen=True)
class ReplicaPlace:
    """A replica server of another node."""

    host: str
    port: int
    token: str


class PretrainAgent(NodeAgent):
    """A node agent that also serves its node's shards to other nodes, once there are any.

    An agent that replaces an ended one serves at the same address, to which ranks of other nodes still send their
    replicas.
    """

    def __init__(self, place: AgentPlace) -> None:
        super().__init__(place)
        self._server: ReplicaServer | None = None
        self._lock = threading.Lock()
        if len(place.living) > 1:
            threading.Thread(target=self.replica_server, name="replica-start", daemon=True).start()

    def replica_server(self) -> ReplicaPlace:
        """The server from which other nodes read this node's shards, and to which they send replicas of theirs."""
        with self._lock:
            if self._server is None:
                host, root = ray.util.get_node_ip_address(), self.place.folder.parent
                port, token = self._place_before()
                try:
                    self._server = ReplicaServer(token, host=host, port=port, root=root)
                except OSError:  # another process has the port by now
                    self._server = ReplicaServer(token, host=host, root=root)
                with appear(self.place.folder / SERVED) as draft:
                    draft.touch(0o600)
                    draft.write_text(json.dumps([self._server.port, token]))
            return ReplicaPlace(self._server.host, self._server.port, self._server.token)

    def _place_before(self) -> tuple[int, str]:
        try:
            port, token = json.loads((self.place.folder / SERVED).read_text())
            return int(port), str(token)
        except (OSError, ValueError, TypeError):
            return 0, secrets.token_hex(16)
