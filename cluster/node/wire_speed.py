"""Measures the bandwidth between two processes: a sink takes bytes, and a client times them.

The sink runs in every node agent, so that a new rank can measure the way to another node (and to itself, over
loopback). A client sends the token, then the number of bytes and the bytes; the sink answers one byte when it has them
all. The token keeps strangers out.
"""

import contextlib
import hmac
import secrets
import socket
import socketserver
import struct
import threading
import time
from dataclasses import dataclass
from typing import Any

from infra.addresses import family_of

TOKEN_BYTES = 16
LENGTH = struct.Struct("<Q")
BYTES, TRIES = 4 << 20, 3
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class SinkAddress:
    """Where a sink listens, and its token."""

    host: str
    port: int
    token: bytes


class Sink:
    """Takes bytes until `close`."""

    def __init__(self, host: str) -> None:
        self._server = _Server((host, 0), _Taker)
        self._server.token = secrets.token_bytes(TOKEN_BYTES)
        self.address = SinkAddress(host, int(self._server.server_address[1]), self._server.token)
        threading.Thread(target=self._server.serve_forever, name="sink", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def measure(address: SinkAddress) -> float:
    """GB/s to a sink: the best of a few tries.

    Raises:
        OSError: it cannot be reached, or breaks off.
    """
    best, content = 0.0, bytes(BYTES)
    with socket.create_connection((address.host, address.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(address.token)
        for _ in range(TRIES):
            started = time.perf_counter()
            connection.sendall(LENGTH.pack(BYTES))
            connection.sendall(content)
            if not connection.recv(1):
                raise ConnectionError(f"sink {address.host}:{address.port} hung up")
            best = max(best, BYTES / (time.perf_counter() - started) / 1e9)
    return best


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    token = b""

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        self.address_family = family_of(address[0])
        super().__init__(address, handler)


class _Taker(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        connection: socket.socket = self.request
        connection.settimeout(TIMEOUT_S)
        with contextlib.suppress(OSError):
            if not hmac.compare_digest(_exactly(connection, TOKEN_BYTES), self.server.token):
                return
            room = bytearray(1 << 18)
            while True:
                (left,) = LENGTH.unpack(_exactly(connection, LENGTH.size))
                while left:
                    taken = connection.recv_into(room, min(left, len(room)))
                    if not taken:
                        return
                    left -= taken
                connection.sendall(b"k")


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = connection.recv(count - len(found))
        if not part:
            raise ConnectionError("hung up")
        found += part
    return found
