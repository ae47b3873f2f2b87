"""The Ray Serve deployment. A replica is one vLLM engine that answers OpenAI HTTP and, through the gateway, gRPC.

Serve calls `check_health` on every replica and replaces a replica that fails it or dies. The two proxies (Serve's HTTP
proxy and our gateway) never send a replica more than `max_ongoing_requests`.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve

from infra.telemetry import hide_secrets_in_logs
from serving.auth import TokenAuthority
from serving.calls import Calls, Reply
from serving.config import ServingSettings
from serving.openai import AuthenticatedApp, build_openai_app
from serving.vllm_engine import HealthProbe, engine_arguments, replica_environment, start_engine

DEPLOYMENT_NAME = "model"


@dataclass(frozen=True)
class ServedModel:
    """The model that a replica loads: ("/…/dpo", "sha256:…", token digests)."""

    folder: str
    weight_version: str
    token_digests: tuple[str, ...] = ()


@serve.ingress()
class Replica:
    """One engine. Methods other than the HTTP application are for the gateway."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: ServedModel, settings: ServingSettings
    ) -> None:
        hide_secrets_in_logs()
        if not (Path(model.folder) / "config.json").is_file():
            raise FileNotFoundError(f"{model.folder}: no model folder on this node; use a path that every node sees")
        self._arguments = engine_arguments(Path(model.folder), model.weight_version, settings)
        self._engine = await asyncio.to_thread(start_engine, self._arguments, ray.util.get_node_ip_address())
        self._probe = HealthProbe(self._engine, settings.health_period_s, settings.health_timeout_s)
        self._app = await build_openai_app(self._engine, self._arguments)
        self._door = AuthenticatedApp(
            self._app,
            TokenAuthority(model.token_digests),
            self._probe.check,
            settings.model_name,
            model.weight_version,
        )
        self._calls = Calls(
            self._engine,
            self._app.state,
            settings.model_name,
            model.weight_version,
            settings.stream_interval_ms / 1000,
        )
        await self._probe.check()  # the first generation of a process is slow: do it before requests arrive

    def __serve_build_asgi_app__(self) -> Any:
        return self._door

    async def check_health(self) -> None:
        await self._probe.check()

    async def unary(self, method: str, request: bytes) -> Reply:
        return await self._calls.unary(method, request)

    async def stream(self, method: str, request: bytes) -> AsyncIterator[Reply]:
        async for reply in self._calls.stream(method, request):
            yield reply

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.shutdown(timeout=1.0)  # Serve has drained this replica: nothing is left to wait for


def build_application(model: ServedModel, settings: ServingSettings) -> serve.Application:
    """The Serve application of `settings.replicas` replicas."""
    deployment = serve.deployment(Replica).options(  # type: ignore[attr-defined]
        name=DEPLOYMENT_NAME,
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        max_constructor_retry_count=2,
        health_check_period_s=settings.health_period_s,
        health_check_timeout_s=settings.health_timeout_s + 5,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config={"enable_access_log": False},
        ray_actor_options={
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "runtime_env": {"env_vars": replica_environment(settings)},
        },
    )
    return deployment.bind(model, settings)
