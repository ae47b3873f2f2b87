"""Runs the peers: starts their processes, reads their ranks' log, kills ranks, and leaves nothing behind.

Who waits for whom: nothing waits for this process. It reads the log of steps every few milliseconds.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.peers import torchft_folder
from bench.recovery import ray_train, torchft
from bench.recovery.course import Course
from bench.recovery.job import RANKS, STEPS, THREADS

ROOT = Path(__file__).resolve().parents[2]
LOOK_S = 0.005
LIMIT_S = 240.0
"""A peer without a completed step for this long counts as failed."""
GRACE_S = 20.0
"""Time for a peer to end in an orderly way."""
TORCHRUN = {"max-restarts": "1000", "monitor-interval": "0.1", "rdzv-backend": "c10d", "rdzv-endpoint": "localhost:0"}
TORCHRUN_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Otherwise torch 2.13 keeps one store for all restarts, in which new ranks find the addresses of dead ones."""


@dataclass(frozen=True)
class Peer:
    """A peer's processes. `restarted`: this process restarts a process that ends, as a launcher would; otherwise the
    peer does that itself. `settings` are for the report."""

    commands: Sequence[Sequence[str]]
    restarted: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def peer(name: str, folder: Path) -> Peer:
    """The peer `name` of `PEERS`; installs it if it is missing.

    Raises:
        RuntimeError: it cannot be installed.
    """
    own = [sys.executable, "-m", f"bench.recovery.{name}", str(folder)]
    if name == "torchft":
        commands = [[*own, "lighthouse"], *([*own, str(number)] for number in range(RANKS))]
        return Peer(commands, True, {"PYTHONPATH": str(torchft_folder())}, torchft.settings())
    if name == "ray_train":
        return Peer([own], settings={**ray_train.ENVIRONMENT, "checkpoint_every": 1})
    options = [f"--{key}={value}" for key, value in {"nproc-per-node": RANKS, **TORCHRUN}.items()]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *own[1:]]
    settings = {**TORCHRUN, **TORCHRUN_ENVIRONMENT, "checkpoint_every": 1}
    return Peer([command], environment=TORCHRUN_ENVIRONMENT, settings=settings)


PEERS = ("torchft", "ray_train", "torchrun")


def measure(name: str, folder: Path, kills: int) -> tuple[Course, Mapping[str, Any]]:
    """One run of a peer with kills, in `folder` (see `job.prepare`), and its settings.

    Raises:
        RuntimeError: it cannot be installed, or does not recover; the message ends with its last output.
    """
    chosen, course = peer(name, folder), Course(kills)
    pids: dict[int, int] = {}
    processes = Processes(chosen, folder / "peer.log")
    (folder / STEPS).touch()
    heard = time.monotonic()
    try:
        with (folder / STEPS).open() as steps:
            while not course.over:
                for line in steps:
                    said, heard = json.loads(line), time.monotonic()
                    pids[said["rank"]] = said["pid"]
                    course.step(said["step"], said["time"], pids, ranks=said["ranks"])
                if not processes.alive() or time.monotonic() - heard > LIMIT_S:
                    raise RuntimeError(f"{name} does not recover: {processes.last_words()}")
                time.sleep(LOOK_S)
    finally:
        processes.end()
    return course, chosen.settings


class Processes:
    """A peer's running processes."""

    def __init__(self, peer: Peer, log: Path) -> None:
        self._peer, self._path = peer, log
        self._log = log.open("ab")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TORCH"))}
        path = [str(ROOT), *filter(None, [peer.environment.get("PYTHONPATH")])]
        always = {"OMP_NUM_THREADS": str(THREADS), "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        self._environment = {**kept, **always, **peer.environment, "PYTHONPATH": os.pathsep.join(path)}
        self._running = [self._start(command) for command in peer.commands]

    def alive(self) -> bool:
        """Whether the peer still runs; restarts processes that this process must restart."""
        for place, process in enumerate(self._running):
            if process.poll() is not None:
                if not self._peer.restarted:
                    return False
                self._running[place] = self._start(self._peer.commands[place])
        return True

    def last_words(self) -> str:
        return self._path.read_bytes()[-2000:].decode(errors="replace")

    def end(self) -> None:
        """Send SIGINT, wait, then kill the remaining processes."""
        family: list[psutil.Process] = []
        for process in self._running:
            with suppress(psutil.NoSuchProcess):
                family += psutil.Process(process.pid).children(recursive=True)
                process.send_signal(2)
        _, left = psutil.wait_procs([psutil.Process(p.pid) for p in self._running if p.poll() is None], timeout=GRACE_S)
        for one in [*left, *family]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        for process in self._running:
            process.wait()
        psutil.wait_procs(family, timeout=GRACE_S)
        self._log.close()

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip
