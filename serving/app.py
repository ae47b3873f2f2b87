"""Starting and stopping an endpoint, for the deploy step and `recua serve`.

`deploy` runs all checks, binds the ports, and only then loads the model. The endpoint belongs to the Ray cluster, not
to the caller: it serves until `shutdown` or until the cluster ends.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra.addresses import with_port
from infra.errors import ConfigError, RecuaError, ResourceError
from infra.ray_internals import serve_controller
from serving.auth import token_digests
from serving.config import ServingSettings
from serving.deployment import ServedModel, build_application
from serving.errors import ServingError
from serving.gateway import Gateway, server_credentials
from serving.preflight import check_capacity, check_model_folder, pick_ports
from serving.protocol import messages

GATEWAY_NAMESPACE = "recua"
T = TypeVar("T")


@dataclass(frozen=True)
class Endpoint:
    """A deployed endpoint, e.g. ("127.0.0.1:50051", "http://127.0.0.1:8000", "recua", "sha256:…", "recua")."""

    grpc_address: str
    http_url: str
    model: str
    weight_version: str
    app_name: str = "recua"


def deploy(model_folder: Path, weight_version: str, settings: ServingSettings) -> Endpoint:
    """Serve the HF folder `model_folder` on the connected Ray cluster; returns when it answers.

    An endpoint of the same `app_name` gets the new model; its gateway stays if only the model changed.

    Raises:
        CheckpointError: no complete model folder. ConfigError: tokens, TLS files, or Serve on another HTTP port.
        ResourceError: a taken port, too few CPUs or GPUs, too little memory.
        ServingError: the replicas failed or were not ready within `start_timeout_s`.
    """
    check_model_folder(model_folder)
    digests = token_digests(settings)
    server_credentials(settings)
    check_capacity(model_folder, settings)
    head = _head_node()
    there = NodeAffinitySchedulingStrategy(head["NodeID"], soft=False)
    http_port, serve_runs = _http_port_of_running_serve(settings)
    gateway = _existing_gateway(settings, digests)
    grpc_wanted = None if gateway else settings.grpc_port
    grpc_port, free_http_port = on_head(pick_ports, settings.host, grpc_wanted, None if serve_runs else http_port)
    if gateway is None:
        gateway = _start_gateway(settings, grpc_port, digests, there)
    model = ServedModel(str(model_folder.resolve()), weight_version, digests)
    try:
        if not serve_runs:
            _start_serve(settings, free_http_port)
        _run_application(model, settings)
        if not ray.get(gateway.wait_ready.remote(settings.start_timeout_s)):
            raise ServingError("the gateway sees no running replica")
    except SystemExit:  # Ray ends this process: the endpoint keeps serving, and the next attempt deploys again
        raise
    except BaseException:
        _stop(settings.app_name, gateway, 0.0)
        raise
    host = head["NodeManagerAddress"] if settings.host in ("0.0.0.0", "::", "") else settings.host
    scheme = "https" if settings.tls_cert_file else "http"
    return Endpoint(
        grpc_address=with_port(host, ray.get(gateway.port.remote())),
        http_url=f"{scheme}://{with_port(host, http_port if serve_runs else free_http_port)}",
        model=settings.model_name,
        weight_version=weight_version,
        app_name=settings.app_name,
    )


def shutdown(endpoint: Endpoint, drain_timeout_s: float = 30.0) -> None:
    """Refuse new requests, let those in flight finish, stop gateway and replicas; Serve too if nothing else runs."""
    try:
        gateway = ray.get_actor(_gateway_name(endpoint.app_name), namespace=GATEWAY_NAMESPACE)
    except ValueError:
        gateway = None
    _stop(endpoint.app_name, gateway, drain_timeout_s)


def _stop(app_name: str, gateway: Any, drain_timeout_s: float) -> None:
    if gateway is not None:
        # The kill below ends a gateway that is stuck.
        with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            ray.get(gateway.drain.remote(drain_timeout_s), timeout=drain_timeout_s + 10)
        ray.kill(gateway, no_restart=True)
    applications = serve.status().applications
    if app_name in applications:
        serve.delete(app_name)
    if not set(applications) - {app_name}:
        serve.shutdown()


def on_head(function: Callable[..., T], *arguments: Any) -> T:
    """Call `function` on the head node, where both servers listen: their interface may be loopback."""
    head = _head_node()["NodeID"]
    if ray.get_runtime_context().get_node_id() == head:
        return function(*arguments)
    there = NodeAffinitySchedulingStrategy(head, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=there)
    result: T = _unwrapped(task.remote(*arguments))
    return result


def _head_node() -> dict[str, Any]:
    alive = [node for node in ray.nodes() if node["Alive"]]
    heads = [node for node in alive if "node:__internal_head__" in node["Resources"]]
    return (heads or alive)[0]


def _http_port_of_running_serve(settings: ServingSettings) -> tuple[int, bool]:
    """(port, whether Serve already runs). A cluster has one HTTP proxy for all its applications."""
    try:
        controller = serve_controller(ray)
    except ValueError:
        return settings.http_port, False
    port = int(_unwrapped(controller.get_http_config.remote()).port)
    if settings.http_port not in (0, port):
        raise ConfigError(
            f"serving.http_port: Ray Serve already listens on {port} in this cluster; set it to {port} or to 0"
        )
    return port, True


def _gateway_name(app_name: str) -> str:
    return f"gateway-{app_name}"


def _existing_gateway(settings: ServingSettings, digests: tuple[str, ...]) -> Any:
    try:
        gateway = ray.get_actor(_gateway_name(settings.app_name), namespace=GATEWAY_NAMESPACE)
        if ray.get(gateway.matches.remote(settings, digests), timeout=30):
            return gateway
        ray.get(gateway.drain.remote(settings.drain_timeout_s), timeout=settings.drain_timeout_s + 10)
    except (ValueError, ray.exceptions.RayActorError):
        return None
    ray.kill(gateway, no_restart=True)
    return None


def _start_gateway(settings: ServingSettings, port: int, digests: tuple[str, ...], there: Any) -> Any:
    actor: Any = ray.remote(Gateway)
    actor = actor.options(
        name=_gateway_name(settings.app_name),
        namespace=GATEWAY_NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        max_restarts=100,
        max_concurrency=10_000,
        scheduling_strategy=there,
        runtime_env={"env_vars": {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}},
    )
    gateway = actor.remote(settings, port, digests)
    try:
        _unwrapped(gateway.start.remote())
    except BaseException:
        ray.kill(gateway, no_restart=True)
        raise
    return gateway


def _unwrapped(reference: Any) -> Any:
    """The result. Raises an error of recua without Ray's remote traceback around it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RecuaError):
            raise error.cause from None
        raise


