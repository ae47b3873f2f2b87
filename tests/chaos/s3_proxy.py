"""An HTTP proxy before an S3 server that injects faults, by seed or by script: `python s3_proxy.py UPSTREAM_PORT`.

Prints its own port. `POST /__faults__` with {"seed", "rates": {kind: probability}, "script": [kind or null, ...],
"match": text, "stall_s"} sets what happens from then on to requests whose "METHOD /path" contains `match`: the script
first, one entry for each, then the rates. It clears the records unless "keep" is true. `GET /__faults__` gives
{"counts": {kind: n}, "written": {path: [before, after]}}: when journal slots and heartbeats were first written
upstream, in seconds since the epoch.

Kinds. Not applied upstream: `error-500`, `error-503`, `slow-down`, `reset-before`. Applied, and the answer is lost:
`reset-after`, `late-error`. Applied later than the client's next try: `zombie` (writes only). Answers: `latency`,
`stall` (silence for `stall_s`), `truncated` (half the body under the whole length), `short` (half the body under a
length that fits). `unconditional`: the condition of a write is not passed on, as if the server did not know it.
"""

import asyncio
import contextlib
import json
import random
import socket
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

KINDS = ("latency", "stall", "error-500", "error-503", "slow-down", "reset-before", "reset-after", "late-error")
KINDS += ("zombie", "truncated", "short", "unconditional")
ERRORS = {"error-500": (500, "InternalError"), "error-503": (503, "ServiceUnavailable"), "slow-down": (503, "SlowDown")}
ERRORS |= {"late-error": (500, "InternalError")}
CONTROL = "/__faults__"


@dataclass
class Request:
    """One HTTP message from the client: `head` as it came, without the empty line."""

    method: str
    path: str
    head: bytes
    body: bytes


@dataclass
class Answer:
    """The server's answer: its head lines without the length, and its body."""

    status: int
    head: list[bytes]
    length: int
    body: bytes


@dataclass
class Faults:
    """What happens to which request."""

    rates: dict[str, float] = field(default_factory=dict)
    script: list[str | None] = field(default_factory=list)
    match: str = ""
    stall_s: float = 3.0
    chance: random.Random = field(default_factory=random.Random)
    counts: Counter[str] = field(default_factory=Counter)
    written: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Faults":
        seed = settings.pop("seed", 0)
        assert set(settings.get("rates", {})) <= set(KINDS), f"unknown kinds in {settings}"
        return cls(chance=random.Random(seed), **settings)

    def take(self, request: Request) -> str | None:
        """The fault of this request, counted."""
        if self.match not in f"{request.method} {request.path}":
            return None
        kind = self.script.pop(0) if self.script else self._drawn()
        writes = request.method in ("PUT", "POST", "DELETE")
        if (kind == "zombie" and not writes) or (kind in ("truncated", "short") and request.method != "GET"):
            kind = None
        if kind is not None:
            self.counts[kind] += 1
        return kind

    def _drawn(self) -> str | None:
        number = self.chance.random()
        for kind, rate in self.rates.items():
            number -= rate
            if number < 0:
                return kind
        return None


