"""Faults of the elastic campaign that come from outside of the ranks: real signals, real bytes, real nodes."""

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from cluster.node.host_memory import node_root
from engines.snapshots import ShardName
from tests.chaos.elastic_losses import Taken
from tests.chaos.elastic_schedule import Fault

if TYPE_CHECKING:
    from tests.chaos.elastic_run import Run

DRAIN_S = 8.0
"""From a notice to the node's end."""
NOTICE_S = 14.0
"""The same where the metadata service says it, which is asked every 5 s."""
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
            "notice": self.notice,
            "sigterm": self.sigterm,
            "store": self.store,
        }
        return deeds[fault.kind](fault)

    def node(self, fault: Fault) -> bool:
        """The machine is gone: raylet, ranks, agent, memory; another one joins."""
        node = self._node(fault)
        return node is not None and self._lose(node, fault.kind, with_workers=True)

    def raylet(self, fault: Fault) -> bool:
        """Only the raylet is killed; the node's other processes are left to notice."""
        node = self._node(fault)
        return node is not None and self._lose(node, fault.kind, with_workers=False)

    def agent(self, fault: Fault) -> bool:
        node = self._node(fault)
        if node is None or not self._signal_agent(node, signal.SIGKILL):
            return False
        self._run.witness.agent_killed(node_root(node).name, self._run.patience)
        return True

    def driver(self, fault: Fault) -> bool:
        """Killed; the next one starts at once, or after the ranks have trained alone for a while."""
        if self._run.drivers[-1].process.poll() is not None:
            return False
        self._run.drivers[-1].kill()
        self._run.start_driver(after_s=float(fault.other % 3))
        return True

    def driver_stop(self, fault: Fault) -> bool:
        """It sleeps, and goes on."""
        if self._run.drivers[-1].process.poll() is not None:
            return False  # killed, and the next one is yet to start
        pid = self._run.drivers[-1].process.pid
        os.kill(pid, signal.SIGSTOP)
        self._later(STOPPED_S, lambda: _send(pid, signal.SIGCONT))
        return True

    def flip(self, fault: Fault) -> bool:
        """One bit of one copy of the rank's newest shard, its own or a replica; then the rank dies. In a recovery it is
        the copy that the rank reads first."""
        found = self._run.witness.whose(self._run.pids[fault])
        names: dict[ShardName, list[Path]] = {}
        for folder in self._run.memory():
            for path in folder.glob("*.shard"):
                name = ShardName.parse(path.name)
                if name is not None:
                    names.setdefault(name, []).append(path)
        if found is None or not names:
            return False
        rank, root = found[1].rank, found[0].parents[2]
        newest = max(names, key=lambda name: (name.rank == rank % name.world_size, name.generation, name.step))
        copies = sorted(names[newest])
        copy = copies[fault.other % len(copies)]
        if fault.phase == "recovery":
            copy = next((path for path in copies if path.is_relative_to(root)), copy)
        began, shard = time.monotonic(), (newest.generation, newest.rank)
        if not _flip(copy, fault.at):
            return False
        self._run.witness.taken.append(Taken("flip", began, copy.parents[1].name, shard, until=time.monotonic()))
        if fault.phase != "recovery":
            _send(found[1].pid, signal.SIGKILL)
        return True

    def wipe(self, fault: Fault) -> bool:
        """All ranks die and all memory is lost: only the store is left, which has to have something."""
        store = self._run.place.store(self._run.url) if self._run.url else None
        folder = self._run.state / "snapshots" / self._run.group / "manifests"
        kept = list(store.list(f"snapshots/{self._run.group}/manifests")) if store else list(folder.glob("*"))
        began = time.monotonic()
        if not kept or not self._kill_ranks(list(self._run.witness.ranks())):
            return False
        for memory in self._run.memory():
            for path in memory.glob("*.shard*"):
                path.unlink(missing_ok=True)
        self._run.witness.taken.append(Taken("wipe", began, until=time.monotonic()))
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
            self._end_later(fault, node, DRAIN_S)
        return bool(accepted)

    def notice(self, fault: Fault) -> bool:
        """The cloud's metadata service says that the machine is reclaimed, and it is."""
        node = self._node(fault)
        agent = None if node is None else self._agent(node)
        if node is None or agent is None:
            return False
        self._run.cloud.reclaimed[agent.pid] = time.time() + NOTICE_S
        self._end_later(fault, node, NOTICE_S)
        return True

    def sigterm(self, fault: Fault) -> bool:
        """The machine is shut down: SIGTERM first, which the agent hears, and the end after the grace."""
        node = self._node(fault)
        if node is None or not self._signal_agent(node, signal.SIGTERM):
            return False
        self._end_later(fault, node, DRAIN_S)
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
        """The node of the rank that came by."""
        found = self._run.witness.whose(self._run.pids[fault])
        if found is None:
            return None
        root = found[0].parents[2].name
        return next((node for node in self._run.place.nodes if node_root(node).name == root), None)

    def _lose(self, node: str, what: str, *, with_workers: bool, replace: bool = True) -> bool:
        began, root = time.monotonic(), node_root(node)
        if not self._run.place.lose_node(node, with_workers):
            return False
        self._run.lost.add(root.name)
        self._run.witness.taken.append(Taken(what, began, root.name))
        if with_workers:
            shutil.rmtree(root, ignore_errors=True)
        if replace:
            self._run.place.join_node()
        return True

    def _end_later(self, fault: Fault, node: str, seconds: float) -> None:
        """Another node joins at once; this one goes."""
        self._later(seconds, lambda: self._lose(node, fault.kind, with_workers=True, replace=False))
        self._run.place.join_node()

    def _agent(self, node: str) -> psutil.Process | None:
        for process in self._run.place.children(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "PretrainAgent" in " ".join(process.cmdline()):
                    return process
        return None

    def _signal_agent(self, node: str, number: signal.Signals) -> bool:
        process = self._agent(node)
        with contextlib.suppress(psutil.NoSuchProcess):
            if process is not None:
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
