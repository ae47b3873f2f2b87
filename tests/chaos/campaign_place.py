"""What all runs of a campaign share: a Ray cluster of two nodes, an S3 server, the proxy before it, a folder."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from infra.storage import Store, open_store
from tests.conftest import moto_server

HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_timeout_ms": 3000}
HEALTH |= {"health_check_failure_threshold": 4}
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
NODES = 2
BUCKET = "chaos"


class Place:
    """The shared surroundings. `environment`: what a driver needs beside its own."""

    def __init__(self, folder: Path, server: str, proxy: str, cluster: Any) -> None:
        self.folder = folder
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
        if chance.random() < 0.5:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            for process in raylet.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._cluster.remove_node(node, allow_graceful=False)
        self._join()

    def _join(self) -> None:
        try:
            self._cluster.add_node(wait=False, **NODE)
        except Exception as error:  # Ray gives a raylet 30 s to start, too little on an overloaded machine
            print(f"a node did not join in time: {error!r}", flush=True)

    def settle(self) -> None:
        """Wait until there are as many nodes as there were, and one to kill."""
        deadline = time.monotonic() + 240
        while not self._cluster.worker_nodes:
            self._join()
            assert time.monotonic() < deadline, "no node joins"
        while sum(node["Alive"] for node in self._cluster.global_state.node_table()) < NODES:
            assert time.monotonic() < deadline, "a node that joined does not show"
            time.sleep(0.1)

    def actors(self) -> list[str]:
        """Names of actors that are not dead."""
        table = self._cluster.global_state.actor_table(None)
        return [actor["Name"] or actor["ActorClassName"] for actor in table.values() if actor["State"] != "DEAD"]


@contextlib.contextmanager
def open_place() -> Iterator[Place]:
    """Start everything, with one temporary folder for Ray's, the steps' and the runs' files."""
    folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))  # short: Ray's socket names must stay under 107 letters
    (folder / "scratch").mkdir()
    before = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])
    os.environ |= {"RAY_TMPDIR": str(folder), "TMPDIR": str(folder / "scratch"), "PYTHONPATH": root}
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RECUA_FAULTS": "", "RAY_worker_niceness": "0"}
    os.environ.pop("RAY_ADDRESS", None)
    try:
        with moto_server() as server, _proxy(server) as proxy:
            os.environ["AWS_ENDPOINT_URL"] = proxy
            with _cluster() as cluster:
                yield Place(folder, server, proxy, cluster)
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
def _cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "_system_config": HEALTH}
    )
    try:
        for _ in range(NODES - 1):
            cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()
