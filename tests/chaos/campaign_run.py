"""One run of the campaign: drivers are started until the run is finished, while faults come by a schedule.

The schedule is a function of the seed. What it hits is not quite: a fault is due when so many bodies have begun and a
moment has passed, and where the processes are by then is theirs to say.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from infra.errors import StoreError
from infra.storage import open_store
from tests.chaos.campaign_place import Place
from workflows.runs.signals import send

PROGRAM = Path(__file__).with_name("campaign_program.py")
DEADLINE_S = 300.0
HEALED_AFTER_S = 120.0
"""The store's bad time ends: where most requests fail, a run that goes on for ever says nothing more."""
QUIET_S = 90.0
KINDS = ("driver-kill", "driver-stop", "second-driver", "worker-kill", "worker-stop", "reaper-kill", "node-kill")
ANSWERS: dict[str, tuple[Any, Any]] = {
    "approval[go]": ({"approve": True, "comment": ""}, {"approve": False, "comment": "too late"}),
    "event[extra]": (5, 6),
}
"""What the program waits for: the answer that counts, and one that comes after it."""
POINTS = (
    "executor.between-steps",
    "executor.body",
    "artifact.upload",
    "executor.before-commit",
    "executor.after-commit",
)
STORE_KINDS = ("latency", "error-500", "error-503", "slow-down", "reset-before", "reset-after", "late-error", "zombie")
STORE_KINDS += ("truncated", "short")
EXPECTED = ("FencedError", "StoreError", "RunBusy: run r is being driven", "SystemFault: Ray did not start")


@dataclass(frozen=True)
class Fault:
    """Due when `bodies` have begun and `after_s` have passed since."""

    kind: str
    bodies: int
    after_s: float


@dataclass(frozen=True)
class Schedule:
    """One run's faults. `points`: one per driver, the named moment at which it kills or stops itself, or "".
    `largest_files`: one per driver, bytes after which the disk is full for it, or None. `store`: the proxy's rates.
    `answered`: how many bodies have begun when the program's questions are answered."""

    seed: int
    kind: str
    variant: int
    lease_s: float
    faults: tuple[Fault, ...]
    points: tuple[str, ...]
    largest_files: tuple[int | None, ...]
    store: dict[str, float]
    answered: int

    @classmethod
    def of(cls, seed: int) -> "Schedule":
        chance = random.Random(seed)
        s3 = chance.random() < 0.45
        kinds = [*KINDS, "outage", "timeout"] if s3 else list(KINDS)
        faults = [
            Fault(chance.choice(kinds), chance.randrange(0, 62), chance.uniform(0.0, 0.3))
            for _ in range(chance.choice([1, 1, 2, 2, 3, 4]))
        ]
        points = [
            f"{chance.choice(POINTS)}:{chance.randrange(1, 9)}={chance.choice(['kill', 'kill', 'stop'])}"
            if chance.random() < 0.25
            else ""
            for _ in range(3)
        ]
        full = [chance.choice([2500, 6000, 12000]) if not s3 and chance.random() < 0.1 else None for _ in range(3)]
        rate = chance.choice([0.01, 0.03, 0.06]) if s3 else 0.0
        store = {kind: rate * chance.choice([0.3, 1.0, 2.0]) for kind in STORE_KINDS} if s3 else {}
        return cls(
            seed,
            "s3" if s3 else "folder",
            seed % 3,
            chance.choice([1.5, 2.0]),
            tuple(sorted(faults, key=lambda fault: fault.bodies)),
            tuple(points),
            tuple(full),
            store,
            chance.randrange(0, 19),
        )

    @classmethod
    def quiet(cls, variant: int) -> "Schedule":
        """The fault-free run of a variant."""
        return cls(-1, "folder", variant, 15.0, (), (), (), {}, 0)


