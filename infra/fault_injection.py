"""Named fault points, so that tests break recua on purpose exactly where it would hurt.

A schedule is text, `point:hit=action` separated by commas: `executor.before-commit:3=kill` kills the process the third
time it comes by that point; hit `*` is every time. It comes as an argument, or from the one documented variable
`RECUA_FAULTS`; without either no point does anything.

Points of the graph: `executor.body` (inside a step's body), `artifact.upload` (between two files of an artifact),
`executor.before-commit` (a body has ended, its commit is not written), `executor.after-commit` (the commit is
written, nobody has been told), `executor.between-steps` (the workflow asks for its next step). Points of pretraining
are in `actors.pretrain.fault_points`.

Actions on the process: `kill` (SIGKILL), `stop` (SIGSTOP), `interrupt` (SIGINT). On the thread that comes by: `fault`
(raise SystemFault), `error` (raise RuntimeError), `slow` (compute `SLOW_S` longer), `spin` (an endless loop in Python),
`lock` (one in native code that keeps the interpreter locked), `deadlock`, `delay-SECONDS`. On what is computed there,
carried out by who asks for them with `take`: `nan`, `spike`, `flip` (one bit of it).
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
    """What happens at which hit of which point: {("executor.body", 3): "kill"}. Hits count from 1, per process; hit 0
    is every one.

    With a folder `once`, what is due at one hit happens in one process only, whoever comes by first: a file there named
    like the entry says who that was, {"point", "action", "pid", "time"}, and is written before it happens.
    """

    actions: dict[tuple[str, int], str] = field(default_factory=dict)
    once: Path | None = None
    _hits: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def parse(cls, text: str, once: Path | None = None) -> "FaultSchedule":
        """From `point:hit=action,...`; an empty text is the schedule of no faults.

        Raises:
            ConfigError: an entry of another form.
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
        """Count one hit of `point`; the action that is due now, for a caller that carries it elsewhere."""
        if not self.actions:
            return None
        with self._lock:
            self._hits[point] += 1
            hit = self._hits[point]
        if (action := self.actions.get((point, hit))) is not None:
            return action if self._is_first(point, hit, action) else None
        return self.actions.get((point, EVERY))

    def reach(self, point: str) -> None:
        """Count one hit of `point` and do what is due."""
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
    """Do `action` now; a signal goes to `pid` (this process unless told)."""
    if action is None:
        return
    if action in SIGNALS:
        os.kill(os.getpid() if pid is None else pid, SIGNALS[action])
    elif (delay := DELAY.fullmatch(action)) is not None:
        time.sleep(float(delay[1]))
    elif action == "spin":
        while True:
            pass
    elif action == "lock":  # a search that would outlive the universe; the interpreter's lock is not released in it
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
        raise ValueError(f"{action} at {point}: nothing is computed here")
