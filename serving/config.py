"""Settings of the `serving` section. Imports neither ray nor vllm nor torch."""

from typing import Literal

from pydantic import Field

from infra.config import Cpus, Pause, Seconds, Settings


class ServingEngineSettings(Settings):
    """How one replica runs vLLM."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; "auto" is float32 on a CPU and the checkpoint's own type on a GPU."""

    max_model_len: int | None = Field(default=None, ge=16)
    """Longest prompt plus answer, in tokens; unset takes the model's own context."""

    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Memory for attention keys and values on a CPU replica, in GiB (GPU replicas use `gpu_memory_utilization`)."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that one replica may use."""

    max_num_seqs: int = Field(default=64, ge=1)
    """Requests decoded together in one batch."""

    threads: int = Field(default=1, ge=1)
    """Compute threads of a CPU replica."""

    enforce_eager: bool = True
    """Skip compilation, which halves the start time; turn it off for large models on GPUs."""

    extra_args: tuple[str, ...] = ()
    """More arguments of vLLM's OpenAI server, as on its command line, e.g. ["--enable-lora"]."""


class ServingSettings(Settings):
    """An endpoint: a Ray Serve application of vLLM replicas, its HTTP port and its gRPC gateway."""

    app_name: str = Field(default="recua", pattern=r"^[a-z0-9][a-z0-9-]*$")
    """Name of the Ray Serve application; deploying the same name again replaces its model."""

    model_name: str = "recua"
    """The model's name in the OpenAI `model` field."""

    host: str = "127.0.0.1"
    """Interface that both servers listen on; "0.0.0.0" opens them to the network (then set `auth_token_file`)."""

    grpc_port: int = Field(default=50051, ge=0, le=65535)
    """Port of the gRPC gateway; 0 picks a free one."""

    http_port: int = Field(default=8000, ge=0, le=65535)
    """Port of the OpenAI-compatible HTTP server; 0 picks a free one. A Ray cluster has only one: if Serve already runs,
    0 uses its port and another number is refused."""

    replicas: int = Field(default=1, ge=1)
    """Copies of the model."""

    num_cpus: Cpus = Field(default=0.5, ge=0)
    """CPUs that Ray books per replica (scheduling only; `engine.threads` is the number of compute threads)."""

    num_gpus: int = Field(default=0, ge=0)
    """GPUs per replica, used as one tensor-parallel group."""

    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests that one replica works on at a time."""

    max_queued_requests: int = Field(default=256, ge=0)
    """Requests that may wait for a replica at each of the two servers; more are refused (429 / RESOURCE_EXHAUSTED)."""

    admission_timeout_s: Seconds = 10.0
    """How long a gRPC request waits for a free replica before it fails with UNAVAILABLE."""

    request_timeout_s: Seconds = 600.0
    """Deadline of requests without one."""

    start_timeout_s: Seconds = 600.0
    """How long the replicas may take to load the model and answer."""

    drain_timeout_s: Pause = 30.0
    """How long requests in flight may take after a shutdown or replacement begins."""

    health_period_s: Seconds = 5.0
    """How often each replica is checked by generating one token (skipped while it produces tokens anyway)."""

    health_timeout_s: Seconds = 60.0
    """How long that check may take before the replica is replaced."""

    stream_interval_ms: float = Field(default=10.0, ge=0, le=1e6)
    """Shortest time between two messages of a gRPC stream; the tokens of that time share a message."""

    auth_token_file: str = ""
    """File of accepted bearer tokens, one per line; if empty, the endpoint is open."""

    auth_token_env: str = ""
    """Environment variable that holds one more accepted bearer token."""

    tls_cert_file: str = ""
    """PEM certificate chain; with `tls_key_file`, both servers accept only TLS. Read on the node that runs them."""

    tls_key_file: str = ""
    """PEM private key."""

    tls_client_ca_file: str = ""
    """PEM certificate authorities; clients must then present a certificate that one of them signed."""

    engine: ServingEngineSettings = ServingEngineSettings()
    """How each replica runs vLLM."""