class Driver:
    """One driver process and what it printed."""

    def __init__(
        self, settings: dict[str, Any], marks: Path, variant: int, log: Path, environment: dict[str, str]
    ) -> None:
        self.log = log
        self.point = str(settings.get("faults", ""))
        self.hits = 0
        self.continued = False
        command = [sys.executable, str(PROGRAM), json.dumps(settings), str(marks), str(variant)]
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def code(self) -> int | None:
        return self.process.poll()

    def stopped(self) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
        return False

    def started(self) -> bool:
        return '"run-started"' in self.log.read_text()

    def result(self) -> dict[str, Any] | None:
        lines = [line for line in self.log.read_text().splitlines() if line.startswith('{"result"')]
        value: dict[str, Any] | None = json.loads(lines[-1])["result"] if lines else None
        return value

    def hit(self, number: signal.Signals) -> None:
        """A fault from outside."""
        self.hits += 1
        self.signal(number)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


@dataclass
class Run:
    """A run while it goes on, and what happened."""

    place: Place
    schedule: Schedule
    folder: Path
    url: str
    drivers: list[Driver] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=lambda: list(ANSWERS))
    healed: bool = False

    @property
    def marks(self) -> Path:
        return self.folder / "marks"

    def carry_out(self) -> None:
        """Until a driver has finished, and every driver has ended."""
        try:
            self._until_finished()
            self._end_drivers()
        finally:
            for driver in self.drivers:
                if driver.code() is None:
                    driver.signal(signal.SIGKILL)
                driver.process.wait()

    def _until_finished(self) -> None:
        chance = random.Random(self.schedule.seed)
        due = list(self.schedule.faults)
        deadline = time.monotonic() + DEADLINE_S
        reached: float | None = None
        while not any(driver.code() == 0 for driver in self.drivers):
            if time.monotonic() > deadline:
                self.violations.append(f"not finished after {DEADLINE_S:.0f} s")
                break
            if self.schedule.store and not self.healed and time.monotonic() > deadline - DEADLINE_S + HEALED_AFTER_S:
                self.healed = True
                self.place.faults(**self._proxied(), rates={})
            self._keep_driven()
            if self.unanswered and self._bodies() >= self.schedule.answered:
                self._answer()
            if due and self._bodies() >= due[0].bodies:
                reached = reached or time.monotonic()
                if time.monotonic() - reached >= due[0].after_s:
                    self._inject(due.pop(0).kind, chance)
                    reached = None
            time.sleep(0.02)

    def _bodies(self) -> int:
        return self.marks.read_text().count('"began"') if self.marks.exists() else 0

    def _keep_driven(self) -> None:
        """Start a driver where none works; wake up those that slept while another took over."""
        working = [driver for driver in self.drivers if driver.code() is None and not driver.stopped()]
        if not working:
            self._start()
        for driver in self.drivers:
            if driver.code() is None and driver.stopped() and not driver.continued:
                later = self.drivers[self.drivers.index(driver) + 1 :]
                if any(successor.started() for successor in later) and self.schedule.seed % 2:
                    self._wake(driver)

    def _start(self, role: str = "") -> None:
        number = len(self.drivers)
        settings: dict[str, Any] = {
            "store": self.url,
            "run_id": "r",
            "ray_address": self.place.address,
            "cache": str(self.folder / "cache"),
            "lease_s": self.schedule.lease_s,
            "backoff_s": 0.02,
            "system_retries": 40,
        }
        if number < len(self.schedule.points) and self.schedule.points[number]:
            settings["faults"] = self.schedule.points[number]
        if number < len(self.schedule.largest_files) and self.schedule.largest_files[number]:
            settings["largest_file"] = self.schedule.largest_files[number]
            self.injected["disk-full"] += 1
        log = self.folder / f"driver-{number}.log"
        self.drivers.append(Driver(settings, self.marks, self.schedule.variant, log, self.place.environment))

    def _inject(self, kind: str, chance: random.Random) -> None:
        working = [driver for driver in self.drivers if driver.code() is None and not driver.stopped()]
        done = True
        if kind == "driver-kill" and working:
            working[-1].hit(signal.SIGKILL)
        elif kind == "driver-stop" and working:
            working[-1].hit(signal.SIGSTOP)
        elif kind == "second-driver":
            self._start()
        elif kind in ("worker-kill", "worker-stop", "reaper-kill"):
            done = self._hit_worker(kind, chance)
        elif kind == "node-kill":
            self.place.kill_node(chance)
        elif kind == "outage":
            self._outage(chance)
        elif kind == "timeout":  # one answer comes later than clients wait for it
            self.place.faults(**self._proxied(), rates=self._rates(), script=["stall"], stall_s=11.0)
        else:
            done = False
        self.injected[kind if done else f"{kind} (nobody to hit)"] += 1

    def _hit_worker(self, kind: str, chance: random.Random) -> bool:
        """A worker process in the middle of a body; a stopped one goes on after a while, perhaps too late."""
        ended = {line["attempt"] for line in self.lines("ended")}
        running = [line for line in self.lines("began") if line["attempt"] not in ended and alive(line)]
        if not running:
            return False
        pid = chance.choice(running)["pid"]
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if kind == "worker-kill":
                os.kill(pid, signal.SIGKILL)
            elif kind == "worker-stop":
                os.kill(pid, signal.SIGSTOP)
                time.sleep(chance.uniform(0.1, 1.5))
                os.kill(pid, signal.SIGCONT)
            else:
                for process in psutil.process_iter(["cmdline"]):
                    command = process.info["cmdline"] or []
                    if (
                        len(command) > 2
                        and command[-2] == str(pid)
                        and any(part.endswith("reaper.py") for part in command)
                    ):
                        process.kill()
        return True

    def _answer(self) -> None:
        """Answer the next question twice, through the same bad store: the first answer counts."""
        call = self.unanswered[0]
        good, late = ANSWERS[call]
        with contextlib.suppress(StoreError):  # tried again in the next round
            store = open_store(self.url)
            send(store, "r", call, good, "campaign")
            mine, counts = send(store, "r", call, late, "somebody else")
            if mine or counts["value"] != good:
                self.violations.append(f"{call}: the answer {counts['value']} counts, the first was {good}")
            self.unanswered.pop(0)

    def _outage(self, chance: random.Random) -> None:
        """The whole store is down, or silent, for a while: perhaps longer than a lease."""
        kind = chance.choice(["error-503", "stall", "reset-before"])
        self.place.faults(**self._proxied(), rates={kind: 1.0}, stall_s=2.5)
        time.sleep(chance.uniform(0.5, 3.0))
        self.place.faults(**self._proxied(), rates=self._rates())

    def _rates(self) -> dict[str, float]:
        return {} if self.healed else self.schedule.store

    def _proxied(self) -> dict[str, Any]:
        return {"seed": self.schedule.seed, "match": "/chaos", "keep": True}

    def _wake(self, driver: Driver) -> None:
        driver.signal(signal.SIGCONT)
        driver.continued = True

    def _end_drivers(self) -> None:
        """Wake the sleepers; every driver must end by itself."""
        deadline = time.monotonic() + QUIET_S
        while any(driver.code() is None for driver in self.drivers):
            for driver in self.drivers:
                if driver.code() is None and driver.stopped():
                    self._wake(driver)
            if time.monotonic() > deadline:
                self.violations.append(f"a driver did not end within {QUIET_S:.0f} s of the last one's end")
                break
            time.sleep(0.02)
        for driver in self.drivers:
            if driver.point and not driver.hits and (driver.continued or driver.code() == -signal.SIGKILL):
                self.injected[f"driver-{driver.point.rpartition('=')[2]} at {driver.point.partition(':')[0]}"] += 1

    def lines(self, what: str) -> list[dict[str, Any]]:
        """The marks of one kind so far."""
        text = self.marks.read_text() if self.marks.exists() else ""
        found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return [line for line in found if line["what"] == what]


def alive(line: dict[str, Any]) -> bool:
    """Whether the process of a mark still lives: its id may have gone to another."""
    from infra.processes import process_start

    return process_start(line["pid"]) == line["start"]
