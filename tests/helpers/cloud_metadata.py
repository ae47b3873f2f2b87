"""AWS's metadata service (IMDSv2) for all machines of a test; the asking process determines the machine."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil


class Metadata(ThreadingHTTPServer):
    """Answers at `url`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Imds)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.askers: dict[str, int] = {}
        """{token: process id}"""
        self.reclaimed: dict[int, float] = {}
        """{process id of the agent on a machine that will go: when, in seconds since the epoch}"""


class _Imds(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        port = self.client_address[1]
        asks = (one.pid for one in psutil.net_connections("tcp") if one.laddr.port == port and one.pid != os.getpid())
        pid = next(asks, None) or 0  # it may be dead by now
        token = f"token-{pid}"
        self.server.askers[token] = pid
        self._answer(token)

    def do_GET(self) -> None:
        goes_at = self.server.reclaimed.get(self.server.askers[self.headers["X-aws-ec2-metadata-token"]])
        if goes_at is not None and self.path == "/latest/meta-data/spot/instance-action":
            text = datetime.fromtimestamp(goes_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            self._answer(json.dumps({"action": "terminate", "time": text}))
        else:
            self.send_error(404)

    def _answer(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def metadata_service() -> Iterator[Metadata]:
    server = Metadata()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
