"""An endpoint on a Ray of its own: if that Ray dies, another one is started and the model is deployed again.

Who waits for whom: the main thread waits for events: a signal, Ray lost or back, a finished deploy. It never waits in a
call to Ray. Deploying and draining are Ray tasks, which end with their Ray, so that none of their calls hangs or
reaches the next Ray.
"""

import logging
import queue
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray

from infra.errors import RecuaError, UserError
from infra.local_ray import LocalRay, RayServers
from serving.app import Endpoint, deploy, shutdown
from serving.config import ServingSettings
from serving.errors import ServingError

LOSS_SHOWS_S = 10.0
"""A deploy may fail a moment before the loss of its Ray is noticed. After this time the failure is its own."""
LOOK_S = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class LocalEndpoint:
    """Serves until Ctrl-C or SIGTERM. `on_up(endpoint)` is called after each deploy; the ports stay the same."""

    def __init__(
        self,
        folder: Path,
        weight_version: str,
        settings: ServingSettings,
        on_up: Callable[[Endpoint], None],
        say: Callable[[str], None],
    ) -> None:
        self._folder = folder.resolve()
        self._weight_version = weight_version
        self._settings = settings
        self._on_up = on_up
        self._say = say
        self._endpoint: Endpoint | None = None
        self._failed: BaseException | None = None
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def serve(self, restarts: int, window_s: float) -> None:
        """Deploy, serve and drain. `restarts`: how often a Ray that dies is restarted (see LocalRay).

        Raises:
            ConfigError, SystemFault: no local Ray starts, or too many died.
            KeyboardInterrupt: interrupted before the endpoint answered.
            Errors of `serving.app.deploy`.
        """
        put = self._events.put
        self._local = LocalRay(
            RayServers(ray, {"logging_level": logging.WARNING}),
            restarts,
            window_s,
            owner="endpoint",
            way_on="Serve it again",
            on_lost=lambda message: put(("lost", message)),
            on_back=lambda: put(("back", None)),
            on_error=lambda error: put(("error", error)),
        )
        try:
            with self._signals():
                self._deploy()
                while self._next():
                    pass
                self._local.leave()
                if self._endpoint is None:
                    raise KeyboardInterrupt
                self._drain()
        finally:
            self._local.close()

    def _next(self) -> bool:
        """Handle the next event; False if it is a signal to stop."""
        try:
            kind, what = self._events.get(timeout=None if self._failed is None else LOSS_SHOWS_S)
        except queue.Empty:
            assert self._failed is not None
            raise self._failed from None
        if kind == "lost":
            self._failed = None
            self._say(what)
        elif kind == "back":
            self._deploy()
        elif kind == "error":
            raise what
        elif kind == "up":
            self._keep(what)
        elif kind == "failed":
            if isinstance(what, UserError):
                raise what
            self._failed = what
        return kind != "stop"

    def _deploy(self) -> None:
        self._say(f"loading {self._folder} into {self._settings.replicas} replica(s) ...")
        self._start(deploy, (self._folder, self._weight_version, self._settings), "up")

    def _keep(self, endpoint: Endpoint) -> None:
        """Keep the ports, because clients know them now."""
        ports = {"grpc_port": _port(endpoint.grpc_address), "http_port": _port(endpoint.http_url)}
        self._settings = self._settings.model_copy(update=ports)
        self._endpoint = endpoint
        self._on_up(endpoint)

    def _drain(self) -> None:
        """Let requests in flight finish, as long as their Ray lives."""
        self._say("draining: new requests are refused, those in flight finish ...")
        if self._local.is_lost():
            return
        assert self._endpoint is not None
        self._start(shutdown, (self._endpoint, self._settings.drain_timeout_s), "drained")
        while not self._local.is_lost():
            try:
                kind, what = self._events.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            if kind == "failed":
                raise what
            if kind == "drained":
                return

    def _start(self, function: Callable[..., Any], arguments: tuple[Any, ...], event: str) -> None:
        """Run `function` as a Ray task: puts `event` with its result, or "failed" with its error, unless Ray dies."""
        count = self._local.count
        reference = ray.remote(num_cpus=0, max_retries=0)(function).remote(*arguments)

        def ended(future: Any) -> None:
            error = future.exception()
            if self._local.count == count and not self._local.is_lost():
                self._events.put((event, future.result()) if error is None else ("failed", _ours(error)))

        reference.future().add_done_callback(ended)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def on_signal(number: int, frame: FrameType | None) -> None:
            self._events.put(("stop", None))

        previous = {number: signal.signal(number, on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _ours(error: BaseException) -> BaseException:
    """An error of recua without Ray's remote traceback around it; other errors as they are."""
    if isinstance(error, ray.exceptions.RayTaskError):
        if isinstance(error.cause, RecuaError):
            return error.cause
        return error
    return ServingError(f"the process that deploys the model died: {str(error).splitlines()[0]}")


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
