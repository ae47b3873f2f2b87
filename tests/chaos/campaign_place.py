"""What all runs of a campaign share: a Ray cluster of several raylets, an S3 server, the proxy before it, a folder."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from infra.storage import Store, open_store
from tests.conftest import moto_server

HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_timeout_ms": 3000}
HEALTH |= {"health_check_failure_threshold": 4}
BUCKET = "chaos"
MARK = "RECUA_CHAOS"
"""In the environment of every process of a place: its folder."""


@dataclass(frozen=True)
class Nodes:
    """`count` raylets beside the head's, all of `each`; `head` says otherwise for that one. `s3`: is there a server?"""

    count: int = 1
    s3: bool = True
    each: Mapping[str, Any] = field(default_factory=lambda: {"num_cpus": 1, "object_store_memory": 80 << 20})
    head: Mapping[str, Any] = field(default_factory=lambda: {"_system_config": HEALTH})


class Place:
    """The shared surroundings. `environment`: what a driver needs beside its own. `nodes`: those ever started."""

    def __init__(self, folder: Path, server: str, proxy: str, cluster: Any, layout: Nodes) -> None:
        self.folder = folder
        self.nodes: list[str] = [node.node_id for node in cluster.list_all_nodes()]
        self._layout = layout
        self.environment = {**os.environ}
        self._server = server
        self._proxy = proxy
        self._cluster = cluster

    @property
    def address(self) -> str:
        return str(self._cluster.gcs_address)

    def faults(self, **settings: Any) -> dict[str, Any]:
        """Set what the proxy does; without arguments, what it has done since it was set."""
        data = json.dumps(settings).encode() if settings else None
        with urllib.request.urlopen(f"{self._proxy}/__faults__", data, timeout=30) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found

    def fresh_bucket(self) -> str:
        """Forget every object and make the bucket anew; its URL."""
        import boto3

        urllib.request.urlopen(f"{self._server}/moto-api/reset", b"", timeout=30).read()
        boto3.client("s3", endpoint_url=self._server).create_bucket(Bucket=BUCKET)
        return f"s3://{BUCKET}/runs"

    def store(self, url: str) -> Store:
        """The store without the proxy."""
        if not url.startswith("s3://"):
            return open_store(url)
        before = os.environ["AWS_ENDPOINT_URL"]
        os.environ["AWS_ENDPOINT_URL"] = self._server
        try:
            return open_store(url)
        finally:
            os.environ["AWS_ENDPOINT_URL"] = before

    def kill_node(self, chance: random.Random) -> None:
        """SIGKILL a node other than the head, its workers first or left to notice; another one joins."""
        self.settle()
        node = next(iter(self._cluster.worker_nodes))
        self.lose_node(node.node_id, with_workers=chance.random() < 0.5)
        self.join_node()

    def lose_node(self, node_id: str, with_workers: bool) -> bool:
        """SIGKILL a raylet, `with_workers` or without; False where there is no such node any more."""
        node = next((one for one in self._cluster.worker_nodes if one.node_id == node_id), None)
        if node is None:
            return False
        for process in self.children(node_id) if with_workers else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.remove_node(node, allow_graceful=False)
        return True

    def children(self, node_id: str) -> list[psutil.Process]:
        """Processes of a node, its raylet apart."""
        node = next((one for one in self._cluster.worker_nodes if one.node_id == node_id), None)
        with contextlib.suppress(psutil.NoSuchProcess):
            if node is not None:
                return psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
        return []

    def join_node(self) -> None:
        """One more node."""
        try:
            self.nodes.append(self._cluster.add_node(wait=False, **self._layout.each).node_id)
        except Exception as error:  # Ray gives a raylet 30 s to start, too little on an overloaded machine
            print(f"a node did not join in time: {error!r}", flush=True)

    def settle(self) -> None:
        """Wait until there are as many nodes as there were, and one to kill."""
        deadline = time.monotonic() + 240
        for node in list(self._cluster.worker_nodes):
            if node.all_processes["raylet"][0].process.poll() is not None:  # it has ended by itself
                self.lose_node(node.node_id, with_workers=False)
        while len(self._cluster.worker_nodes) < self._layout.count:
            self.join_node()
            assert time.monotonic() < deadline, "no node joins"
        while sum(node["Alive"] for node in self._cluster.global_state.node_table()) < self._layout.count + 1:
            assert time.monotonic() < deadline, "a node that joined does not show"
            time.sleep(0.1)

    def actors(self) -> list[str]:
        """Names of actors that are not dead."""
        table = self._cluster.global_state.actor_table(None)
        return [actor["Name"] or actor["ActorClassName"] for actor in table.values() if actor["State"] != "DEAD"]


@contextlib.contextmanager
def open_place(layout: Nodes | None = None) -> Iterator[Place]:
    """Start everything, with one temporary folder for Ray's, the steps' and the runs' files."""
    folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))  # short: Ray's socket names must stay under 107 letters
    (folder / "scratch").mkdir()
    before = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])
    os.environ |= {"RAY_TMPDIR": str(folder), "TMPDIR": str(folder / "scratch"), "PYTHONPATH": root}
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {MARK: str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RECUA_FAULTS": "", "RAY_worker_niceness": "0"}
    os.environ.pop("RAY_ADDRESS", None)
    try:
        layout = layout or Nodes()
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(moto_server()) if layout.s3 else ""
            proxy = stack.enter_context(_proxy(server)) if layout.s3 else ""
            os.environ |= {"AWS_ENDPOINT_URL": proxy} if layout.s3 else {}
            yield Place(folder, server, proxy, stack.enter_context(_cluster(layout)), layout)
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _proxy(server: str) -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).with_name("s3_proxy.py")), server.rpartition(":")[2]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def _cluster(layout: Nodes) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**layout.each, "include_dashboard": False, **layout.head})
    try:
        for _ in range(layout.count):
            cluster.add_node(**layout.each)
        yield cluster
    finally:
        cluster.shutdown()
