"""One run of the elastic campaign: drivers are started until one has finished, while faults come by the schedule.

Faults from outside are due when the rank that their point belongs to stands still there: the file that says so appears
in the state folder (see `actors.pretrain.fault_points`).
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.campaign_place import MARK, Place
from tests.chaos.elastic_hands import Hands
from tests.chaos.elastic_schedule import FLUSH_EVERY, INSIDE, SILENT, STEPS, VALUES, VERIFY_EVERY, Fault, Schedule
from tests.chaos.elastic_witness import SHARED, Witness
from tests.helpers.cloud_metadata import Metadata

PROGRAM = Path(__file__).with_name("elastic_program.py")
START_S, FAULT_S = 150.0, 30.0
"""How long a run may take: so long, and so long for each fault."""
LOOK_S = 0.02
DRIVERS = 12


def settings_of(schedule: Schedule, patience: float, url: str, metadata: str = "") -> dict[str, Any]:
    """Of the pretraining, as its section in a recipe says them. `patience` scales what is judged by the clock;
    `metadata` is the address of the machines' cloud. A group that shrinks keeps two ranks: one block, or two nodes."""
    variant = schedule.variant
    return {
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "timeout": 120},
        "steps": STEPS,
        "batch_size": 6,
        "sequence_length": 16,
        "micro_batch_size": 2,
        "save_every": FLUSH_EVERY,
        "snapshot_store": url,
        "workers": variant.ranks,
        "num_cpus": 1,
        "placement": "SPREAD",
        **variant.settings,
        "elastic": {
            "min_workers": 2 if schedule.shrinks else variant.ranks,
            "spares": schedule.spares,
            "max_faults_without_progress": 20,
            "capacity_wait_s": 200,
            "start_timeout_s": 200,
            "respawn_backoff_s": 2,
            "abort_timeout_s": 3 * patience,
            "join_timeout_s": 15 * patience,
            "join_stall_s": 5 * patience,
            "boundary_timeout_s": 40 * patience,
            "growth_must_pay": False,
            "hang_floor_s": 5 * patience,
            "pulse_timeout_s": 2 * patience,
            "first_step_grace_s": 30 * patience,
            "flush_timeout_s": 30 * patience,
            "spike_window": 16,
            "verify_every": VERIFY_EVERY if schedule.has(SILENT) else 20,
            "quarantine_faults": 1000,
            "notices": {"cloud": "aws" if metadata else "none", "metadata_url": metadata, "sigterm_grace_s": 8},
        },
    }


