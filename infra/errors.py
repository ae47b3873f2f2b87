"""Every error that recua raises on purpose.

RecuaError
├── UserError                  something to change in the recipe, the data or the command; exit code 2
│   ├── ConfigError            a recipe key, type or value
│   ├── DataError              a malformed input file: file and line
│   ├── CheckpointError        weights or a manifest that do not fit
│   ├── ResourceError          a request that this cluster can never meet
│   ├── RunBusy                another driver works on this run
│   └── NonDeterminismError    a resumed workflow body took another path
├── Denied                     an approval that a workflow asked for was denied
├── StoreError                 the store is unreachable, refuses, or returned damaged data
│   └── FencedError            another driver holds this run's lease: stop
├── StepError                  a step's own code raised; carries the user's traceback
└── SystemFault                the platform failed under a step; retried by the executor
    ├── NodeLost
    │   └── PeersUnreachable   two machines of a group have no way to each other
    ├── Preempted
    ├── OutOfMemory
    └── StepTimeout
"""

import difflib
from collections.abc import Iterable, Sequence

MOST_NAMED = 40


class RecuaError(Exception):
    """Base of every error that recua raises on purpose."""


class UserError(RecuaError):
    """An error that the user can fix; the message names the setting to change."""


class ConfigError(UserError):
    """A recipe key is unknown, or its value has the wrong type or range."""


class DataError(UserError):
    """An input file is missing or malformed; the message has `file:line`."""


class CheckpointError(UserError):
    """A model folder lacks tensors, has the wrong shapes, or fails its checksums."""


class ResourceError(UserError):
    """A request for CPUs, GPUs, memory, disk or a port that this cluster can never meet."""


class RunBusy(UserError):
    """Another live driver works on this run."""


class NonDeterminismError(UserError):
    """A resumed workflow body called another step, or the same one with other inputs."""


class Denied(RecuaError):
    """An approval was denied; the message names who denied it and why."""


class StoreError(RecuaError):
    """The store is unreachable, refuses, or returned damaged data."""


class FencedError(StoreError):
    """Another driver took this run's lease: this driver may commit nothing more."""


class StepError(RecuaError):
    """A step's own code raised. `user_traceback` is its traceback, which is shown first."""

    def __init__(self, message: str, user_traceback: str = "") -> None:
        super().__init__(message)
        self.user_traceback = user_traceback

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.user_traceback)


class SystemFault(RecuaError):
    """The platform failed under a step, not the user's code. Retried with backoff, a bounded number of times."""


class NodeLost(SystemFault):
    """The node or worker process that ran the step died."""


REACH_EACH_OTHER = (
    "Nodes must reach each other on every port at the addresses that Ray has for them (--node-ip-address of their "
    "Ray), or on the interface that GLOO_SOCKET_IFNAME names there: look at both, and at the firewall between them"
)


class PeersUnreachable(NodeLost):
    """Machines of a group cannot connect to each other. `ways`: (rank that tried, rank that it did not reach) pairs;
    `tried`: the same in words."""

    def __init__(self, ways: Sequence[tuple[int, int]], tried: Sequence[str]) -> None:
        more = f" and {len(tried) - 3} more" if len(tried) > 3 else ""
        super().__init__(f"no connection from {'; '.join(tried[:3])}{more}. {REACH_EACH_OTHER}")
        self.ways, self.tried = tuple(ways), tuple(tried)

    def __reduce__(self) -> tuple[type, tuple[tuple[tuple[int, int], ...], tuple[str, ...]]]:
        return type(self), (self.ways, self.tried)


class Preempted(SystemFault):
    """The node was drained, or its cloud took it back."""


class OutOfMemory(SystemFault):
    """The step's process was killed because memory ran out."""


class StepTimeout(SystemFault):
    """The step ran past its `timeout`."""


def nearest(given: str, known: Iterable[str], prefix: str = "", there: str = "known") -> str:
    """The end of a message about an unknown name: "; did you mean X?", or the known names ("; known: X, Y")."""
    names = list(known)
    if near := difflib.get_close_matches(given, names, n=1, cutoff=0.4):
        return f"; did you mean {prefix}{near[0]}?"
    more = [f"and {len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    return f"; {there}: {', '.join([*names[:MOST_NAMED], *more]) or 'none'}"
