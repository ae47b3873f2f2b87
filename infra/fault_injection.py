"""Named fault points, at which tests make recua fail on purpose.

A schedule is text, `point:hit=action` separated by commas: `executor.before-commit:3=kill` kills the process when it
reaches that point for the third time; hit `*` is every time. It is an argument, or the environment variable
`RECUA_FAULTS`; without either, fault points do nothing.

Points of the graph: `executor.body` (inside a step's body), `artifact.upload` (between two files of an artifact),
`executor.before-commit` (a body has ended, its commit is not written), `executor.after-commit` (the commit is
written, the workflow has not heard of it), `executor.between-steps` (the workflow asks for its next step). Points of
pretraining are in `actors.pretrain.fault_points`.

Actions on the process: `kill` (SIGKILL), `stop` (SIGSTOP), `interrupt` (SIGINT). On the calling thread: `fault` (raise
SystemFault), `error` (raise RuntimeError), `slow` (compute `SLOW_S` longer), `spin` (an endless loop in Python), `lock`
(an endless loop in native code that holds the interpreter's lock), `deadlock`, `delay-SECONDS`. On computed values,
applied by the caller of `take`: `nan`, `spike`, `flip` (one bit).
"""

import json
import os
import re
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from infra.errors import ConfigError, SystemFault

VARIABLE = "RECUA_FAULTS"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "interrupt": signal.SIGINT}
ACTIONS = (*SIGNALS, "fault", "error", "slow", "spin", "lock", "deadlock", "nan", "spike", "flip", "delay-SECONDS")
DELAY = re.compile(r"delay-(\d+(?:\.\d+)?)")
EVERY = 0
SLOW_S = 0.05


@dataclass
class FaultSchedule:
    """Actions by (point, hit): {("executor.body", 3): "kill"}. Hits count from 1 in each process; hit 0 is every hit.

    With a folder `once`, only the first process that reaches a hit performs its action. Before it does, it writes a
    file named like the entry into that folder: {"point", "action", "pid", "time"}.
    """

    actions: dict[tuple[str, int], str] = field(default_factory=dict)
    once: Path | None = None
    _hits: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def parse(cls, text: str, once: Path | None = None) -> "FaultSchedule":
        """A schedule from `point:hit=action,...`; an empty text has no faults.

        Raises:
            ConfigError: an entry has another form.
        """
        actions: dict[tuple[str, int], str] = {}
        for entry in filter(None, (part.strip() for part in text.split(","))):
            where, _, action = entry.partition("=")
            point, _, hit = where.rpartition(":")
            counts = hit == "*" or (hit.isdigit() and int(hit) > 0)
            if not point or not counts or not (action in ACTIONS[:-1] or DELAY.fullmatch(action)):
                raise ConfigError(f"{VARIABLE} {entry!r}: write point:hit=action, action one of {', '.join(ACTIONS)}")
            actions[(point, EVERY if hit == "*" else int(hit))] = action
        return cls(actions, once)

    @classmethod
    def from_environment(cls) -> "FaultSchedule":
        return cls.parse(os.environ.get(VARIABLE, ""))

    def take(self, point: str) -> str | None:
        """Count one hit of `point` and return the action that is due, for a caller that performs it elsewhere."""
        if not self.actions:
            return None
        with self._lock:
            self._hits[point] += 1
            hit = self._hits[point]
        if (action := self.actions.get((point, hit))) is not None:
            return action if self._is_first(point, hit, action) else None
        return self.actions.get((point, EVERY))

    def reach(self, point: str) -> None:
        """Count one hit of `point` and perform the action that is due."""
        perform(self.take(point), point)

    def _is_first(self, point: str, hit: int, action: str) -> bool:
        if self.once is None:
            return True
        self.once.mkdir(parents=True, exist_ok=True)
        try:
            with (self.once / f"{point}:{hit}").open("x") as file:
                json.dump({"point": point, "action": action, "pid": os.getpid(), "time": time.time()}, file)
        except FileExistsError:
            return False
        return True


def perform(action: str | None, point: str, pid: int | None = None) -> None:
    """Perform `action` now. A signal goes to `pid`, by default to this process."""
    if action is None:
        return
    if action in SIGNALS:
        os.kill(os.getpid() if pid is None else pid, SIGNALS[action])
    elif (delay := DELAY.fullmatch(action)) is not None:
        time.sleep(float(delay[1]))
    elif action == "spin":
        while True:
            pass
    elif action == "lock":  # a search that takes practically for ever and never releases the interpreter's lock
        re.match(r"(x+x+)+y", "x" * 64)
    elif action == "deadlock":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    elif action == "slow":
        end = time.thread_time() + SLOW_S
        while time.thread_time() < end:
            pass
    elif action == "fault":
        raise SystemFault(f"fault injected at {point}")
    elif action == "error":
        raise RuntimeError(f"error injected at {point}")
    else:
        raise ValueError(f"{action} at {point}: nothing is computed at this point")