class Proxy:
    """Serves one upstream; every client connection has an upstream connection of its own for each request."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self.faults = Faults()
        self._late: set[asyncio.Task[Answer]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while (request := await _read_request(reader, writer)) is not None:
                if request.path == CONTROL:
                    await _send(writer, self._control(request))
                elif not await self._pass(request, writer):
                    break
        with contextlib.suppress(ConnectionError):
            writer.close()

    async def _pass(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Carry out one request with its fault; whether the connection goes on."""
        faults = self.faults
        kind = faults.take(request)
        if kind == "latency":
            await asyncio.sleep(faults.chance.uniform(0.05, 0.5))
        if kind == "zombie":
            self._apply_later(request, faults.chance.uniform(0.2, 2.0))
        if kind in ("reset-before", "zombie"):
            return _reset(writer)
        if kind in ("error-500", "error-503", "slow-down"):
            await _send(writer, _error(kind), body=request.method != "HEAD")
            return True
        if kind == "unconditional":
            lines = (line for line in request.head.split(b"\r\n") if not line.lower().startswith(b"if-none-match:"))
            request.head = b"\r\n".join(lines)
        answer = await self._ask(request)
        if kind == "reset-after":
            return _reset(writer)
        if kind == "stall":
            await asyncio.sleep(faults.stall_s)
        if kind == "late-error":
            answer = _error(kind)
        half = answer.body[: len(answer.body) // 2]
        if kind == "short":
            answer = Answer(answer.status, answer.head, len(half), half)
        if kind == "truncated" and answer.body:
            answer = Answer(answer.status, answer.head, answer.length, half)
        await _send(writer, answer, body=request.method != "HEAD")
        return not (kind == "truncated" and answer.length)

    def _apply_later(self, request: Request, seconds: float) -> None:
        async def apply() -> Answer:
            await asyncio.sleep(seconds)
            return await self._ask(request)

        task = asyncio.create_task(apply())
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def _ask(self, request: Request) -> Answer:
        before = time.time()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        try:
            writer.write(request.head + b"\r\n\r\n" + request.body)
            await writer.drain()
            answer = await _read_answer(reader, request.method)
        finally:
            writer.close()
        if (
            request.method == "PUT"
            and answer.status == 200
            and ("/journal/" in request.path or "/lease/" in request.path)
        ):
            self.faults.written.setdefault(request.path, [before, time.time()])
        return answer

    def _control(self, request: Request) -> Answer:
        if request.method == "POST":
            settings = json.loads(request.body)
            kept = {"counts": self.faults.counts, "written": self.faults.written} if settings.pop("keep", False) else {}
            self.faults = Faults.of({**settings, **kept})
        body = json.dumps({"counts": self.faults.counts, "written": self.faults.written}).encode()
        return Answer(200, [b"HTTP/1.1 200 OK"], len(body), body)


async def _read_head(reader: asyncio.StreamReader) -> tuple[bytes, dict[str, str]] | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    pairs = (line.decode("latin-1").partition(":") for line in head.split(b"\r\n")[1:])
    return head, {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    if (found := await _read_head(reader)) is None:
        return None
    head, fields = found
    if fields.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await writer.drain()
    assert "transfer-encoding" not in fields, "clients here give the length of what they send"
    body = await reader.readexactly(int(fields.get("content-length", 0)))
    method, path = head.split(b" ")[:2]
    kept = [line for line in head.split(b"\r\n") if not line.lower().startswith((b"expect:", b"connection:"))]
    return Request(method.decode(), path.decode(), b"\r\n".join([*kept, b"Connection: close"]), body)


async def _read_answer(reader: asyncio.StreamReader, method: str) -> Answer:
    found = await _read_head(reader)
    if found is None:
        raise ConnectionResetError("the server closed the connection")
    head, fields = found
    status = int(head.split(b" ")[1])
    body = b"" if method == "HEAD" or status in (204, 304) else await reader.read()
    length = int(fields.get("content-length", len(body)))
    if fields.get("transfer-encoding") == "chunked":
        body = _joined(body)
        length = len(body)
    dropped = (b"content-length:", b"connection:", b"transfer-encoding:", b"keep-alive:")
    return Answer(status, [line for line in head.split(b"\r\n") if not line.lower().startswith(dropped)], length, body)


def _joined(chunked: bytes) -> bytes:
    """The content of a chunked body."""
    content = b""
    while chunked:
        size, _, rest = chunked.partition(b"\r\n")
        number = int(size.split(b";")[0], 16)
        if not number:
            break
        content, chunked = content + rest[:number], rest[number + 2 :]
    return content


async def _send(writer: asyncio.StreamWriter, answer: Answer, body: bool = True) -> None:
    length = [] if answer.status == 204 else [b"Content-Length: %d" % answer.length]
    first = answer.head[0].replace(b"HTTP/1.0", b"HTTP/1.1", 1)
    writer.write(b"\r\n".join([first, *answer.head[1:], *length]) + b"\r\n\r\n" + (answer.body if body else b""))
    await writer.drain()


def _error(kind: str) -> Answer:
    status, code = ERRORS[kind]
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    return Answer(status, [b"HTTP/1.1 %d Injected" % status, b"Content-Type: application/xml"], len(body), body)


def _reset(writer: asyncio.StreamWriter) -> bool:
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False


async def main(upstream: int) -> None:
    server = await asyncio.start_server(Proxy(upstream).serve, "127.0.0.1", 0, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
