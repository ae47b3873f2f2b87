"""Bearer tokens for both servers.

Only SHA-256 digests leave the process that read the tokens, so that neither Ray's metadata nor a log holds a token.
A comparison takes constant time over all accepted digests.
"""

import os
import secrets
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc

from infra.errors import ConfigError
from infra.tokens import digest, read_tokens
from serving.config import ServingSettings

HEALTH_SERVICE = "/grpc.health.v1.Health/"


def token_digests(settings: ServingSettings) -> tuple[str, ...]:
    """Digests of the accepted tokens; empty for an open endpoint. Raises as `accepted_tokens`."""
    return tuple(digest(token) for token in accepted_tokens(settings))


def accepted_tokens(settings: ServingSettings) -> list[str]:
    """The accepted tokens, from the file and the variable that the settings name. For clients of our own endpoint.

    Raises:
        ConfigError: the file is missing, unreadable or holds no token, or the variable is not set.
    """
    tokens: list[str] = []
    if settings.auth_token_file:
        tokens += read_tokens(settings.auth_token_file, "serving.auth_token_file")
    if settings.auth_token_env:
        token = os.environ.get(settings.auth_token_env, "").strip()
        if not token:
            raise ConfigError(f"serving.auth_token_env: the variable {settings.auth_token_env} is not set")
        tokens.append(token)
    return tokens


class TokenAuthority:
    """Decides whether an `Authorization` value is accepted. Without digests every value is."""

    def __init__(self, digests: Iterable[str]) -> None:
        self._digests = tuple(digests)

    def accepts(self, authorization: str | None) -> bool:
        """`authorization` is the whole header value, e.g. "Bearer abc"."""
        if not self._digests:
            return True
        scheme, _, token = (authorization or "").partition(" ")
        presented = digest(token.strip())
        known = False
        for accepted in self._digests:
            known |= secrets.compare_digest(presented, accepted)
        return known and scheme.lower() == "bearer"


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses rpcs without an accepted token, except health checks."""

    def __init__(self, authority: TokenAuthority) -> None:
        self._authority = authority

        async def refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a valid bearer token is required")

        self._refusal = grpc.unary_unary_rpc_method_handler(refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        if handler_call_details.method.startswith(HEALTH_SERVICE):
            return await continuation(handler_call_details)
        metadata = {key.lower(): value for key, value in handler_call_details.invocation_metadata or ()}
        if self._authority.accepts(metadata.get("authorization")):
            return await continuation(handler_call_details)
        return self._refusal
