"""The gRPC server: a detached Ray actor on the head node between clients and the Serve deployment.

Who waits for whom: a client waits for the gateway; the gateway waits up to `admission_timeout_s` for a replica with
room, then until the client's deadline for its answer. It passes protobuf bytes through without parsing them. If a
client cancels or its deadline passes, the replica's work is cancelled. If a replica dies before its first message, the
call is retried once; if it dies later, the call fails with UNAVAILABLE. A watcher polls Serve and sets the standard
health status. The port is bound before the model is loaded; a restarted gateway binds the same port.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import ray
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from ray import serve

from infra.addresses import with_port
from infra.errors import ConfigError, ResourceError
from infra.telemetry import hide_secrets_in_logs
from serving.auth import TokenAuthority, TokenInterceptor
from serving.calls import Reply
from serving.config import ServingSettings
from serving.deployment import DEPLOYMENT_NAME
from serving.protocol import SERVICE, STREAM_METHODS, UNARY_METHODS, messages

WATCH_PERIOD_S = 1.0
"""How often the gateway asks Serve how many replicas run."""


@dataclass(frozen=True)
class _Outcome:
    """The status of a failed rpc."""

    code: str
    detail: str


class Gateway:
    """The Ray actor: it serves from `start` until `drain`. An actor that Ray restarts calls `start` itself."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, settings: ServingSettings, port: int, token_digests: tuple[str, ...]
    ) -> None:
        hide_secrets_in_logs()
        self._settings = settings
        self._port = port
        self._token_digests = token_digests
        self._log = logging.getLogger("recua.gateway")
        self._handle: Any = None
        self._running_replicas = 0
        self._watcher: asyncio.Task[None] | None = None
        self._health = health.aio.HealthServicer()
        if ray.get_runtime_context().was_current_actor_reconstructed:
            await self.start()

    async def start(self) -> int:
        """Listen. Health is NOT_SERVING until a replica runs. Returns the port.

        Raises:
            ResourceError: the port is taken. ConfigError: the TLS files cannot be used.
        """
        self._server = self._build_server()
        self._port = self._bind(self._port)
        await self._set_health(False)
        await self._server.start()
        self._watcher = asyncio.create_task(self._watch())
        self._watcher.add_done_callback(self._report_watcher)
        return self._port

    def matches(self, settings: ServingSettings, token_digests: tuple[str, ...]) -> bool:
        """Whether this gateway fits a deployment with these settings. It fits none before `start` or after `drain`: the
        process that drained it may have been killed before it could end the actor."""
        if self._watcher is None or self._watcher.done():
            return False
        mine = self._settings.model_copy(update={"grpc_port": self._port})
        wanted_port = settings.grpc_port or self._port
        return settings.model_copy(update={"grpc_port": wanted_port}) == mine and token_digests == self._token_digests

    def port(self) -> int:
        return self._port

    async def wait_ready(self, timeout_s: float) -> bool:
        """True as soon as a replica runs."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._running_replicas == 0 and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.1)
        return self._running_replicas > 0

    async def drain(self, timeout_s: float) -> None:
        """Refuse new calls, let calls in flight end within `timeout_s`, close the port."""
        if self._watcher is None:
            return
        self._watcher.cancel()
        await self._set_health(False)
        await self._server.stop(grace=timeout_s)

    # -- the server

    def _build_server(self) -> grpc.aio.Server:
        interceptors = [TokenInterceptor(TokenAuthority(self._token_digests))] if self._token_digests else []
        server = grpc.aio.server(
            interceptors=interceptors,
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 16 << 20)],
        )
        messages()
        unary = {name: grpc.unary_unary_rpc_method_handler(self._unary_handler(name)) for name in UNARY_METHODS}
        stream = {name: grpc.unary_stream_rpc_method_handler(self._stream_handler(name)) for name in STREAM_METHODS}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, unary | stream),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _bind(self, port: int) -> int:
        address = with_port(self._settings.host, port)
        credentials = server_credentials(self._settings)
        try:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ResourceError(
                f"serving.grpc_port: cannot listen on {address}: {error}; "
                "choose another port, or 0 for any free one (serving.host must be an address of the head node)"
            ) from None

    # -- calls

    def _unary_handler(self, method: str) -> Any:
        async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            result: bytes | _Outcome
            try:
                async with asyncio.timeout(self._settings.request_timeout_s):
                    result = await self._unary(method, request)
            except TimeoutError:
                result = _Outcome("DEADLINE_EXCEEDED", "no answer within serving.request_timeout_s")
            if isinstance(result, bytes):
                return result
            return await context.abort(grpc.StatusCode[result.code], result.detail)

        return answer

    async def _unary(self, method: str, request: bytes) -> bytes | _Outcome:
        for last_try in (False, True):
            try:
                async with self._admitted("unary", stream=False) as (handle, selection):
                    response = handle.dispatch(selection, method, request)
                    try:
                        reply: Reply = await response
                    except asyncio.CancelledError:
                        response.cancel()
                        raise
                return reply.body if reply.code == "OK" else _Outcome(reply.code, reply.detail)
            except Exception as error:
                outcome = self._explain(error)
                if last_try or not _is_death(error):
                    return outcome
        raise AssertionError("unreachable")

    def _stream_handler(self, method: str) -> Any:
        async def answer(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            deadline = asyncio.get_running_loop().time() + self._settings.request_timeout_s
            items = self._stream(method, request)
            outcome: _Outcome | None = None
            try:
                while outcome is None:
                    async with asyncio.timeout_at(deadline):
                        item = await anext(items, None)
                    if item is None:
                        break
                    if isinstance(item, _Outcome):
                        outcome = item
                    else:
                        yield item
            except TimeoutError:
                outcome = _Outcome("DEADLINE_EXCEEDED", "not finished within serving.request_timeout_s")
            finally:
                await items.aclose()
            if outcome is not None:
                await context.abort(grpc.StatusCode[outcome.code], outcome.detail)

        return answer

    async def _stream(self, method: str, request: bytes) -> AsyncGenerator[bytes | _Outcome, None]:
        for last_try in (False, True):
            begun = False
            try:
                async with self._admitted("stream", stream=True) as (handle, selection):
                    response = handle.dispatch(selection, method, request)
                    try:
                        async for reply in response:
                            begun = True
                            yield reply.body if reply.code == "OK" else _Outcome(reply.code, reply.detail)
                    except (asyncio.CancelledError, GeneratorExit):
                        response.cancel()
                        raise
                return
            except Exception as error:
                outcome = self._explain(error)
                if begun or last_try or not _is_death(error):
                    yield outcome
                    return

    @contextlib.asynccontextmanager
    async def _admitted(self, replica_method: str, stream: bool) -> AsyncIterator[tuple[Any, Any]]:
        """A slot on a replica; an error if there is none within `admission_timeout_s`."""
        if self._handle is None:
            raise NoReplica("the model is still being loaded")
        handle = self._handle.options(method_name=replica_method, stream=stream)
        async with contextlib.AsyncExitStack() as slot:
            try:
                async with asyncio.timeout(self._settings.admission_timeout_s):
                    selection = await slot.enter_async_context(handle.choose_replica())
            except TimeoutError:
                waited = f"{self._settings.admission_timeout_s:g} s"
                raise NoReplica(f"no replica took the request within {waited}") from None
            yield handle, selection

    def _explain(self, error: Exception) -> _Outcome:
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        if isinstance(error, BackPressureError):
            return _Outcome("RESOURCE_EXHAUSTED", "too many requests are waiting (serving.max_queued_requests)")
        if isinstance(error, NoReplica):
            return _Outcome("UNAVAILABLE", str(error))
        if isinstance(error, DeploymentUnavailableError):
            return _Outcome("UNAVAILABLE", "the model failed to load")
        if _is_death(error):
            return _Outcome("UNAVAILABLE", "the replica that held this request died; it is being replaced")
        self._log.error("call failed", exc_info=error)
        return _Outcome("INTERNAL", f"{type(error).__name__} in the replica; see its log")

    # -- health

    async def _watch(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._look)
            except Exception as error:  # Serve itself may be restarting: report not ready, and poll again
                self._log.warning("cannot ask Serve for its status: %s", error)
                self._running_replicas = 0
            await self._set_health(self._running_replicas > 0)
            await asyncio.sleep(WATCH_PERIOD_S)

    def _look(self) -> None:
        application = serve.status().applications.get(self._settings.app_name)
        deployment = application.deployments.get(DEPLOYMENT_NAME) if application else None
        states = deployment.replica_states.items() if deployment else ()
        self._running_replicas = sum(count for state, count in states if state == "RUNNING")
        if deployment is not None and self._handle is None:
            self._handle = serve.get_app_handle(self._settings.app_name)

    async def _set_health(self, healthy: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if healthy else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, status)

    def _report_watcher(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and task.exception() is not None:
            self._log.error("the health watcher ended", exc_info=task.exception())


class NoReplica(Exception):
    """No replica could take the request."""


def _is_death(error: Exception) -> bool:
    from ray.serve.exceptions import ReplicaUnavailableError

    gone = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ReplicaUnavailableError)
    return isinstance(error, gone)


def server_credentials(settings: ServingSettings) -> grpc.ServerCredentials | None:
    """TLS from the files that the settings name; None without them.

    Raises:
        ConfigError: one of the pair is missing, or a file cannot be read.
    """
    if not (settings.tls_cert_file or settings.tls_key_file or settings.tls_client_ca_file):
        return None
    if not (settings.tls_cert_file and settings.tls_key_file):
        raise ConfigError("serving.tls_cert_file and serving.tls_key_file: set both or neither")
    pair = (_read("tls_key_file", settings.tls_key_file), _read("tls_cert_file", settings.tls_cert_file))
    if not settings.tls_client_ca_file:
        return grpc.ssl_server_credentials([pair])
    authorities = _read("tls_client_ca_file", settings.tls_client_ca_file)
    return grpc.ssl_server_credentials([pair], root_certificates=authorities, require_client_auth=True)


def _read(setting: str, path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"serving.{setting}: cannot read {path}: {error.strerror}") from None
