"""Errors of serving.

RecuaError
└── ServingError              the endpoint did not start, or stopped
    └── RequestError          one request failed; `code` is the gRPC status name
"""

from infra.errors import RecuaError


class ServingError(RecuaError):
    """The endpoint did not start in time, or its replicas fail."""


class RequestError(ServingError):
    """One request failed. `code` is a gRPC status name, e.g. "UNAVAILABLE" or "INVALID_ARGUMENT"."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __str__(self) -> str:
        return f"{self.code}: {self.args[0]}"

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.code, self.args[0])