def _start_serve(settings: ServingSettings, port: int) -> None:
    options = {
        "host": settings.host,
        "port": port,
        "request_timeout_s": settings.request_timeout_s,
        "ssl_certfile": settings.tls_cert_file or None,
        "ssl_keyfile": settings.tls_key_file or None,
        "ssl_ca_certs": settings.tls_client_ca_file or None,
    }
    try:
        serve.start(proxy_location="HeadOnly", http_options=options)
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise ResourceError(f"serving.http_port: Ray Serve cannot listen on {settings.host}:{port}: {error}") from error


def _run_application(model: ServedModel, settings: ServingSettings) -> None:
    """Deploy and wait until the application runs with this model's weights."""
    target = serve.RunTarget(build_application(model, settings), name=settings.app_name, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)
    deadline = time.monotonic() + settings.start_timeout_s
    while True:
        application = serve.status().applications[settings.app_name]
        if application.status == "RUNNING" and _answering_version(settings.app_name) == model.weight_version:
            return
        if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reasons = [application.message, *(part.message for part in application.deployments.values())]
            raise ServingError("the replicas failed:\n" + "\n".join(reason for reason in reasons if reason))
        if time.monotonic() > deadline:
            raise ServingError(f"no replica answers after serving.start_timeout_s = {settings.start_timeout_s:g} s")
        time.sleep(0.2)


def _answering_version(app_name: str) -> str:
    reply = serve.get_app_handle(app_name).unary.remote("ModelInfo", b"").result(timeout_s=60)
    return messages().ModelInfoResponse.FromString(reply.body).weight_version
