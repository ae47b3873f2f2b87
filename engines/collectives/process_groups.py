"""The process groups of one rank under one generation, which another thread can abort.

Who waits for whom: the training thread waits in collectives for its peers. A control thread may call `abort` at any
time, also while the groups are being formed; the training thread then gets `NodeLost` within tens of milliseconds,
calls `leave`, and forms the groups of the next generation in the same process, with any world size.

The rendezvous store is hosted by nobody who can be lost with a rank: `host_store` runs in a node agent (or in rank 0 of
a group that ends when any rank does).

gloo has no abort that wakes a rank blocked on a live peer (torch 2.13). What does is shutting its connections down.
They are told from everything else that the process has open: each rank publishes the ports that its gloo devices
listen on, and only sockets that were opened while the groups were formed, and that end in one of these ports, are
taken. The listeners are left alone: gloo's loop thread throws when one fails, and takes the process with it. Waits that
gloo does not end even then are ended by `gloo_waits`.
"""

import contextlib
import gc
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engines.collectives import gloo_waits
from infra.addresses import is_loopback, listen, unreachable, use_sockets_at
from infra.errors import NodeLost, PeersUnreachable, RecuaError

T = TypeVar("T")

LOST_PEER = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|socket (timeout|closed|is closed)"
    r"|failed to (recv|send)|connectfullmesh|nccl communicator was aborted|communicator is in .*error state",
    re.IGNORECASE,
)
"""What torch.distributed says when the other side of a collective or of the store is gone."""

MEET_S = 5.0
"""How long the way to another machine may take to be there: TCP asks again after 1 s and after 3 s."""


@dataclass(frozen=True)
class StoreAddress:
    """Where a rendezvous store listens, e.g. 10.0.0.4:38211."""

    host: str
    port: int


def host_store(host: str = "127.0.0.1", port: int = 0) -> tuple[dist.TCPStore, StoreAddress]:
    """Serve a rendezvous store from this process for as long as the first value is kept; port 0 takes a free one."""
    store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
    return store, StoreAddress(host, store.port)


class Rendezvous:
    """This process's connection to a rendezvous store, used by one generation after the other.

    It is kept because connecting may be slow: torch looks up the name of the other side, and a name server that does
    not answer costs 5 s.

    Args:
        address: of the store.
        hosts: serve it from this process; for rank 0 of a group that ends when any rank does.
        timeout_s: until it must have answered.
    """

    def __init__(self, address: StoreAddress, *, hosts: bool = False, timeout_s: float = 60.0) -> None:
        self.address, self._hosts, self._timeout_s = address, hosts, timeout_s
        self._store: dist.TCPStore | None = None
        self._connections: set[Socket] = set()

    def store(self) -> dist.TCPStore:
        """Connected (again, after `cut`)."""
        if self._store is None:
            timeout = timedelta(seconds=self._timeout_s)
            host, port = self.address.host, self.address.port
            before = open_sockets()
            store = dist.TCPStore(host, port, is_master=self._hosts, wait_for_workers=False, timeout=timeout)
            opened = open_sockets() - before
            self._connections = {entry for entry in opened if entry.remote is not None and entry.remote[1] == port}
            self._store = store
        return self._store

    def missing_way(self, given_up: Callable[[], bool] = lambda: False) -> str | None:
        """Why it cannot be reached, e.g. "10.0.0.4:38211, where ranks meet: no answer"; None where it can. torch would
        try in silence until its timeout. `given_up`: see `unreachable`."""
        place = self.address.host, self.address.port
        if self._hosts or self._store is not None:
            return None
        why = unreachable([place], MEET_S, given_up).get(place)
        return None if why is None else f"{place[0]}:{place[1]}, where ranks meet: {why}"

    def cut(self) -> None:
        """Wake a thread of this process that waits for a key; callable from any thread."""
        for entry in self._connections:
            entry.shut_down()
        self._store, self._connections = None, set()


