"""The command line's client of the service. Standard library only."""

import http.client
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlencode

from infra.errors import ConfigError, RecuaError, StoreError, UserError

TIMEOUT_S = 330.0
"""Timeout of a submission's check, which may import many modules."""


class Client:
    """Calls `/api/v1` of the service at `url`."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        self._token = token

    def get(self, path: str, **query: Any) -> Any:
        """Raises as `_call`."""
        return self._call("GET", f"{path}?{urlencode(query)}" if query else path)

    def post(self, path: str, body: Any = None) -> Any:
        """Raises as `_call`."""
        return self._call("POST", path, b"" if body is None else json.dumps(body).encode(), "application/json")

    def send_package(self, file: Path, sha256: str) -> None:
        """Send a code package, unless the store has it. Raises as `_call`."""
        if not self.get(f"/packages/{sha256}")["stored"]:
            with file.open("rb") as stream:
                self._call("PUT", f"/packages/{sha256}", stream, "application/zip", file.stat().st_size)

    def _call(
        self, method: str, path: str, body: bytes | IO[bytes] | None = None, kind: str = "", size: int | None = None
    ) -> Any:
        """The answer of a request.

        Raises:
            ConfigError: no service answers, or it requires another token.
            UserError: the service refuses, with its message.
            StoreError, RecuaError: its store, or the service itself, fails.
        """
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        if kind:
            headers["Content-Type"] = kind
        if size is not None:
            headers["Content-Length"] = str(size)
        request = urllib.request.Request(f"{self.url}/api/v1{path}", body, headers, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never send the token to a proxy
        try:
            with opener.open(request, timeout=TIMEOUT_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise _refusal(error.code, _reason(error), self.url) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise Unreachable(
                f"no service at {self.url} ({reason}); start one with `recua up`, or give --service"
            ) from None


class Unreachable(RecuaError):
    """Nothing answers at the address: there is no service, or it is restarting."""


def path_of(run_id: str, what: str = "") -> str:
    return f"/runs/{quote(run_id, safe='')}{what}"


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"HTTP {error.code}"


def _refusal(code: int, text: str, url: str) -> RecuaError:
    if code == 401:
        return ConfigError(f"--service {url}: {text}")
    if 400 <= code < 500:
        return UserError(text)
    return StoreError(text) if code == 503 else RecuaError(f"service {url}: {text}")
