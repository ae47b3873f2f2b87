"""Bearer tokens for both servers.

Only SHA-256 digests leave the process that read the tokens, so neither Ray's metadata nor a log ever holds a token.
Every comparison runs in constant time over all accepted digests.
"""

import hashlib
import os
import secrets
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc

from infra.errors import ConfigError
from serving.config import ServingSettings

HEALTH_SERVICE = "/grpc.health.v1.Health/"


def token_digests(settings: ServingSettings) -> tuple[str, ...]:
    """Digests of the accepted tokens; empty = open endpoint. Raises as `read_tokens`."""
    return tuple(_digest(token) for token in read_tokens(settings))


def read_tokens(settings: ServingSettings) -> list[str]:
    """The accepted tokens, from the file and the variable that the settings name. For clients of the own endpoint.

    Raises:
        ConfigError: the file is missing, unreadable or holds no token, or the variable is not set.
    """
    tokens: list[str] = []
    if settings.auth_token_file:
        try:
            lines = Path(settings.auth_token_file).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"serving.auth_token_file: cannot read {settings.auth_token_file}: {error}") from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigError(f"serving.auth_token_file: {settings.auth_token_file} holds no token")
        tokens += found
    if settings.auth_token_env:
        token = os.environ.get(settings.auth_token_env, "").strip()
        if not token:
            raise ConfigError(f"serving.auth_token_env: the variable {settings.auth_token_env} is not set")
        tokens.append(token)
    return tokens


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class TokenAuthority:
    """Says whether an `Authorization` value is accepted. With no digests everything is."""

    def __init__(self, digests: Iterable[str]) -> None:
        self._digests = tuple(digests)

    def accepts(self, authorization: str | None) -> bool:
        """`authorization` is the whole header value, e.g. "Bearer abc"."""
        if not self._digests:
            return True
        scheme, _, token = (authorization or "").partition(" ")
        presented = _digest(token.strip())
        known = False
        for digest in self._digests:
            known |= secrets.compare_digest(presented, digest)
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