class ProcessGroups:
    """The default group of one generation and all groups that are made inside `form`.

    Args:
        generation: one that no earlier groups over the same store had.
        rank, world_size: this process's place in it.
        rendezvous: where the ranks meet; a store object for a single rank.
        device: cuda adds NCCL for CUDA tensors to gloo for host tensors.
        address: of this machine, where its peers reach it; None: what gloo finds by itself, on a single machine.
        timeout_s: after which a collective on a live but silent peer fails.
        form_timeout_s: after which forming fails because a peer did not come.
    """

    def __init__(
        self,
        generation: int,
        rank: int,
        world_size: int,
        rendezvous: Rendezvous | dist.Store,
        *,
        device: torch.device | None = None,
        address: str | None = None,
        timeout_s: float = 600.0,
        form_timeout_s: float = 60.0,
    ) -> None:
        self.address = address
        self.generation, self.rank, self.world_size = generation, rank, world_size
        self.device = device or torch.device("cpu")
        self.timeout_s, self.form_timeout_s = timeout_s, form_timeout_s
        self._rendezvous = rendezvous
        self._lock = threading.Lock()
        self._aborted = self._broken = False
        self._before: set[Socket] | None = None  # while forming: what was open already
        self._connections: set[Socket] = set()  # once formed: gloo's connections and the store's

    @property
    def aborted(self) -> bool:
        return self._aborted

    def form(self, build: Callable[[], T], reached: Callable[[], None] = lambda: None) -> T:
        """(collective) Make the default group, then what `build` makes (meshes, subgroups); returns what it returns.

        `reached` is called before each of the parts in which ranks wait for each other.

        Raises:
            PeersUnreachable: two of the machines have no way to each other.
            NodeLost: a peer did not come within `form_timeout_s`, was lost meanwhile, or `abort` was called.
            ConfigError: the address is on no interface of this machine.
        """
        with self._lock:
            if self._aborted:
                raise NodeLost(f"{self} was aborted before it was formed")
            self._before = open_sockets()
        with self.naming_lost_peers(forming=True):
            meeting = self._rendezvous
            reached()
            missing = None
            if self.address is not None and self.world_size > 1 and isinstance(meeting, Rendezvous):
                missing = meeting.missing_way(lambda: self._aborted)
            if missing is not None and not self._aborted:
                raise PeersUnreachable([(self.rank, self.rank)], [f"{self.address} to {missing}"])
            shared = meeting.store() if isinstance(meeting, Rendezvous) else meeting
            if self._aborted:  # while it connected, when nobody could wake it
                if isinstance(meeting, Rendezvous):
                    meeting.cut()
                raise NodeLost(f"{self} was aborted while it was formed")
            store = dist.PrefixStore(f"generation-{self.generation}", shared)
            if self.address is not None:
                place = use_sockets_at(self.address)
                meet_peers(store, self.rank, self.world_size, self.address, place, lambda: self._aborted)
            self._init_default(store)
            reached()
            built = build()
            reached()
            connections = self._find_connections(store)
            for group in _groups():
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.timeout_s), group)
        with self._lock:
            self._connections, self._before = connections, None
            if self._aborted:
                raise NodeLost(f"{self} was aborted while it was formed")
        return built

    def abort(self, deadline_s: float = 5.0) -> bool:
        """Wake this process's training thread wherever it waits for a peer; callable from any thread, more than once.

        Returns False when gloo or NCCL did not let go within `deadline_s`: the process should then be killed.
        """
        with self._lock:
            self._aborted = True
            forming = self._before is not None
            victims = self._connections if self._before is None else open_sockets() - self._before
            if forming and isinstance(self._rendezvous, Rendezvous):
                self._rendezvous.cut()
            for victim in victims:
                if victim.remote is not None:
                    victim.shut_down()
        released = forming or self._release(deadline_s)
        if self.device.type != "cuda" or not dist.is_initialized():
            return released
        # Every communicator's abort sits between one group start and end, or they would wait for each other.
        aborting = threading.Thread(target=dist.distributed_c10d._abort_process_group, daemon=True)
        aborting.start()
        aborting.join(deadline_s)
        return released and not aborting.is_alive()

    def leave(self) -> None:
        """Free the groups, broken or not; whatever used them (models, meshes) should have been dropped."""
        if self._broken and not self._aborted:
            self.abort()  # destroying a group waits for its threads
        with self._lock:
            self._connections, self._before = set(), None
        if dist.is_initialized():
            dist.destroy_process_group()
        forget_meshes()
        gc.collect()  # meshes and wrapped modules hold groups in cycles; their sockets and threads go with them

    @contextlib.contextmanager
    def naming_lost_peers(self, forming: bool = False) -> Iterator[None]:
        """A collective that failed because the other side is gone, or because of `abort`, raises NodeLost.

        So does one that `abort` ended without an error.
        """
        try:
            yield
            if self._aborted:
                raise NodeLost(f"{self} was aborted")
        except RecuaError:
            raise
        except RuntimeError as error:
            late = forming and isinstance(error, dist.DistError)
            if not (self._aborted or late or LOST_PEER.search(str(error))):
                raise
            self._broken = True
            lines = str(error).strip().splitlines() or [type(error).__name__]
            why = "was aborted" if self._aborted else "lost a peer"
            raise NodeLost(f"{self} {why}: {lines[0]}") from error

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}, generation {self.generation},"

    def _release(self, deadline_s: float) -> bool:
        """Wait until gloo has seen that its connections are gone, and nobody waits for it any more."""
        meeting = self._rendezvous
        port = meeting.address.port if isinstance(meeting, Rendezvous) else None
        deadline = time.monotonic() + deadline_s
        while True:
            with self._lock:
                if not self._connections:
                    return True  # no groups yet, or left already
                seen = not any(entry.is_open() for entry in self._connections if not entry.is_on(port))
                if seen and not gloo_waits.wake():
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)

    def _init_default(self, store: dist.Store) -> None:
        options: dict[str, Any] = {}
        if self.device.type == "cuda":
            # Not torch's watchdog but the control thread decides when a communicator is given up.
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
            os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
            nccl = dist.ProcessGroupNCCL.Options()
            nccl.config.blocking = 0  # an abort gets through to a communicator that is still connecting
            options = {"device_id": self.device, "pg_options": nccl}
        # Names count the groups made so far, also one that was given up while it was formed: its members would wait
        # under another name than a new process does (torch 2.13 resets the count only with a destroyed group).
        dist.distributed_c10d._world.group_count = 0
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=self.form_timeout_s),
            **options,
        )

    def _find_connections(self, store: dist.Store) -> set["Socket"]:
        """(collective) Of the sockets opened since `form` began, those of gloo and of this generation's store."""
        assert self._before is not None
        opened = open_sockets() - self._before
        listening = [entry.local for entry in opened if entry.listens]
        store.set(f"listens/{self.rank}", json.dumps(listening))
        keys = [f"listens/{rank}" for rank in range(self.world_size)]
        theirs = {tuple(address) for value in store.multi_get(keys) for address in json.loads(value)}
        return {
            entry
            for entry in opened
            if entry.remote is not None and (entry.local in listening or entry.remote in theirs)
        }


