"""Settings of the durable graph: where runs are kept, and how the executor retries."""

from typing import Any

from pydantic import Field

from infra.config import Pause, Seconds, Settings
from infra.storage import default_store
from workflows.graph.artifacts import default_cache


class RunSettings(Settings):
    """How a workflow runs. No setting here is part of a result's key."""

    store: str = Field(default_factory=default_store)
    """Where runs are kept: a folder (absolute, shared by all nodes) or s3://bucket/prefix."""

    cache: str = Field(default_factory=default_cache)
    """Local folder for artifacts that come from a remote store."""

    run_id: str | None = None
    """Name of the run; default: the workflow's name and a hash of its recipe, so that a second start resumes it."""

    new: bool = False
    """Start a new run of this recipe that reuses nothing."""

    rerun: tuple[str, ...] = ()
    """Start a new run that reuses everything but these steps (a step's name or a call id)."""

    reuse: bool = True
    """Reuse results of equal steps from earlier runs in the same store."""

    ray_address: str | None = None
    """Cluster to join; default: RAY_ADDRESS, else a new local Ray."""

    ray_options: dict[str, Any] = Field(default_factory=dict)
    """More arguments for ray.init: of a local Ray (num_cpus, resources, ...), of any (runtime_env, namespace)."""

    max_in_flight: int = Field(default=256, ge=1)
    """Most step attempts that are with Ray at once."""

    system_retries: int = Field(default=5, ge=0)
    """How often an attempt is retried after a platform fault (node lost, preempted, out of memory, store failure)."""

    retry_window_s: Pause = 600.0
    """An attempt that runs for this long before the platform fails resets the count of retries."""

    local_ray_restarts: int = Field(default=3, ge=0)
    """How often a run's local Ray is restarted after it dies (interrupted steps resume, and that counts as no retry). A
    Ray that runs for retry_window_s resets the count."""

    backoff_s: Pause = 1.0
    """First pause before a retry; doubles up to 30 s."""

    lease_s: Seconds = 15.0
    """How long a driver on another machine may be silent before its run is taken over."""

    wait_for_nodes: bool = False
    """True on an autoscaling cluster: the autoscaler handles a request that no present node can meet."""

    faults: str = ""
    """Fault schedule for tests (infra.fault_injection); default: the variable RECUA_FAULTS."""
