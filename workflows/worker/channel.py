"""Live messages from step bodies to the driver: started, progress, log lines.

The driver listens on one TCP port. Each worker process keeps one connection and writes one JSON object per line, first
a random token that came with the task. Lost messages lose no work, because everything that matters is also in the
task's result. A worker therefore never waits for the driver, and drops messages that it cannot send. A line that is too
long is shortened, and a lost connection is restored.
"""

import contextlib
import hmac
import json
import secrets
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from infra.addresses import listen

Message = dict[str, Any]
LINE_LIMIT = 1 << 20
KEPT = 1 << 16
"""Characters kept of a text whose line would be too long."""
RECONNECT_S = 10.0
"""Shortest time between two tries to reach an unreachable driver; each try may take two seconds."""


class Listener:
    """The driver's side. `deliver(message)` is called on the listener's thread, `on_error(error)` if that fails
    (without it Python prints the error)."""

    def __init__(
        self, host: str, deliver: Callable[[Message], None], on_error: Callable[[BaseException], None] | None = None
    ) -> None:
        self._deliver = deliver
        self._on_error = on_error
        self._token = secrets.token_hex(16)
        self._server = listen(host)
        self._server.setblocking(False)
        self.address: tuple[str, int, str] = (host, self._server.getsockname()[1], self._token)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._buffers: dict[socket.socket, bytes] = {}
        self._trusted: set[socket.socket] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="recua-channel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError), socket.create_connection(self.address[:2], timeout=1):
            pass  # wakes the selector
        self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            self._listen()
        except BaseException as error:
            if self._on_error is None:
                raise
            self._on_error(error)
        finally:
            for connection in list(self._buffers):
                self._drop(connection)
            self._selector.close()
            self._server.close()

    def _listen(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select():
                if key.fileobj is self._server:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._read(key.fileobj)

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:
            return
        connection.setblocking(False)
        self._buffers[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(connection)
            return
        *lines, rest = (self._buffers[connection] + data).split(b"\n")
        self._buffers[connection] = rest
        for line in lines:
            if not self._handle(connection, line):
                self._drop(connection)
                return
        if len(rest) > LINE_LIMIT:
            self._drop(connection)

    def _handle(self, connection: socket.socket, line: bytes) -> bool:
        if connection not in self._trusted:
            if not hmac.compare_digest(line, self._token.encode()):
                return False
            self._trusted.add(connection)
            return True
        try:
            message = json.loads(line)
        except ValueError:
            return False
        self._deliver(message)
        return True

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._buffers.pop(connection, None)
        self._trusted.discard(connection)
        connection.close()


class Sender:
    """A worker's side: connects at the first message, and again after a lost connection; never raises."""

    def __init__(self, address: tuple[str, int, str]) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self._lost = False
        self._not_before = 0.0
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        line = _line(message)
        with self._lock:
            if line is None or time.monotonic() < self._not_before:
                return
            try:
                if not self._is_open():
                    self._drop()
                self._connected().sendall(line)
            except OSError:
                self._drop()
                self._not_before = time.monotonic() + RECONNECT_S

    def open(self) -> bool:
        """Whether the driver's end is open: it has not ended, though it may be stopped. Needs no message. False after a
        lost connection, because another process may listen at the address now."""
        with self._lock:
            if not self._lost:
                try:
                    self._connected()
                except OSError:
                    self._drop()
                if not self._is_open():
                    self._drop()
            return not self._lost

    def _is_open(self) -> bool:
        """Whether the connection was closed: the driver sends nothing else."""
        if self._socket is None:
            return True
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        return not waiting.poll(0)

    def _connected(self) -> socket.socket:
        if self._socket is None:
            host, port, token = self._address
            self._socket = socket.create_connection((host, port), timeout=2)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(token.encode() + b"\n")
        return self._socket

    def _drop(self) -> None:
        self._lost = True
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _line(message: Message) -> bytes | None:
    """A message as a line, with its text shortened if it is too long; None for another message that is too long."""
    line = json.dumps(message, default=str).encode() + b"\n"
    if len(line) <= LINE_LIMIT:
        return line
    text = message.get("message")
    if not isinstance(text, str) or len(text) <= 2 * KEPT:
        return None
    cut = f"{text[:KEPT]} [cut here: {len(text):,} letters in all, which the step's log has]"
    return _line({**message, "message": cut})