def meet_peers(
    store: dist.Store,
    rank: int,
    world_size: int,
    machine: str,
    address: str,
    given_up: Callable[[], bool] = lambda: False,
) -> None:
    """(collective) Try the ways between all machines of a group, as gloo will use them: it would only say that somebody
    did not come.

    Of the ranks on one machine the first one tries. Nothing is tried where all are on one.

    Args:
        machine: its address in Ray. address: that on which gloo listens there. given_up: see `unreachable`.

    Raises:
        PeersUnreachable: on every rank, with all the ways that there are not.
    """
    if world_size == 1:
        return
    with listen(address, backlog=2 * world_size) as door:
        store.set(f"door/{rank}", json.dumps([machine, rank, address, door.getsockname()[1]]))
        doors = [json.loads(found) for found in store.multi_get([f"door/{other}" for other in range(world_size)])]
        first = {name: (other, host, port) for name, other, host, port in reversed(doors)}
        if len(first) == 1:
            return
        others = {name: found for name, found in first.items() if name != machine}
        missing = _ways_missing(machine, rank, others, given_up) if first[machine][0] == rank else []
        store.set(f"missing/{rank}", json.dumps(missing))
        answers = store.multi_get([f"missing/{other}" for other in sorted(found[0] for found in first.values())])
    ways = [way for answer in answers for way in json.loads(answer)]
    if ways:
        raise PeersUnreachable([(one, other) for one, other, _ in ways], [text for _, _, text in ways])


