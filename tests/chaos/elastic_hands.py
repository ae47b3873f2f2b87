"""Faults of the elastic campaign that come from outside of the ranks: real signals, real bytes, real nodes."""

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from cluster.host_memory import node_root
from engines.snapshots import ShardName
from tests.chaos.elastic_schedule import Fault

if TYPE_CHECKING:
    from tests.chaos.elastic_run import Run

DRAIN_S = 8.0
"""From a notice to the node's end."""
STOPPED_S = 4.0
"""How long a driver sleeps."""
STORE_S = 6.0
"""How long the store is in trouble, and which trouble: one of these."""
TROUBLE = (
    {"error-503": 0.9},
    {"stall": 0.7},
    {"truncated": 0.5, "short": 0.4},
    {"reset-after": 0.5, "late-error": 0.4},
)


class Hands:
    """Does to a run what a fault says; every method tells whether there was somebody to hit."""

    def __init__(self, run: "Run") -> None:
        self._run = run

    def strike(self, fault: Fault) -> bool:
        deeds = {
            "node": self.node,
            "raylet": self.raylet,
            "agent": self.agent,
            "driver": self.driver,
            "driver-stop": self.driver_stop,
            "flip": self.flip,
            "wipe": self.wipe,
            "drain": self.drain,
            "sigterm": self.sigterm,
            "store": self.store,
        }
        return deeds[fault.kind](fault)

    def node(self, fault: Fault) -> bool:
        """The machine is gone: raylet, ranks, agent, memory; another one joins."""
        node = self._node(fault)
        return node is not None and self._lose(node, with_workers=True)

    def raylet(self, fault: Fault) -> bool:
        """Only the raylet is killed; the node's other processes are left to notice."""
        node = self._node(fault)
        return node is not None and self._lose(node, with_workers=False)

    def agent(self, fault: Fault) -> bool:
        return self._signal_agent(fault, signal.SIGKILL)

    def driver(self, fault: Fault) -> bool:
        """Killed; the next one starts at once, or after the ranks have trained alone for a while."""
        self._run.drivers[-1].kill()
        self._run.start_driver(after_s=float(fault.other % 3))
        return True

    def driver_stop(self, fault: Fault) -> bool:
        """It sleeps, and goes on."""
        pid = self._run.drivers[-1].process.pid
        os.kill(pid, signal.SIGSTOP)
        self._later(STOPPED_S, lambda: _send(pid, signal.SIGCONT))
        return True

    def flip(self, fault: Fault) -> bool:
        """One bit of one copy of the rank's newest shard, its own or a replica; then the rank dies. In a recovery it is
        the copy that the rank reads first."""
        names: dict[ShardName, list[Path]] = {}
        for folder in self._run.memory():
            for path in folder.glob("*.shard"):
                name = ShardName.parse(path.name)
                if name is not None and name.rank == fault.rank:
                    names.setdefault(name, []).append(path)
        if not names:
            return False
        newest = max(names, key=lambda name: (name.generation, name.step))
        copies = sorted(names[newest])
        copy = copies[fault.other % len(copies)]
        if fault.phase != "recovery":
            return _flip(copy, fault.at) and self._kill_ranks([fault.rank])
        node = self._node(fault)
        own = [path for path in copies if node is not None and path.is_relative_to(node_root(node))]
        return _flip((own or [copy])[0], fault.at)

    def wipe(self, fault: Fault) -> bool:
        """All ranks die and all memory is lost: only the store is left, which has to have something."""
        store = self._run.place.store(self._run.url) if self._run.url else None
        folder = self._run.state / "snapshots" / self._run.group / "manifests"
        kept = list(store.list(f"snapshots/{self._run.group}/manifests")) if store else list(folder.glob("*"))
        if not kept or not self._kill_ranks(list(self._run.witness.ranks())):
            return False
        for memory in self._run.memory():
            for path in memory.glob("*.shard*"):
                path.unlink(missing_ok=True)
        return True

    def drain(self, fault: Fault) -> bool:
        """Ray is told that the node is preempted, and at the deadline it is."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        node = self._node(fault)
        if node is None:
            return False
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + DRAIN_S) * 1000)
        accepted, _ = GcsClient(address=self._run.place.address).drain_node(node, reason, "reclaimed", deadline)
        if accepted:
            self._run.place.join_node()
            self._later(DRAIN_S, lambda: self._lose(node, with_workers=True, replace=False))
        return bool(accepted)

    def sigterm(self, fault: Fault) -> bool:
        """The machine is shut down: SIGTERM first, which the agent hears, and the end after the grace."""
        node = self._node(fault)
        if node is None or not self._signal_agent(fault, signal.SIGTERM):
            return False
        self._run.place.join_node()
        self._later(DRAIN_S, lambda: self._lose(node, with_workers=True, replace=False))
        return True

    def store(self, fault: Fault) -> bool:
        """The store is slow, fails, or returns half an object for a while."""
        if not self._run.url:
            return False
        settings = {"seed": fault.at, "match": "/chaos", "stall_s": 2.5}
        self._run.place.faults(**settings, rates=TROUBLE[fault.at % len(TROUBLE)])
        self._later(STORE_S, lambda: self._run.place.faults(script=[]) and None)
        return True

    # ---- who is meant

    def _node(self, fault: Fault) -> str | None:
        """The node of the fault's rank."""
        found = self._run.witness.ranks().get(fault.rank)
        if found is None:
            return None
        root = found[0].parents[2].name
        return next((node for node in self._run.place.nodes if node_root(node).name == root), None)

    def _lose(self, node: str, *, with_workers: bool, replace: bool = True) -> bool:
        if not self._run.place.lose_node(node, with_workers):
            return False
        self._run.lost.add(node_root(node).name)
        if with_workers:
            shutil.rmtree(node_root(node), ignore_errors=True)
        if replace:
            self._run.place.join_node()
        return True

    def _signal_agent(self, fault: Fault, number: signal.Signals) -> bool:
        node = self._node(fault)
        for process in self._run.place.children(node) if node is not None else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[:1] == ["ray::PretrainAgent"] or "PretrainAgent" in " ".join(process.cmdline()):
                    process.send_signal(number)
                    return True
        return False

    def _kill_ranks(self, ranks: list[int]) -> bool:
        living = self._run.witness.ranks()
        pids = [living[rank][1].pid for rank in ranks if rank in living]
        for pid in pids:
            _send(pid, signal.SIGKILL)
        return bool(pids)

    def _later(self, seconds: float, act: object) -> None:
        self._run.later.append((time.monotonic() + seconds, act))  # type: ignore[arg-type]


def _flip(path: Path, draw: int) -> bool:
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size // 2 + draw)
            byte = file.read(1)
            file.seek(size // 2 + draw)
            file.write(bytes([byte[0] ^ (1 << draw % 8)]))
    except (OSError, IndexError):
        return False
    return True


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
