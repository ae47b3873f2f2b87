"""A simulated cluster under the real controller core: event-driven, without sleeping or processes. Nothing here is
measured on hardware except the data of the pause model.

Who waits for whom: `run` takes the next event from a heap, tells the core (cluster.core.state_machine), and turns the
core's commands into later events. Training between events is arithmetic: steps are counted, not simulated.

The cost of a fault: no rank makes progress from its true time until the policies' own detection delay is over; the step
under way is recomputed; the newest snapshot counts only if its copies were acknowledged before; the pause model gives
the times of abort and join; a shrunk group runs the same global batch more slowly.
"""

import heapq
import math
import time
from collections.abc import Callable, Sequence

from cluster.core import messages as m
from cluster.core.state_machine import ENDED, StateMachine
from cluster.goodput.buckets import BUCKETS, Goodput, Ledger
from cluster.goodput.group_account import GroupWatch
from cluster.policies.decision import Decision, key
from cluster.policies.hang import stall_limit_s
from cluster.policies.snapshot import place_replicas
from cluster.simulation.assumptions import SimulatedCluster, SimulatedRun
from cluster.simulation.failure_tables import DAY, Fault


class Simulation:
    """One run of `cluster` under `faults`; equal inputs give equal runs."""

    def __init__(self, cluster: SimulatedCluster, faults: Sequence[Fault]) -> None:
        self.cluster, self.settings = cluster, cluster.elastic()
        self.core = StateMachine(self.settings)
        self.watch = GroupWatch("simulated", self.core, 0.0)
        self.end = cluster.days * DAY
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._room: dict[str, int] = {}
        self._processes: dict[str, str] = {}
        self._on: dict[str, set[str]] = {}
        self._warming = 0
        self._nodes = 0
        self._mode = "re_forming"
        self._seconds = dict.fromkeys(BUCKETS, 0.0)
        self._lived = 0.0
        self._members = 0
        self._started: float | None = None
        self._trained = 0
        self._first_step = self._committed = self._highest = 0
        self._stopped_at = self._since_commit = self._last_step_s = 0.0
        self._last_members = 0
        self._rolling_back = False
        self._wake: float | None = None
        self.lost_steps = self.rolled_back_steps = self.storage_restores = self.handled = 0
        self.core_s = 0.0
        self.pauses: list[float] = []
        self._placed: tuple[int, dict[str, set[int]]] = (0, {})
        for fault in faults:
            self._at(fault.time, lambda fault=fault: self._strike(fault))  # type: ignore[misc]

    def run(self, progress: Callable[[float], None] = lambda days: None) -> SimulatedRun:
        """Run to the end of the simulated time; `progress` gets the simulated days."""
        self._tell(m.Tick())
        while self._heap and self.core.phase not in ENDED:
            at, _, action = heapq.heappop(self._heap)
            if at >= self.end:
                break
            self._advance(at)
            action()
            progress(at / DAY)
        self._advance(self.end)
        self._stop(self.end, useful=True)
        wanted = self.settings.max_workers + self.settings.spares
        account = Goodput(Ledger(self._lived, self._seconds), wanted, self.end)
        return SimulatedRun(
            account, self._highest, self.lost_steps, self.rolled_back_steps, max(0, self.core.generation - 1),
            self.storage_restores, self.core.phase, self.handled, self.core_s, self.pauses, tuple(self.watch.pauses),
        )  # fmt: skip

    # ---- time

    def _at(self, when: float, action: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, action))

    def _tell_at(self, when: float, event: m.Event) -> None:
        self._at(when, lambda: self._tell(event))

    def _advance(self, to: float) -> None:
        """Account for all ranks' time up to `to`."""
        passed, self.now = to - self.now, to
        alive = len(self._processes)
        self._lived += passed * (alive + self._warming)
        self._seconds["init"] += passed * self._warming
        self._seconds["idle"] += passed * (alive - self._members)
        if self._mode == "compute":
            stall = self.cluster.snapshot_stall_s / self._step_s()
            self._seconds["checkpoint_stall"] += passed * self._members * stall
            self._seconds["compute"] += passed * self._members * (1 - stall)
        else:
            self._seconds[self._mode] += passed * self._members

    def _step_s(self) -> float:
        """The same global batch on fewer ranks takes longer."""
        full = self.settings.max_workers / max(1, self._members)
        return self.cluster.step_s * full + self.cluster.snapshot_stall_s

    def _tell(self, event: m.Event) -> None:
        started = time.thread_time()
        commands = self.core.handle(event, self.now)
        self.core_s += time.thread_time() - started
        self.handled += 1
        self.watch.saw(event, commands, self.now)
        for command in commands:
            self._obey(command)
        if self.core.phase == "running" and self._trained != self.core.generation:
            self._resume()
        deadline = self.core.next_deadline
        if deadline is not None and (self._wake is None or deadline < self._wake or self._wake <= self.now):
            self._wake = max(deadline, self.now)
            self._tell_at(self._wake, m.Tick())

    # ---- the core's commands

    def _obey(self, command: m.Command) -> None:
        cluster = self.cluster
        if isinstance(command, m.Spawn):
            self._spawn(command)
        elif isinstance(command, m.Abort):
            alive = tuple(worker for worker in command.workers if worker in self._processes)
            acked = m.AbortAcked(command.generation, alive)
            self._mode = "re_forming"
            self._tell_at(self.now + cluster.pause.abort_s(len(alive)), acked)
        elif isinstance(command, m.Join):
            self._join(command)
        elif isinstance(command, m.StopAtBoundary):
            self._boundary(command.generation)
        elif isinstance(command, m.Kill | m.Dismiss):
            for worker in command.workers:
                self._remove(worker)

    def _spawn(self, command: m.Spawn) -> None:
        """Spawn into free places of live nodes first, the rest on nodes from the pool."""
        cluster, waiting = self.cluster, list(command.workers)
        start = self.core.generation == 0
        for node in [node for node, room in self._room.items() if room and node not in command.avoid]:
            mine, waiting = waiting[: self._room[node]], waiting[self._room[node] :]
            if not mine:
                break
            self._room[node] -= len(mine)
            self._warming += len(mine)
            self._at(self.now + cluster.process_warm_s, lambda node=node, mine=mine: self._up(node, mine, True))  # type: ignore[misc]
        delay = 0.0 if start else cluster.node_replacement_s
        while waiting:
            mine, waiting = waiting[: cluster.gpus_per_node], waiting[cluster.gpus_per_node :]
            node = f"n{self._nodes}"
            self._nodes += 1
            self._room[node] = cluster.gpus_per_node - len(mine)
            self._on[node] = set()
            self._at(self.now + delay, lambda node=node, mine=mine: self._up(node, mine, False))  # type: ignore[misc]

    def _up(self, node: str, workers: list[str], warmed: bool) -> None:
        if warmed:
            self._warming -= len(workers)
        if node not in self._room:
            self._tell(m.WorkersRefused(workers, f"{node} died while they started"))
            return
        self._processes.update(dict.fromkeys(workers, node))
        self._on[node].update(workers)
        self._tell(m.WorkersReady(dict.fromkeys(workers, node)))

    def _join(self, command: m.Join) -> None:
        members = list(command.ranks())
        self._members, self._mode = len(members), "re_forming"
        undone = self._committed - command.restore.step
        if undone > 0:
            name = "rolled_back_steps" if self._rolling_back else "lost_steps"
            setattr(self, name, getattr(self, name) + undone)
            lost = undone * self._last_step_s * self._last_members
            self._seconds["compute"] -= min(lost, self._seconds["compute"])
            self._seconds["recomputed"] += lost
            self.storage_restores += command.restore.source == "storage" and not self._rolling_back
        self._rolling_back = False
        self._first_step = self._committed = command.restore.step
        self._placed = (command.generation, {})

        def joined() -> None:  # a collective: with one dead member no rank gets through
            if self.core.generation == command.generation and all(worker in self._processes for worker in members):
                self._tell(m.Joined(command.generation, members))

        self._at(self.now + self.cluster.pause.join_s(len(members)), joined)

    def _boundary(self, generation: int) -> None:
        """All ranks finish the step under way, and their snapshot of it is acknowledged."""
        if self._started is None:
            return
        step_s = self._step_s()
        steps = math.floor((self.now - self._started) / step_s) + 1
        at = self._started + steps * step_s

        def reached() -> None:
            if self._started is None or self.core.generation != generation:
                return
            self._stop(self.now, useful=True)
            self._mode = "checkpoint_stall"
            self._heard(self._committed - 1)
            self._at(self.now + self.cluster.snapshot_lag_s, all_stopped)

        def all_stopped() -> None:
            if self.core.generation == generation and self.core.phase == "stopping":
                self._mode = "re_forming"
                self._acknowledge(self._committed)
                workers = tuple(self.core.roster.joined)
                self._tell(m.BoundaryReached(generation, self._committed, workers))

        self._at(at, reached)

    # ---- training

    def _resume(self) -> None:
        self._trained, self._started, self._mode = self.core.generation, self.now, "compute"
        self.pauses.append(self.now - self._stopped_at)

    def _stop(self, at: float, useful: bool) -> None:
        """Stop training at `at` (not later than now). A step under way is undone unless `useful`."""
        if self._started is None:
            return
        step_s, members = self._step_s(), self._members
        done = (at - self._started) / step_s
        whole = math.floor(done + 1e-9)
        if not useful:
            partial = (done - whole) * step_s * members
            self._seconds["compute"] -= partial
            self._seconds["recomputed"] += partial
        self._last_step_s, self._last_members = step_s - self.cluster.snapshot_stall_s, members
        self._committed = self._first_step + whole
        self._highest = max(self._highest, self._committed)
        self._since_commit = (done - whole) * step_s
        self._started, self._stopped_at = None, at
        self._mode = "detection"

    def _acknowledge(self, newest: int) -> None:
        """Deliver the node agents' messages that are due: progress, the newest snapshot, the last flush."""
        core = self.core
        generation = core.generation
        if self._placed[0] != generation or not self._placed[1]:
            nodes = [self._processes.get(worker, "gone") for worker in core.members]
            self._placed = (generation, place_replicas(nodes, self.settings.snapshot_replicas))
        held = self._placed[1]
        self._tell(m.Progress(generation, newest, self._last_step_s))
        flushed = newest - newest % self.cluster.flush_every
        if flushed and flushed not in core.book.flushed:
            self._tell(m.SnapshotFlushed(generation, flushed))
        if newest > self._first_step:  # the one before is on the same nodes: faults here damage both or none
            self._tell(m.SnapshotHeld(generation, newest, self._members, held))

    # ---- faults

    def _strike(self, fault: Fault) -> None:
        """A fault strikes; the core learns of it after the detection delay of its kind."""
        if not self._processes:
            return
        node = self._victim(fault)
        if node is None:
            return
        if fault.kind == "notice":
            self._notice(node, fault)
            return
        worker = sorted(self._on[node])[0] if self._on[node] else None
        involved = self._seated(self._on[node])
        delay = self._detection_s(fault)
        if fault.kind == "corruption":
            if involved and worker is not None:
                self._corrupt(worker)
            return
        if involved and self._started is not None:
            self._interrupt()
        elif self.core.phase == "forming" and involved:
            self._mode = "re_forming"
        if fault.kind == "fabric":
            event: m.Event = m.Suspected(self.core.generation, (), "NCCL watchdog: all wait in the same collective")
        elif fault.replaced:
            self._take_away(node)
            event = m.NodesLost((node,), f"{fault.cause} on {node}")
        elif worker is None:
            return
        else:
            self._remove(worker)
            event = m.WorkersLost((worker,), f"{fault.cause}: {worker} on {node} died")
        self._tell_at(self.now + delay, event)

    def _interrupt(self) -> None:
        """A member is lost now: the step under way is undone, and messages of the node agents up to now count."""
        self._stop(self.now, useful=False)
        self._heard(self._committed - (self._since_commit < self.cluster.snapshot_lag_s))

    def _heard(self, newest: int) -> None:
        """Every commit is known, and the snapshots up to `newest` are acknowledged."""
        if newest > self._first_step:
            self._acknowledge(newest)
        self._tell(m.Progress(self.core.generation, self._committed, self._last_step_s))

    def _victim(self, fault: Fault) -> str | None:
        nodes = sorted(node for node, workers in self._on.items() if workers)
        if not nodes:
            return None
        if fault.node is not None:
            return nodes[fault.node % len(nodes)]
        return nodes[int(fault.place * len(nodes))]

    def _seated(self, workers: set[str]) -> bool:
        return not self.core.roster.joined.isdisjoint(workers)

    def _detection_s(self, fault: Fault) -> float:
        """The detection delay by the policies' own settings."""
        if fault.kind == "node":
            return self.settings.node_timeout_s
        if fault.kind in ("hang", "fabric"):
            return stall_limit_s([self._step_s()], self.settings)
        return self.cluster.process_detection_s

    def _notice(self, node: str, fault: Fault) -> None:
        assert fault.deadline is not None
        if self._started is not None:
            steps = math.floor((self.now - self._started) / self._step_s())
            self._tell(m.Progress(self.core.generation, self._first_step + steps, self._step_s()))
        self._tell(m.NodesDraining({node: fault.deadline}))

        def gone() -> None:
            if node in self._room:
                involved = self._seated(self._on[node])
                if involved and self._started is not None:
                    self._interrupt()
                self._take_away(node)
                self._tell(m.NodesLost((node,), f"{node} went at its deadline"))

        self._at(fault.deadline, gone)

    def _corrupt(self, worker: str) -> None:
        """Digests differ at the next verified state: back to the one before it, the guilty rank out."""
        if self._started is None:
            return
        steps = math.floor((self.now - self._started) / self._step_s())
        struck = self._first_step + steps
        found = struck - struck % self.cluster.flush_every + self.cluster.flush_every
        generation, good = self.core.generation, found - self.cluster.flush_every
        at = self._started + (found - self._first_step) * self._step_s()

        def detected() -> None:
            if self._started is None or self.core.generation != generation or worker not in self._processes:
                return
            self._stop(self.now, useful=True)
            self._acknowledge(self._committed - 1)
            if good and good not in self.core.book.flushed:
                self._tell(m.SnapshotFlushed(generation, good))
            self._rolling_back = True
            decision = Decision("roll-back", f"digests of step {found} disagree, {worker}", key("snapshot_replicas"))
            self._tell(m.RollBack(generation, good, decision, (worker,)))

        self._at(at, detected)

    def _remove(self, worker: str) -> None:
        node = self._processes.pop(worker, None)
        if node is not None:
            self._on[node].discard(worker)
            self._members -= worker in self.core.roster.joined
            if node in self._room:
                self._room[node] += 1

    def _take_away(self, node: str) -> None:
        for worker in list(self._on[node]):
            self._remove(worker)
        self._room.pop(node, None)
        self._on.pop(node, None)
