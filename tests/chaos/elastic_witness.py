"""What the ranks of a group say in their beacons, read by nobody of the group.

Who waits for whom: nobody. Threads of its own look, so that what the campaign does meanwhile hides no generation.
"""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import psutil

from cluster.node.beacons import BeaconReader, Record
from engines.snapshots import ShardName
from infra.errors import StoreError
from infra.storage import Store
from tests.chaos.elastic_losses import Life, Stored, Taken

SHARED = Path("/dev/shm")
LOOK_S, FIND_S, STORE_S = 0.02, 0.2, 0.5
AT_WORK = ("joined", "finished", "boundary")
AGENT_BACK_S = 20.0
"""An agent that was killed is expected to keep replicas again by then; less where the first new one is seen."""


class Witness:
    """Of one run; `group` is set when it is known. `store` is where its snapshots are flushed to, asked directly."""

    def __init__(self, store: Store) -> None:
        self.stored: dict[str, Stored] = {}
        """By the names of their manifests."""
        self.lives: dict[int, Life] = {}
        self.taken: list[Taken] = []
        """What the campaign's faults made unreadable."""
        self.group = ""
        self._seats: dict[int, dict[int, str]] = defaultdict(dict)
        self._at_work: set[tuple[Path, int]] = set()
        self._readers: dict[Path, BeaconReader] = {}
        self._store = store
        self._failure: Exception | None = None
        self._found_at = 0.0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        looks = (self._watch, self._watch_store)
        self._threads = [threading.Thread(target=look, name="witness", daemon=True) for look in looks]

    @property
    def worlds(self) -> dict[int, int]:
        """Ranks of each generation."""
        return {generation: life.world_size for generation, life in self.lives.items()}

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        if self._failure is not None:
            raise self._failure

    def ranks(self) -> dict[int, tuple[Path, Record]]:
        """Of the newest generation, by rank: beacon and record of the living."""
        alive = [(path, record) for path, record in self._records() if psutil.pid_exists(record.pid) and path.exists()]
        newest = max((record.generation for _, record in alive), default=0)
        return {record.rank: (path, record) for path, record in alive if newest and record.generation == newest}

    def whose(self, pid: int) -> tuple[Path, Record] | None:
        """The beacon of a process, which may be dead by now."""
        return next(((path, record) for path, record in self._records() if record.pid == pid), None)

    def seen(self) -> dict[str, Iterable[object]]:
        """All of it, for people."""
        return {"lives": sorted(self.lives.items()), "taken": self.taken, "stored": self.stored.values()}

    def agent_killed(self, node: str, patience: float) -> None:
        """Nobody keeps replicas there until another agent does."""
        now = time.monotonic()
        self.taken.append(Taken("agent", now, node, until=now + AGENT_BACK_S * patience))

    def _records(self) -> list[tuple[Path, Record]]:
        with self._lock:
            return [(path, reader.read()) for path, reader in self._readers.items()]

    def _watch(self) -> None:
        try:
            while not self._ended.wait(LOOK_S):
                if self.group:
                    self._look(time.monotonic())
        except Exception as error:
            self._failure = error  # whoever judges by what is known here has to know

    def _look(self, now: float) -> None:
        if now - self._found_at > FIND_S:
            self._found_at = now
            self._find()
            for one in list(self.taken):
                if one.what == "agent" and one.until > now and self._keeps_again(one):
                    one.until = now
        for path, record in self._records():
            generation = record.generation
            if not generation:
                continue
            self._seats[generation][record.rank] = path.parents[2].name
            if record.state in AT_WORK:
                self._at_work.add((path, generation))
            elif (path, generation) not in self._at_work:
                continue  # what it says of steps is from an older generation
            life = self.lives.get(generation)
            if life is None:
                start, nodes = record.start, self._seats[generation]
                life = self.lives[generation] = Life(nodes, record.world_size, start, start, now, now)
            if record.step > life.reached:
                life.reached, life.advanced_at = record.step, now

    def _find(self) -> None:
        with contextlib.suppress(OSError):  # a node's folder goes meanwhile: the rest is found the next time
            for path in SHARED.glob(f"recua-node-*/recua-{self.group}/beacons/*.beacon"):
                if path not in self._readers:
                    with contextlib.suppress(OSError, ValueError):
                        reader = BeaconReader(path)
                        with self._lock:
                            self._readers[path] = reader

    def _watch_store(self) -> None:
        try:
            while not self._ended.wait(STORE_S):
                with contextlib.suppress(StoreError):
                    self._ask_store()
        except Exception as error:
            self._failure = error

    def _ask_store(self) -> None:
        for key in self._store.list(f"snapshots/{self.group}/manifests") if self.group else ():
            name = key.rpartition("/")[2]
            generation, step = map(int, name.split("-"))
            self.stored.setdefault(name, Stored(generation, step, time.monotonic()))

    def _keeps_again(self, deaf: Taken) -> bool:
        """A replica was put there since."""
        killed_at = time.time() - (time.monotonic() - deaf.at)
        for path in (SHARED / deaf.node / f"recua-{self.group}").glob("*.shard"):
            name = ShardName.parse(path.name)
            if name is not None and self._seats[name.generation].get(name.rank, deaf.node) != deaf.node:
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime > killed_at + 0.5:
                        return True
        return False
