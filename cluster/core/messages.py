"""The events and commands of the controller's core. The core names workers ("w17"), the reporters name nodes.

Messages about a generation carry its number, and the core drops those of other generations. Events can be batched: one
node agent acknowledges for all its workers in one message.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from cluster.policies.decision import Decision
from cluster.policies.layout import Block
from cluster.policies.snapshot import Restore

# ---- events


@dataclass(frozen=True)
class WorkersReady:
    """Ordered workers are on standby: process up, imports done, burn-in passed. {worker: node}"""

    nodes: Mapping[str, str]


@dataclass(frozen=True)
class WorkersRefused:
    """Ordered workers will not start (no capacity, or the start failed)."""

    workers: Collection[str]
    reason: str


@dataclass(frozen=True)
class BurnInFailed:
    """An ordered worker started, but its node is not fit (see cluster.policies.quarantine)."""

    worker: str
    node: str
    decision: Decision


@dataclass(frozen=True)
class WorkersLost:
    """Processes died."""

    workers: Collection[str]
    reason: str


@dataclass(frozen=True)
class NodesLost:
    """Nodes died, with all their processes and memory."""

    nodes: Collection[str]
    reason: str


@dataclass(frozen=True)
class PeersApart:
    """A generation does not form because machines cannot reach each other; `ways`: (worker that tried, worker that it
    did not reach)."""

    generation: int
    ways: Collection[tuple[str, str]]
    reason: str


@dataclass(frozen=True)
class Suspected:
    """A generation hangs or misbehaves; `workers` are to blame (none: the fabric) and will be killed."""

    generation: int
    workers: Collection[str]
    reason: str


@dataclass(frozen=True)
class AbortAcked:
    """Workers have left their collectives and dropped their process groups."""

    generation: int
    workers: Collection[str]


@dataclass(frozen=True)
class Joined:
    """Workers have formed their groups and hold the restored state. `step`: its step, if damaged copies forced an
    earlier one than ordered, or storage had a newer one by then (None: the ordered one)."""

    generation: int
    workers: Collection[str]
    step: int | None = None


@dataclass(frozen=True)
class JoinMoved:
    """A joining worker has made progress."""

    generation: int


@dataclass(frozen=True)
class Progress:
    """All ranks have committed `step` steps; `step_s` is their own recent median step time."""

    generation: int
    step: int
    step_s: float


@dataclass(frozen=True)
class BoundaryReached:
    """Workers stopped after `step` committed steps, as asked, and left their process groups."""

    generation: int
    step: int
    workers: Collection[str]


@dataclass(frozen=True)
class SnapshotHeld:
    """Node agents hold verified copies of shards of the snapshot of `step`. {node: shards}"""

    generation: int
    step: int
    world_size: int
    shards_on: Mapping[str, Iterable[int]]


@dataclass(frozen=True)
class SnapshotFlushed:
    """The snapshot of `step` is whole in storage, manifest written."""

    generation: int
    step: int


@dataclass(frozen=True)
class NodesDraining:
    """Preemption or maintenance notices: {node: deadline in the core's clock}."""

    deadlines: Mapping[str, float]


@dataclass(frozen=True)
class NodesCleared:
    """Repaired nodes, or lost ones that are back under their old name, may be used again."""

    nodes: Collection[str]


@dataclass(frozen=True)
class Evict:
    """A policy (straggler, prediction) evicts workers at the next boundary; `unfit` also takes out their nodes."""

    workers: Collection[str]
    decision: Decision
    unfit: bool = True


@dataclass(frozen=True)
class RollBack:
    """A policy (cluster.policies.rollback) sends training back to `to_step`; `guilty` workers are replaced."""

    generation: int
    to_step: int
    decision: Decision
    guilty: Collection[str] = ()


@dataclass(frozen=True)
class Found:
    """One living worker as its node agent knows it; `state`: standby, joining, joined or aborted."""

    worker: str
    node: str
    state: str
    generation: int = 0
    rank: int = 0
    world_size: int = 0
    step: int = 0


@dataclass(frozen=True)
class Inventory:
    """Answer to `Enquire`; `last` marks the final one: all known nodes have answered or are lost."""

    found: Collection[Found]
    last: bool = False


@dataclass(frozen=True)
class Finished:
    """The last step is committed."""

    generation: int
    step: int


@dataclass(frozen=True)
class Tick:
    """Time has passed; due at `StateMachine.next_deadline`."""


Event = (
    WorkersReady | WorkersRefused | BurnInFailed | WorkersLost | NodesLost | PeersApart | Suspected | AbortAcked
    | Joined | JoinMoved | Progress | BoundaryReached | SnapshotHeld | SnapshotFlushed
    | NodesDraining | NodesCleared | Evict | RollBack | Inventory | Finished | Tick
)  # fmt: skip

# ---- commands


@dataclass(frozen=True)
class Spawn:
    """Start these workers on nodes outside `avoid`; the answer is WorkersReady, WorkersRefused or BurnInFailed."""

    workers: tuple[str, ...]
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Abort:
    """Leave the collectives of this generation and of older ones; workers that have not by `deadline` are killed."""

    generation: int
    workers: frozenset[str]
    deadline: float


@dataclass(frozen=True)
class Kill:
    """SIGKILL by the node agent; the core already counts them as dead."""

    workers: frozenset[str]
    reason: str


@dataclass(frozen=True)
class Dismiss:
    """End these workers, which the core has forgotten. Their node keeps its snapshots until it goes."""

    workers: frozenset[str]
    reason: str


@dataclass(frozen=True)
class Join:
    """Form process groups under this generation, load `restore`, train on.

    Rank r is worker r of the concatenated `blocks`. Everyone loads the same step, survivors included.
    """

    generation: int
    blocks: tuple[Block, ...]
    restore: Restore
    deadline: float

    def ranks(self) -> dict[str, int]:
        """Worker -> rank."""
        return {worker: rank for rank, worker in enumerate(worker for block in self.blocks for worker in block)}


@dataclass(frozen=True)
class StopAtBoundary:
    """All ranks stop after the same step (agreed by the commit vote) and snapshot it; then BoundaryReached."""

    generation: int
    reason: str


@dataclass(frozen=True)
class Enquire:
    """Ask every node agent for its living workers and held snapshots (Inventory, SnapshotHeld, SnapshotFlushed)."""


@dataclass(frozen=True)
class Report:
    """A decision for the log."""

    decision: Decision


@dataclass(frozen=True)
class End:
    """The run is over."""

    succeeded: bool
    decision: Decision


Command = Spawn | Abort | Kill | Dismiss | Join | StopAtBoundary | Enquire | Report | End
Commands = list[Command]


@dataclass(frozen=True)
class WorkerState:
    """A worker's state: spawned, standby, joined (with its rank), aborted, or gone."""

    state: str
    rank: int | None = None
