"""vLLM's OpenAI-compatible HTTP application on a running engine, behind an ASGI application of ours.

Ours, `AuthenticatedApp`, lets only the paths below pass, checks bearer tokens, answers `/health` after a real
generation, and adds the model's name and weight version to every response's headers (in bodies the version is
`system_fingerprint`).
"""

from argparse import Namespace
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serving.auth import TokenAuthority

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

WEIGHT_VERSION_HEADER = "x-recua-weight-version"
MODEL_HEADER = "x-recua-model"
OPEN_PATHS = ("/v1/", "/tokenize", "/detokenize", "/version", "/metrics", "/docs", "/openapi.json")
"""Paths that clients may use. vLLM also registers administrative routes (scaling, weight transfer, ...)."""


async def build_openai_app(engine: Any, arguments: Namespace) -> Any:
    """vLLM's FastAPI application; the gRPC calls also use the serving objects in its `app.state`."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    tasks = await engine.get_supported_tasks()
    app = build_app(arguments, tasks, engine.model_config)
    await init_app_state(engine, app.state, arguments, tasks)
    return app


class AuthenticatedApp:
    """ASGI application in front of vLLM's."""

    def __init__(
        self,
        app: App,
        authority: TokenAuthority,
        check_health: Callable[[], Awaitable[None]],
        model_name: str,
        weight_version: str,
    ) -> None:
        self._app = app
        self._authority = authority
        self._check_health = check_health
        self._stamp = [
            (MODEL_HEADER.encode(), model_name.encode()),
            (WEIGHT_VERSION_HEADER.encode(), weight_version.encode()),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets: closing without accepting refuses the connection

        async def stamped(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self._stamp]}
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path == "/health":
            await self._answer_health(scope, receive, stamped)
        elif not path.startswith(OPEN_PATHS):
            await _respond(scope, receive, stamped, 404, f"no such path: {path}")
        elif not self._authority.accepts(_authorization(scope)):
            await _respond(scope, receive, stamped, 401, "a valid bearer token is required")
        else:
            await self._app(scope, receive, stamped)

    async def _answer_health(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._check_health()
        except Exception as error:  # any error of the engine means "not healthy"
            await _respond(scope, receive, send, 503, f"the engine cannot generate: {error}")
        else:
            await _respond(scope, receive, send, 200, "")


def _authorization(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name.lower() == b"authorization":
            return value.decode("latin-1")
    return None


async def _respond(scope: Scope, receive: Receive, send: Send, status: int, problem: str) -> None:
    from starlette.responses import JSONResponse

    kind = {401: "Unauthorized", 404: "NotFoundError", 503: "ServiceUnavailable"}.get(status)
    body = {"error": {"message": problem, "type": kind, "code": status}} if kind else {"status": "ok"}
    await JSONResponse(body, status_code=status)(scope, receive, send)
