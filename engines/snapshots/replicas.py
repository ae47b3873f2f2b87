"""Replicas of shards in another node's memory, over a plain TCP stream.

`ReplicaServer` runs in one process per node (its agent) and keeps what peers `put`, beside the node's own shards, in
`segments.node_folder(run)`. It acknowledges a replica after verifying it. `Peer` is the other end: a `memory.Holder`
for a rank that takes snapshots and a `sources.Source` for one that recovers.

Request: one line of JSON {"token", "op", "run", "name", "bytes", "milestones"}, then the bytes of a put. Answer: one
line of JSON {"bytes"} and that many bytes, or {"error"}. The token keeps strangers out; the stream is not encrypted, so
it belongs into the cluster's own network.
"""

import contextlib
import dataclasses
import hmac
import json
import mmap
import os
import re
import socket
import socketserver
import threading
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO

from engines.snapshots.milestones import NO_MILESTONES, Milestones
from engines.snapshots.segments import WRITING, node_folder, sealed
from engines.snapshots.shard import Layout, Shard, ShardName, parse_shard, read_layout
from infra.addresses import family_of
from infra.errors import CheckpointError, StoreError
from infra.storage.files import Moved, unseen

LINE_BYTES = 1 << 16
PIECE_BYTES = 8 << 20
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ReplicaServer:
    """Serves this node's shards and takes others'; use it as a context manager, or call `close`.

    Args:
        token: what clients must know.
        root: where the runs' folders lie.
        keep: replicas kept of each rank.
    """

    def __init__(
        self, token: str, *, host: str = "127.0.0.1", port: int = 0, root: Path = Path("/dev/shm"), keep: int = 2
    ) -> None:
        self.token, self.root, self.keep = token, root, keep
        self._server = _Server((host, port), _Request, self)
        self.host, self.port = host, int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="replicas", daemon=True)
        self._thread.start()

    def __enter__(self) -> "ReplicaServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request: dict[str, Any], stream: BufferedIOBase) -> bytes | Path:
        """What to send back: bytes, or a file's content."""
        if not hmac.compare_digest(str(request.get("token", "")), self.token):
            raise StoreError("wrong token")
        if not RUN.fullmatch(str(request.get("run"))):
            raise StoreError(f"not a run: {request.get('run')!r}")
        folder = node_folder(request["run"], self.root)
        if request["op"] == "list":
            return json.dumps([str(name) for name in sealed(folder)]).encode()
        name = ShardName.parse(request["name"])
        if name is None:
            raise StoreError(f"not a shard: {request['name']!r}")
        if request["op"] == "put":
            milestones = Milestones(*map(int, request["milestones"]))
            receive(folder, name, int(request["bytes"]), stream, self.keep, milestones)
            return b""
        path = folder / str(name)
        if not path.is_file():
            raise CheckpointError(f"no {name} here")
        return read_layout(path).encode() if request["op"] == "layout" else path