class Driver:
    """One driver process and what it said."""

    def __init__(self, order: dict[str, Any], log: Path, environment: dict[str, str]) -> None:
        self.log, self.killed = log, False
        command = [sys.executable, str(PROGRAM), json.dumps(order), str(log)]
        with log.with_suffix(".err").open("w") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def lines(self, kind: str) -> list[Any]:
        """Rows, events, the result or the error, in order; a line that a kill cut short is left out."""
        text = self.log.read_text() if self.log.exists() else ""
        found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return [{**line[kind], "at": line["at"]} if kind == "event" else line[kind] for line in found if kind in line]

    def kill(self) -> None:
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Run:
    """A run while it goes on, and what happened."""

    def __init__(
        self,
        place: Place,
        cloud: Metadata,
        schedule: Schedule,
        folder: Path,
        corpus: Path,
        vocab_size: int,
        url: str,
        patience: float,
    ) -> None:
        self.place, self.schedule, self.folder, self.url, self.patience = place, schedule, folder, url, patience
        self.cloud = cloud
        self.drivers: list[Driver] = []
        self.hit: list[Fault] = []
        self.pids: dict[Fault, int] = {}
        """Which process came by a fault's point."""
        self.missed: list[Fault] = []
        self.violations: list[str] = []
        self.lost: set[str] = set()
        """What nodes that were killed are called in shared memory."""
        self.witness = Witness(place.store(url or str(self.state)))
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.hands = Hands(self)
        self._start_at = 0.0
        self._waiting = {fault.point: fault for fault in schedule.faults if fault.kind not in VALUES}
        self._order = {
            "address": place.address,
            "corpus": str(corpus),
            "folder": str(folder),
            "vocab_size": vocab_size,
            "settings": settings_of(schedule, patience, url, cloud.url),
            "faults": schedule.text,
        }

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def group(self) -> str:
        return str(self.history.get("group", ""))

    @property
    def history(self) -> dict[str, Any]:
        """What its controllers have noted (see cluster.core.history)."""
        try:
            found: dict[str, Any] = json.loads((self.state / "group.json").read_text())
            return found
        except (OSError, ValueError):
            return {}

    def carry_out(self) -> None:
        """Until a driver has finished. Nothing that the run started lives on."""
        self.witness.begin()
        try:
            self._until_finished()
        finally:
            self.witness.end()
            for driver in self.drivers:
                if driver.process.poll() is None:
                    driver.kill()

    def memory(self) -> list[Path]:
        """What the group has in this machine's memory."""
        return list(SHARED.glob(f"recua-node-*/recua-{self.group}")) if self.group else []

    def sweep(self) -> None:
        """After a run that was lost: its processes, its memory."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for folder in self.memory():
            shutil.rmtree(folder, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """Ranks and agents in this place."""
        found = []
        for process in psutil.process_iter(["name", "cmdline"]):
            title = " ".join(process.info["cmdline"] or [])
            if title.startswith(("ray::PretrainRank", "ray::PretrainAgent", "ray::Pretrain")):
                with contextlib.suppress(psutil.Error):
                    if process.environ().get(MARK) == str(self.place.folder):
                        found.append(process)
        return found

    def _until_finished(self) -> None:
        allowed = (START_S + FAULT_S * len(self.schedule.faults)) * self.patience
        deadline = time.monotonic() + allowed
        while not any(driver.process.poll() == 0 for driver in self.drivers):
            if time.monotonic() > deadline:
                self.violations.append(f"not finished after {allowed:.0f} s")
                return
            if not self._keep_driven():
                return
            self.witness.group = self.witness.group or self.group
            self._hear_of_points()
            for at, act in [entry for entry in self.later if entry[0] <= time.monotonic()]:
                self.later.remove((at, act))
                act()
            time.sleep(LOOK_S)
        for _, act in self.later:  # a store that is still disturbed, a node that is still to go
            act()

    def start_driver(self, after_s: float = 0.0) -> None:
        self._start_at = time.monotonic() + after_s

    def _keep_driven(self) -> bool:
        """Start a driver where none is; False where one has ended by itself."""
        if self.drivers and self.drivers[-1].process.poll() is None:
            return True
        if self.drivers and not self.drivers[-1].killed:
            last = self.drivers[-1]
            said = (last.lines("error") or [last.log.with_suffix(".err").read_text().strip()[-800:]])[-1]
            self.violations.append(f"driver {len(self.drivers) - 1} ended with code {last.process.poll()}: {said}")
            return False
        if time.monotonic() >= self._start_at:
            assert len(self.drivers) < DRIVERS
            log = self.folder / f"driver-{len(self.drivers)}.log"
            self.drivers.append(Driver(self._order, log, self.place.environment))
        return True

    def _hear_of_points(self) -> None:
        """A fault's moment has come: note it, and do what is to be done from outside."""
        taken = self.state / "faults"
        if not self._waiting or not taken.is_dir():
            return
        for name in os.listdir(taken):
            fault = self._waiting.pop(name.rpartition(":")[0], None)
            if fault is None:
                continue
            self.pids[fault] = self._who_came(taken / name)
            done = fault.kind in (*INSIDE, *SILENT, "slow", "two") or self.hands.strike(fault)
            (self.hit if done else self.missed).append(fault)

    def _who_came(self, note: Path) -> int:
        """The file has its name before it has its content."""
        for _ in range(50):
            with contextlib.suppress(OSError, ValueError, KeyError):
                return int(json.loads(note.read_text())["pid"])
            time.sleep(0.01)
        return 0
