"""Named fault points, so that tests break recua on purpose exactly where it would hurt.

A schedule is text, `point:hit=action` separated by commas: `executor.before-commit:3=kill` kills the process the third
time it comes by that point. It comes as an argument, or from the one documented variable `RECUA_FAULTS`; without either
no point does anything.

Points of the graph: `executor.body` (inside a step's body), `artifact.upload` (between two files of an artifact),
`executor.before-commit` (a body has ended, its commit is not written), `executor.after-commit` (the commit is
written, nobody has been told), `executor.between-steps` (the workflow asks for its next step).

Actions: `kill` (SIGKILL), `stop` (SIGSTOP), `interrupt` (SIGINT), `fault` (raise SystemFault), `error` (raise
RuntimeError).
"""

import os
import signal
from collections import Counter
from dataclasses import dataclass, field
from threading import Lock

from infra.errors import ConfigError, SystemFault

VARIABLE = "RECUA_FAULTS"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "interrupt": signal.SIGINT}
ACTIONS = (*SIGNALS, "fault", "error")


@dataclass
class FaultSchedule:
    """What happens at which hit of which point: {("executor.body", 3): "kill"}. Hits count from 1, per process."""

    actions: dict[tuple[str, int], str] = field(default_factory=dict)
    _hits: Counter[str] = field(default_factory=Counter)
    _lock: Lock = field(default_factory=Lock)

    @classmethod
    def parse(cls, text: str) -> "FaultSchedule":
        """From `point:hit=action,...`; an empty text is the schedule of no faults.

        Raises:
            ConfigError: an entry of another form.
        """
        actions: dict[tuple[str, int], str] = {}
        for entry in filter(None, (part.strip() for part in text.split(","))):
            where, _, action = entry.partition("=")
            point, _, hit = where.rpartition(":")
            if not point or not hit.isdigit() or int(hit) < 1 or action not in ACTIONS:
                raise ConfigError(f"{VARIABLE} {entry!r}: write point:hit=action, action one of {', '.join(ACTIONS)}")
            actions[(point, int(hit))] = action
        return cls(actions)

    @classmethod
    def from_environment(cls) -> "FaultSchedule":
        return cls.parse(os.environ.get(VARIABLE, ""))

    def take(self, point: str) -> str | None:
        """Count one hit of `point`; the action that is due now, for a caller that carries it elsewhere."""
        if not self.actions:
            return None
        with self._lock:
            self._hits[point] += 1
            return self.actions.get((point, self._hits[point]))

    def reach(self, point: str) -> None:
        """Count one hit of `point` and do what is due."""
        perform(self.take(point), point)


def perform(action: str | None, point: str, pid: int | None = None) -> None:
    """Do `action` now; a signal goes to `pid` (this process unless told)."""
    if action is None:
        return
    if action in SIGNALS:
        os.kill(os.getpid() if pid is None else pid, SIGNALS[action])
    elif action == "fault":
        raise SystemFault(f"fault injected at {point}")
    else:
        raise RuntimeError(f"error injected at {point}")