def receive(
    folder: Path,
    name: ShardName,
    size: int,
    stream: BufferedIOBase,
    keep: int,
    milestones: Milestones = NO_MILESTONES,
) -> None:
    """Read `size` bytes into a file that appears under its name only once it is verified.

    Raises:
        CheckpointError: what arrived is damaged or another shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writing = folder / f"{name}{WRITING}"
    older = [one for one in sealed(folder) if (one.generation, one.rank) == (name.generation, name.rank)]

    def room(tight: bool) -> int:
        stay = milestones.kept((one.step for one in older), tight) | {one.step for one in older[-keep:]}
        spare = [one for one in older if one.step < name.step and one.step not in stay]
        if spare:  # its memory is used again: cheaper than fresh pages
            (folder / str(spare[0])).rename(writing)
        descriptor = os.open(writing, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, size)
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            os.close(descriptor)
            writing.unlink()
            raise
        return descriptor

    try:
        descriptor = room(tight=False)
    except OSError:
        descriptor = room(tight=True)
    try:
        mapped = memoryview(mmap.mmap(descriptor, size))
        read_exactly(stream, mapped)
        if (arrived := parse_shard(mapped, str(name)).name) != name:
            raise CheckpointError(f"the shard sent as {name} is {arrived}")
        writing.rename(folder / str(name))
    except BaseException:
        writing.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def read_exactly(stream: BufferedIOBase, view: memoryview, moved: Moved = unseen) -> None:
    """Fill `view` from a stream that ends no earlier; `moved` is called after every few MiB."""
    position = 0
    while position < len(view):
        count = stream.readinto(view[position : position + PIECE_BYTES])
        if not count:
            raise StoreError(f"the connection ended after {position} of {len(view)} bytes")
        position += count
        moved()


class Peer:
    """The shards on another node. One connection, made when it is first needed and again after an error.

    Args:
        run: whose shards.
        timeout_s: of every wait for the network.
        milestones: of the replicas put there.
    """

    def __init__(
        self,
        host: str,
        port: int,
        token: str,
        run: str,
        *,
        timeout_s: float = 20.0,
        milestones: Milestones = NO_MILESTONES,
    ) -> None:
        self.host, self.port, self.run, self.timeout_s = host, port, run, timeout_s
        self._milestones = milestones
        self._token = token
        self._connection: socket.socket | None = None
        self._cut = False
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return f"peer {self.host}:{self.port}"

    def put(self, name: ShardName, path: Path) -> None:
        """Have a replica of a sealed file there, verified; StoreError when that failed."""
        with path.open("rb") as file:
            self._ask("put", name, file)

    def names(self) -> list[ShardName]:
        found = [ShardName.parse(text) for text in json.loads(bytes(self._ask("list")))]
        return [name for name in found if name is not None]

    def layout(self, name: ShardName) -> Layout:
        return Layout.decode(bytes(self._ask("layout", name)))

    def open(self, name: ShardName, moved: Moved = unseen) -> Shard:
        """Fetched into this process's memory and verified here."""
        return parse_shard(self._ask("get", name, moved=moved), f"{self}: {name}")

    def cut(self) -> None:
        """Wake a thread that waits for this peer, and let nothing wait again; callable from any thread."""
        self._cut = True
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _ask(
        self, op: str, name: ShardName | None = None, payload: BinaryIO | None = None, moved: Moved = unseen
    ) -> memoryview:
        request: dict[str, Any] = {"token": self._token, "op": op, "run": self.run}
        if name is not None:
            request["name"] = str(name)
        if payload is not None:
            request["bytes"] = os.fstat(payload.fileno()).st_size
            request["milestones"] = list(dataclasses.astuple(self._milestones))
        with self._lock, self._errors(op):
            connection = self._connect()
            connection.sendall(json.dumps(request).encode() + b"\n")
            if payload is not None:
                connection.sendfile(payload)
            with connection.makefile("rb") as stream:
                answer = json.loads(stream.readline(LINE_BYTES) or b'{"error": "it hung up"}')
                if "error" in answer:
                    kind = CheckpointError if answer.get("damaged") else StoreError
                    raise kind(f"{self}: {answer['error']}")
                content = memoryview(bytearray(answer["bytes"]))
                read_exactly(stream, content, moved)
            return content

    def _connect(self) -> socket.socket:
        if self._cut:
            raise StoreError(f"{self}: was cut")
        if self._connection is None:
            self._connection = socket.create_connection((self.host, self.port), timeout=min(3.0, self.timeout_s))
            self._connection.settimeout(self.timeout_s)
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._cut:  # while it connected, when there was nothing to shut down
                raise StoreError(f"{self}: was cut")
        return self._connection

    @contextlib.contextmanager
    def _errors(self, op: str) -> Iterator[None]:
        """After any error the connection may be in the middle of something: it is not used again."""
        try:
            yield
        except (OSError, ValueError) as error:
            self._drop()
            raise StoreError(f"{self}: {op} failed: {error}") from error
        except (StoreError, CheckpointError):
            self._drop()
            raise

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: Any, replicas: ReplicaServer) -> None:
        self.replicas = replicas
        self.address_family = family_of(address[0])
        super().__init__(address, handler)


class _Request(socketserver.StreamRequestHandler):
    """One client, one request after the other; after an error the connection is closed."""

    server: _Server

    def handle(self) -> None:
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):
            while line := self.rfile.readline(LINE_BYTES):
                if not self._handle(line):
                    return

    def _handle(self, line: bytes) -> bool:
        try:
            answer = self.server.replicas.answer(json.loads(line), self.rfile)
            if isinstance(answer, Path):
                with answer.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    self._say({"bytes": size})
                    self.connection.sendfile(file, count=size)
            else:
                self._say({"bytes": len(answer)})
                self.connection.sendall(answer)
        except (OSError, ValueError, KeyError, StoreError, CheckpointError) as error:
            self._say({"error": str(error), "damaged": isinstance(error, CheckpointError)})
            return False
        return True

    def _say(self, answer: dict[str, Any]) -> None:
        self.connection.sendall(json.dumps(answer).encode() + b"\n")
