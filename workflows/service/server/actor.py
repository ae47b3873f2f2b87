"""The service as a detached Ray actor: HTTP in one thread, the supervisor in another.

`Host` runs inside the actor. Ray ships `service_class` by value, so that it can first make our modules importable. If
either thread ends, the process ends: Ray restarts it, and it finds all state in the store.
"""

import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra.code_root import code_root
from infra.errors import ConfigError
from infra.telemetry import hide_secrets_in_logs

NAME, NAMESPACE = "recua-service", "recua"
BIND_PATIENCE_S = 30.0
HEAD = "node:__internal_head__"
"""A resource that only a head node has."""


@dataclass(frozen=True)
class HostConfig:
    """The actor's arguments. Ray keeps them, so they hold no secret: `digests` are sha256 of tokens."""

    store: str
    host: str
    port: int
    digests: tuple[str, ...]
    hosts: tuple[str, ...]
    folder: str


class Host:
    """The service inside the actor's process."""

    def __init__(self, config: HostConfig) -> None:
        import ray
        import uvicorn

        from infra.storage import open_store
        from workflows.service.drivers.supervisor import Supervisor
        from workflows.service.server.app import create_app

        hide_secrets_in_logs()
        store = open_store(config.store)
        store.check()
        listener = listen(config.host, config.port)
        address = ray.get_runtime_context().gcs_address
        self._supervisor = Supervisor(store, address, Path(config.folder).expanduser(), nodes)
        names = [*config.hosts, socket.gethostname(), socket.getfqdn()]
        app = create_app(store, self._supervisor, config.digests, names)
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        self._http = threading.Thread(target=self._server.run, args=([listener],), name="recua-http", daemon=True)
        found = self._supervisor.start()
        self._http.start()
        self._closing = False
        threading.Thread(target=self._watch, name="recua-watch", daemon=True).start()
        port = listener.getsockname()[1]
        self._description = {
            "store": store.url,
            "host": config.host,
            "port": port,
            "address": address,
            "pid": os.getpid(),
        }
        self._description |= {"token_required": bool(config.digests), "found": found, "node": socket.gethostname()}

    def describe(self) -> dict[str, Any]:
        """The service's address, and the unfinished runs that it found at its start."""
        return {**self._description, "active": self._supervisor.active()}

    def close(self) -> list[str]:
        """Stop serving and driving; returns the runs that the next service will resume."""
        self._closing = True
        self._server.should_exit = True
        self._http.join(timeout=10)
        return self._supervisor.close()

    def _watch(self) -> None:
        while self._http.is_alive() and self._supervisor.alive():
            time.sleep(1)
        if not self._closing:
            print("recua service: a thread has ended; the process ends, and Ray restarts it", flush=True)
            os._exit(1)


def nodes() -> list[dict[str, float]]:
    """The resources of each live node, by Ray's names."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def listen(host: str, port: int, patience_s: float = BIND_PATIENCE_S) -> socket.socket:
    """A listening socket; waits a little for the port, which a service that was just killed may still hold.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"--port {port}: cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}"
                ) from None
            time.sleep(0.2)


def service_class() -> type:
    """The actor's class; nested, so that Ray pickles it by value."""

    class RecuaService:
        def __init__(self, roots: list[str], config: dict[str, Any]) -> None:
            import os
            import sys

            for root in roots:
                if root not in sys.path and os.path.isdir(root):
                    sys.path.append(root)
            from workflows.service.server.actor import Host, HostConfig

            self._host = Host(HostConfig(**config))

        def describe(self) -> dict[str, Any]:
            return self._host.describe()

        def close(self) -> list[str]:
            return self._host.close()

    return RecuaService


def start(ray: Any, config: HostConfig) -> Any:
    """The actor's handle, on the head node of the cluster that this process is connected to."""
    root = str(code_root())
    options = {"name": NAME, "namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0}
    actor = ray.remote(service_class()).options(**options, resources={HEAD: 0.001}, max_concurrency=4)
    return actor.remote([root], asdict(config))


def find(ray: Any) -> Any:
    """The actor's handle; None if there is none."""
    try:
        return ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:
        return None