def _ways_missing(
    machine: str, rank: int, others: Mapping[str, tuple[int, str, int]], given_up: Callable[[], bool]
) -> list[tuple[int, int, str]]:
    """From this rank to `others`, (first rank there, host, port) by machine: (this rank, that one, in words)."""
    places = {(host, port) for _, host, port in others.values()}
    failed = {place: "that is loopback" for place in places if is_loopback(place[0])}
    failed |= unreachable(places - failed.keys(), MEET_S, given_up)
    missing = []
    for name, (other, host, port) in others.items():
        if (why := failed.get((host, port))) is not None:
            where = name if host == name else f"{name} (at {host})"
            missing.append((rank, other, f"{machine} to {where}: {why}"))
    return missing


def forget_meshes() -> None:
    """Empty torch's caches of what DTensors on a mesh do (torch 2.13).

    Two meshes count as equal there when their shapes and ranks are, whatever this process's own rank is and whichever
    groups lie under them: with another rank in an equal mesh the old answers would train on the wrong shards.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return  # no mesh was used, and importing it takes seconds
    from torch.distributed.tensor import DTensor, _collective_utils, _random, _redistribute, _sharding_prop

    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    fresh = _sharding_prop.LocalLRUCache(propagator.propagate_op_sharding_non_cached)  # for every thread
    propagator.propagate_op_sharding = fresh
    type(propagator)._propagate_tensor_meta_cached.cache_clear()
    torch._C._clear_DTensor_sharding_propagator_cache()  # type: ignore[attr-defined]
    _redistribute._gen_transform_infos.cache_clear()
    _collective_utils.MeshTopoInfo.build_from_mesh.cache_clear()
    _random._rng_tracker = None


@dataclass(frozen=True)
class Socket:
    """One open TCP socket of this process; the inode tells it from a later one under the same descriptor."""

    descriptor: int
    inode: int
    local: tuple[str, int]
    remote: tuple[str, int] | None
    listens: bool

    def is_open(self) -> bool:
        try:
            return os.fstat(self.descriptor).st_ino == self.inode
        except OSError:
            return False

    def is_on(self, port: int | None) -> bool:
        return port is not None and port in (self.local[1], self.remote[1] if self.remote is not None else None)

    def shut_down(self) -> None:
        with contextlib.suppress(OSError):
            if not self.is_open():
                return
            with _borrowed(self.descriptor) as connection:
                connection.shutdown(socket.SHUT_RDWR)


def open_sockets() -> set[Socket]:
    """All TCP sockets that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            inode = os.fstat(descriptor).st_ino
            with _borrowed(descriptor) as entry:
                if entry.family not in (socket.AF_INET, socket.AF_INET6) or entry.type != socket.SOCK_STREAM:
                    continue
                listens = bool(entry.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
                try:
                    remote = entry.getpeername()[:2]
                except OSError:
                    remote = None
                found.add(Socket(descriptor, inode, entry.getsockname()[:2], remote, listens))
    return found


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A socket object on somebody else's descriptor, through a duplicate that is closed again."""
    duplicate = os.dup(descriptor)
    try:
        entry = socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise
    with entry:
        yield entry


def _groups() -> list[Any]:
    return list(dist.distributed_c10d._world.pg_map)
