"""A Ray on this machine for the tests of one file, without servers that they do not use; this process is connected."""

import contextlib
from collections.abc import Iterator
from typing import Any

import ray
from ray.cluster_utils import Cluster

from infra.ray_internals import few_servers

MEMORY = 80 << 20
"""Bytes of an object store; the smallest that Ray accepts."""


@contextlib.contextmanager
def local_ray(num_cpus: int, **options: Any) -> Iterator[str]:
    """A Ray of one node, and its address; `options` of `ray.init`."""
    try:
        with few_servers(ray):
            own = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": MEMORY}
            node = ray.init(address="local", num_cpus=num_cpus, **{**own, **options})
        yield node.address_info["gcs_address"]
    finally:
        ray.shutdown()


@contextlib.contextmanager
def cluster(num_cpus: int, **options: Any) -> Iterator[Cluster]:
    """A Ray whose nodes come and go (`add_node`, `remove_node`), and its head; `options` of `ray.init`."""
    with few_servers(ray):
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus, "object_store_memory": MEMORY})
    try:
        ray.init(address=made.address, log_to_driver=False, **options)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
