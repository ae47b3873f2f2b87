"""The elastic controller as a pure state machine: events in, commands out, no clock, no threads, no ray.

Who waits for whom: the core never waits. Its driver (the controller over Ray, or the simulator) calls
`handle(event, now)` for everything that happens and at `next_deadline`, and carries the commands out.

    starting --> forming --> running --> stopping --> forming ...      planned: growth, drain, eviction
                    |  ^        |  |________________> aborting         faults, rollbacks
                    v  |        v                        |
                  aborting <----+     forming / waiting <+             waiting: fewer than min_workers
    adopting --> running | aborting | starting                         a restarted controller
    any --> finished | failed (with a reason)

One generation is active at a time: the next one is formed only after every member of the last has acknowledged the
abort, has died, or has been killed. All ranks of a generation, survivors included, load the same step, so no rank keeps
an update that another did not apply. Capacity is whole model-parallel blocks. A fault while recovering aborts the new
generation like any other; `max_faults_without_progress` bounds the sequence.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain
from typing import Any

from cluster.config import ElasticSettings
from cluster.core import messages as m
from cluster.core.adoption import read_inventory
from cluster.core.roster import Roster
from cluster.policies.corruption import is_due
from cluster.policies.decision import Decision, key
from cluster.policies.drain import DrainView, decide_drain, leave_by
from cluster.policies.failure import FailureView, decide_adoption, decide_failure
from cluster.policies.layout import Block, mend
from cluster.policies.network import aside_s, stand_aside
from cluster.policies.quarantine import decide_history
from cluster.policies.scaling import GrowthView, decide_growth, workers_to_order
from cluster.policies.snapshot import Restore, SnapshotBook, choose

ENDED = ("finished", "failed")
QUIET_PRIOR_S = 3600.0
"""A prior for the mean time between re-formings; it counts like one observation."""


class StateMachine:
    """The state of one run's group. Read its attributes freely; change them only through `handle`.

    Args:
        settings: see cluster.config.
        prefix: of the names of the workers that this controller orders; each controller has its own.
        stored: steps whose state is whole in storage.
        joins: {generation: step that it loaded} of every `Join` so far, from the run's journal. A snapshot that an
            older generation took after a later one's start belongs to a discarded future.
        adopting: start by asking for living workers instead of ordering new ones.
    """

    def __init__(
        self,
        settings: ElasticSettings,
        *,
        prefix: str = "w",
        stored: Iterable[int] = (),
        joins: Mapping[int, int] | None = None,
        adopting: bool = False,
    ) -> None:
        self.settings, self.joins = settings, dict(joins or {})
        self.generation = max(self.joins, default=0)
        self.phase = "adopting" if adopting else "starting"
        self.roster = Roster(prefix)
        self.book = SnapshotBook(lambda step: is_due(step, settings))
        self.book.flushed.update(stored)
        self.blocks: tuple[Block, ...] = ()
        self.step = self.high_step = max(self.book.flushed, default=0)
        self.step_s = self.pause_s = 0.0
        self.reason = "start"
        self.reformed = self.faults_without_progress = 0
        self.running_s = 0.0
        self._ever_saved = bool(self.book.flushed)
        self._back_to: int | None = None
        self._awaiting: set[str] = set()
        self._deadline: float | None = None
        self._respawn_at = float("-inf")
        self._paused_at = self._running_since = 0.0
        self._boundary: int | None = None
        self._said: dict[str, str] = {}
        self._wait_until: float | None = None
        self._formed = False
        self._times_aside: dict[str, int] = {}
        self._node_faults: dict[str, list[float]] = {}
        self._dead_nodes: set[str] = set()
        self._found: list[m.Found] = []
        self._out: m.Commands = []
        self._begun = False
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            m.WorkersReady: self._ready, m.WorkersRefused: self._refused, m.BurnInFailed: self._burn_in_failed,
            m.WorkersLost: self._workers_lost, m.NodesLost: self._nodes_lost, m.Suspected: self._suspected,
            m.PeersApart: self._peers_apart, m.AbortAcked: self._abort_acked, m.Joined: self._joined,
            m.JoinMoved: self._join_moved, m.Progress: self._progress, m.BoundaryReached: self._boundary_reached,
            m.SnapshotHeld: self._snapshot_held, m.SnapshotFlushed: self._snapshot_flushed,
            m.NodesDraining: self._nodes_draining, m.Evict: self._evict,
            m.NodesCleared: self._nodes_cleared, m.RollBack: self._roll_back, m.Inventory: self._inventory,
            m.Finished: self._finished, m.Tick: lambda event, now: None,
        }  # fmt: skip

    # ---- the two calls of a driver

    def handle(self, event: m.Event, now: float) -> m.Commands:
        """Handle one event at time `now` (seconds; it never decreases)."""
        if self.phase in ENDED:
            return []
        self._out = []
        if not self._begun:
            self._begin(now)
        self._handlers[type(event)](event, now)
        self._check_time(now)
        self._order(now)
        return self._out

    @property
    def next_deadline(self) -> float | None:
        """When to call `handle(Tick(), ...)` if no event comes before."""
        if self.phase in ENDED:
            return None
        times = [] if self._deadline is None else [self._deadline]
        if self._shortage() and self.phase != "adopting":
            times.append(self._respawn_at)
        if self.phase == "waiting":
            times += self.roster.aside.values()
        if self.phase == "running":
            views = (self._drain_view(node, 0.0) for node in self._drained_members())
            times += [leave_by(view, self.settings) for view in views]
        return min(times, default=None)

    @property
    def members(self) -> list[str]:
        """Workers of the active generation: rank r is number r."""
        return list(chain.from_iterable(self.blocks))

    def worker(self, worker: str) -> m.WorkerState:
        """A worker's state."""
        roster = self.roster
        if worker in roster.joined:
            return m.WorkerState("joined", self.members.index(worker))
        groups = {"spawned": roster.ordered, "standby": roster.standby, "aborted": roster.aborted}
        return m.WorkerState(next((state for state, group in groups.items() if worker in group), "gone"))

    @property
    def quiet_s(self) -> float:
        """Mean time between re-formings of this run so far, with a prior of an hour."""
        return (self.running_s + QUIET_PRIOR_S) / (self.reformed + 1)

    # ---- workers come and go

    def _begin(self, now: float) -> None:
        self._begun, self._paused_at = True, now
        if self.phase == "adopting":
            self._deadline = now + self.settings.adopt_timeout_s
            self._out.append(m.Enquire())
        else:
            self._deadline = now + self.settings.start_timeout_s

    def _shortage(self) -> int:
        return workers_to_order(self.roster.alive, len(self.roster.ordered), self.settings)

    def _order(self, now: float) -> None:
        if self.phase in (*ENDED, "adopting") or now < self._respawn_at:
            return
        count = self._shortage()
        if count:
            avoid = frozenset(self.roster.unfit | self.roster.draining.keys() | self._dead_nodes)
            self._out.append(m.Spawn(self.roster.order(count), avoid))

    def _ready(self, event: m.WorkersReady, now: float) -> None:
        roster, unwanted = self.roster, set()
        for worker, node in event.nodes.items():
            if worker not in roster.ordered or not roster.usable(node) or node in self._dead_nodes:
                unwanted.add(worker)
            else:
                roster.ordered.discard(worker)
                roster.place(worker, node)
                roster.standby.add(worker)
        if unwanted:
            roster.ordered -= unwanted
            self._respawn_at = now + self.settings.respawn_backoff_s
            self._out.append(m.Kill(frozenset(unwanted), "not wanted any more, or on a node that may not be used"))
        if self.phase == "waiting" or (self.phase == "starting" and len(roster.standby) >= self.settings.max_workers):
            self._reform(now)

    def _refused(self, event: m.WorkersRefused, now: float) -> None:
        refused = self.roster.ordered.intersection(event.workers)
        if refused:
            self.roster.ordered -= refused
            self._respawn_at = now + self.settings.respawn_backoff_s

    def _burn_in_failed(self, event: m.BurnInFailed, now: float) -> None:
        if event.worker in self.roster.ordered:
            self._report(event.decision)
            self.roster.ordered.discard(event.worker)
            self._out.append(m.Kill(frozenset([event.worker]), event.decision.reason))
            self._take_out(event.node, event.decision.reason)

    def _workers_lost(self, event: m.WorkersLost, now: float) -> None:
        self._lose(event.workers, event.reason, now)

    def _nodes_lost(self, event: m.NodesLost, now: float) -> None:
        self.book.drop_nodes(event.nodes)
        self._dead_nodes.update(event.nodes)
        self._found = [one for one in self._found if one.node not in event.nodes]
        lost = self.roster.on(event.nodes)
        self._lose(lost, event.reason, now, blame=False)  # gone, or its link was cut: then it comes back unblamed
        for node in event.nodes:
            self.roster.draining.pop(node, None)

    def _peers_apart(self, event: m.PeersApart, now: float) -> None:
        """Nodes that reach each other train on without the others, which get no blame and are tried again later."""
        if event.generation != self.generation or self.phase != "forming":
            return
        roster, members = self.roster, self.members
        nodes = list(dict.fromkeys(roster.node_of[worker] for worker in members if worker in roster.node_of))
        ways = [(roster.node_of.get(one, ""), roster.node_of.get(other, "")) for one, other in event.ways]
        out = stand_aside([way for way in ways if way[0] in nodes and way[1] in nodes], nodes)
        for node in out:
            self._times_aside[node] = times = self._times_aside.get(node, 0) + 1
            roster.aside[node] = now + aside_s(times, self.settings)
            text = f"{node[:12]} and others have no way to each other: tried again in {roster.aside[node] - now:g} s"
            self._report(Decision("stand-aside", text, key("respawn_backoff_s")))
        self._fault(event.reason, now, counted=not out)

    def _tried_again(self, now: float) -> bool:
        """Whether nodes that stood aside may be tried again now."""
        before = len(self.roster.aside)
        self.roster.aside = {node: until for node, until in self.roster.aside.items() if until > now}
        return len(self.roster.aside) < before

    def _suspected(self, event: m.Suspected, now: float) -> None:
        if event.generation != self.generation or self.phase not in ("forming", "running", "stopping"):
            return
        guilty = self.roster.joined.intersection(event.workers)
        if guilty:
            self._out.append(m.Kill(frozenset(guilty), event.reason))
            self._lose(guilty, event.reason, now)
        elif not event.workers:
            self._fault(event.reason, now)

    def _lose(self, workers: Collection[str], reason: str, now: float, blame: bool = True) -> None:
        """Workers are dead. A loss in the active generation is a fault; anywhere else it is only less capacity."""
        members = self.roster.joined.intersection(workers)
        nodes = {self.roster.node_of[worker] for worker in workers if worker in self.roster.node_of}
        nodes -= self.roster.draining.keys()
        self._awaiting.difference_update(workers)
        self._found = [one for one in self._found if one.worker not in workers]
        if not self.roster.forget(workers):
            return
        if blame:
            for node in sorted(nodes):
                self._blame(node, now)
        if members and self.phase in ("forming", "running", "stopping"):
            self._fault(reason, now)
        else:
            self._advance(now)

    def _blame(self, node: str, now: float) -> None:
        history = self._node_faults.setdefault(node, [])
        history.append(now)
        del history[: -self.settings.quarantine_faults]
        verdict = decide_history(node, history, now, self.settings)
        if verdict.action == "quarantine" and node not in self.roster.unfit and self._can_spare(node, verdict.reason):
            self._report(verdict)
            self._take_out(node, verdict.reason)

    def _can_spare(self, node: str, why: str) -> bool:
        """Whether enough ranks are left without a node; reports it if not."""
        spared = self.roster.usable_outside(node) + len(self.roster.ordered) >= self.settings.min_workers
        if not spared:
            text = f"{why}, but without it fewer than {self.settings.min_workers} ranks are left"
            self._report(Decision("keep", text, key("min_workers")))
        return spared

    def _take_out(self, node: str, why: str) -> None:
        """Quarantine: nothing new starts there, its idle workers end, its ranks leave with the next generation."""
        self.roster.unfit.add(node)
        self._clear(node, why)

    def _clear(self, node: str, why: str) -> None:
        idle = self.roster.leave(self.roster.on([node]), why)
        if idle:
            self.roster.forget(idle)
            self._out.append(m.Dismiss(frozenset(idle), why))

    # ---- a generation ends

    def _fault(self, reason: str, now: float, *, counted: bool = True) -> None:
        """The active generation cannot continue: all ranks leave the collectives, then re-form."""
        if self.phase == "running":
            self._pause(now)
        self.faults_without_progress += counted
        self.phase, self.reason = "aborting", reason
        self._awaiting = set(self.roster.joined)
        self._deadline = now + self.settings.abort_timeout_s
        if self._awaiting:
            self._out.append(m.Abort(self.generation, frozenset(self._awaiting), self._deadline))
        self._advance(now)

    def _pause(self, now: float) -> None:
        self._paused_at = now
        self.running_s += now - self._running_since

    def _abort_acked(self, event: m.AbortAcked, now: float) -> None:
        if event.generation == self.generation and self.phase == "aborting":
            self._leave_generation(event.workers)
            self._advance(now)

    def _leave_generation(self, workers: Collection[str]) -> None:
        left = self.roster.joined.intersection(workers)
        self.roster.joined -= left
        self.roster.aborted |= left
        self._awaiting -= left

    def _stop(self, decision: Decision, now: float) -> None:
        """Planned: all ranks leave at the next step boundary, then re-form without losing a step."""
        self._report(decision)
        self._pause(now)
        self.phase, self.reason, self._boundary = "stopping", decision.reason, None
        self._awaiting = set(self.roster.joined)
        self._deadline = now + self.settings.boundary_timeout_s
        self._out.append(m.StopAtBoundary(self.generation, decision.reason))

    def _boundary_reached(self, event: m.BoundaryReached, now: float) -> None:
        if event.generation != self.generation or self.phase != "stopping":
            return
        if self._boundary not in (None, event.step):
            self._fault(f"ranks stopped after different steps, {self._boundary} and {event.step}", now)
            return
        self._boundary = event.step
        self._advanced_to(event.step)
        self._leave_generation(event.workers)
        self._paused_at = now
        self._advance(now)

    def _advance(self, now: float) -> None:
        """Re-form if no answer is outstanding."""
        if self._awaiting:
            return
        if self.phase == "aborting" or (self.phase == "stopping" and self._boundary in self._restorable()):
            self._reform(now)

    def _restorable(self) -> set[int]:
        return {step for step, snapshot in self.book.snapshots.items() if snapshot.whole} | self.book.flushed

    # ---- the next generation

    def _reform(self, now: float) -> None:
        """All live workers are idle: mend the blocks, then form, wait or fail, as the failure policy says."""
        roster, settings = self.roster, self.settings
        for why in sorted(set(roster.leaving.values())):
            gone = frozenset(worker for worker, reason in roster.leaving.items() if reason == why)
            roster.forget(gone)
            self._out.append(m.Dismiss(gone, why))
        roster.standby |= roster.aborted
        roster.aborted = set()
        members, pool = set(self.members), roster.within_reach()
        gone_members = members - pool
        damaged = sum(not gone_members.isdisjoint(block) for block in self.blocks) if gone_members else 0
        blocks = mend(self.blocks, gone_members, pool - members, roster.node_of, settings.block, settings.max_blocks)
        restore = self._restore()
        source = "nowhere" if restore is None else restore.source
        before = len(self.blocks) or settings.max_blocks
        cause = self.reason
        faults = self.faults_without_progress
        view = FailureView(cause, len(gone_members), damaged, before, len(blocks), faults, source)
        decision = decide_failure(view, settings)
        if self.phase != "waiting" or decision.action != "wait":
            self._report(decision)
        if decision.action == "fail":
            self._end(False, decision)
        elif decision.action == "wait":
            self.blocks = blocks
            if self.phase != "waiting":
                self._wait_until = self._wait_until or now + settings.capacity_wait_s  # failed attempts are waiting too
                self.phase, self._deadline = "waiting", self._wait_until
        else:
            assert restore is not None
            if self.phase == "waiting":
                self._paused_at = now  # waiting for capacity is not part of the pause
            self._form(blocks, restore, now)

    def _restore(self) -> Restore | None:
        restore, decision = choose(self.book, self._back_to)
        if restore is None and (not self._ever_saved or self._back_to == 0):
            return Restore(0, "start")
        if self.generation and self.phase == "aborting":
            self._report(decision)
        return restore

    def _form(self, blocks: tuple[Block, ...], restore: Restore, now: float) -> None:
        roster = self.roster
        self.generation += 1
        self.phase, self.blocks, self._back_to, self._formed = "forming", blocks, None, False
        self.book.truncate(restore.step)
        self.step = self.joins[self.generation] = restore.step
        roster.joined = set(self.members)
        roster.standby -= roster.joined
        self._awaiting = set(roster.joined)
        self._deadline = now + self.settings.join_timeout_s
        self._said.clear()
        self._out.append(m.Join(self.generation, blocks, restore, self._deadline))

    def _joined(self, event: m.Joined, now: float) -> None:
        if event.generation != self.generation or self.phase != "forming":
            return
        if event.step is not None and event.step != self.step:
            self.book.truncate(event.step)
            self.step = self.joins[self.generation] = event.step
        self._awaiting.difference_update(event.workers)
        if not self._awaiting:
            self.phase, self._deadline, self._formed = "running", None, True
            self._wait_until = None
            for node in {self.roster.node_of[worker] for worker in self.roster.joined}:
                self._times_aside.pop(node, None)
            if self.running_s:
                self.pause_s = now - self._paused_at
            self.reformed += 1
            self._running_since = now

    def _join_moved(self, event: m.JoinMoved, now: float) -> None:
        if event.generation == self.generation and self.phase == "forming":
            self._deadline = now + self.settings.join_timeout_s

    # ---- while running

    def _progress(self, event: m.Progress, now: float) -> None:
        if event.generation == self.generation and self.phase in ("running", "stopping"):
            self.step_s = event.step_s
            self._advanced_to(event.step)

    def _advanced_to(self, step: int) -> None:
        self.step = max(self.step, step)
        if step > self.high_step:
            self.high_step, self.faults_without_progress = step, 0

    def _snapshot_held(self, event: m.SnapshotHeld, now: float) -> None:
        if self._valid(event.generation, event.step):
            shards_on = event.shards_on
            if not self._dead_nodes.isdisjoint(shards_on):  # a late message about memory that is gone
                shards_on = {node: shards for node, shards in shards_on.items() if node not in self._dead_nodes}
            self.book.held(event.step, event.world_size, event.generation, shards_on)
            self._ever_saved = True
            self._advance(now)

    def _valid(self, generation: int, step: int) -> bool:
        """This generation's snapshots count; a restarted controller also takes older ones of the same trajectory."""
        return generation == self.generation or (self.phase == "adopting" and self._on_trajectory(generation, step))

    def _on_trajectory(self, generation: int, step: int) -> bool:
        """Whether a snapshot counts: one from after a later generation's start belongs to a discarded future."""
        return all(step <= start for later, start in self.joins.items() if later > generation)

    def _snapshot_flushed(self, event: m.SnapshotFlushed, now: float) -> None:
        if self._on_trajectory(event.generation, event.step):  # an older generation's may arrive late
            self.book.flushed.add(event.step)
            self._ever_saved = True
            self._advance(now)

    def _nodes_draining(self, event: m.NodesDraining, now: float) -> None:
        self.roster.draining.update(event.deadlines)
        for node in event.deadlines:
            self._clear(node, f"{node} is drained")

    def _nodes_cleared(self, event: m.NodesCleared, now: float) -> None:
        for node in event.nodes:
            self._dead_nodes.discard(node)
            self.roster.unfit.discard(node)
            self.roster.draining.pop(node, None)
            self._node_faults.pop(node, None)
        if stale := frozenset(self.roster.ordered):  # they avoid these nodes, and may wait for others for ever
            self.roster.forget(stale)
            self._out.append(m.Kill(stale, "ordered again: there are more nodes now"))

    def _evict(self, event: m.Evict, now: float) -> None:
        workers = {worker for worker in event.workers if worker in self.roster.node_of}
        nodes = sorted({self.roster.node_of[worker] for worker in workers})
        if event.unfit:
            workers |= self.roster.on(nodes)
        if not workers:
            return
        holes = len(workers & self.roster.joined)
        damaged = sum(not workers.isdisjoint(block) for block in self.blocks)
        if holes > len(self.roster.standby - workers) and len(self.blocks) - damaged < self.settings.min_blocks:
            text = f"{event.decision.reason}, but without it fewer than {self.settings.min_workers} ranks are left"
            self._report(Decision("keep", text, key("min_workers")))
            return
        self._report(event.decision)
        for node in nodes if event.unfit else ():
            self._take_out(node, event.decision.reason)
        idle = self.roster.leave(workers, event.decision.reason)
        if idle:
            self.roster.forget(idle)
            self._out.append(m.Dismiss(frozenset(idle), event.decision.reason))

    def _roll_back(self, event: m.RollBack, now: float) -> None:
        if event.generation != self.generation or self.phase not in ("running", "stopping"):
            return
        self._report(event.decision)
        self._back_to = event.to_step
        self.high_step = min(self.high_step, event.to_step)
        guilty = self.roster.joined.intersection(event.guilty)
        if guilty:
            self._out.append(m.Kill(frozenset(guilty), event.decision.reason))
            nodes = sorted({self.roster.node_of[worker] for worker in guilty})
            self.roster.forget(guilty)
            for node in nodes:
                if self._can_spare(node, f"{node[:12]}: {event.decision.reason}"):
                    self._take_out(node, event.decision.reason)
        self._fault(event.decision.reason, now, counted=False)

    def _finished(self, event: m.Finished, now: float) -> None:
        if event.generation == self.generation and self.phase in ("running", "stopping"):
            self._end(True, Decision("finish", f"step {event.step} is the last", "none"))

    # ---- time

    def _check_time(self, now: float) -> None:
        late = self._deadline is not None and now >= self._deadline
        if self._tried_again(now) and self.phase == "waiting":
            self._reform(now)
        if self.phase == "running":
            self._check_drains(now)
        if self.phase == "running":
            self._check_leaving(now)
        if self.phase == "running":
            self._check_growth(now)
        elif late:
            self._overdue(now)

    def _overdue(self, now: float) -> None:
        settings, waiting = self.settings, f"{len(self._awaiting)} ranks"
        if self.phase == "aborting":
            reason = f"did not leave the collectives within {settings.abort_timeout_s:g} s"
            self._report(Decision("kill", f"{waiting} {reason}", key("abort_timeout_s")))
            stuck = frozenset(self._awaiting)
            self._out.append(m.Kill(stuck, reason))
            self._lose(stuck, reason, now, blame=self._formed)  # else the network may be at fault
        elif self.phase == "forming":
            text = f"{waiting} did not join, and none got on for {settings.join_timeout_s:g} s"
            self._fault(f"{text} (elastic.join_timeout_s)", now)
        elif self.phase == "stopping":
            if self._awaiting:
                text = f"{waiting} reached no step boundary within {settings.boundary_timeout_s:g} s"
                self._fault(f"{text} (elastic.boundary_timeout_s)", now)
            else:  # all stopped, but that step's snapshot never became whole: use the one before
                self._reform(now)
        elif self.phase == "starting":
            self._reform(now)
        elif self.phase == "waiting":
            text = f"{self.reason}: {self.roster.alive} ranks after {settings.capacity_wait_s:g} s of waiting"
            text += f", {settings.min_workers} needed"
            self._end(False, Decision("fail", text, key("capacity_wait_s")))
        elif self.phase == "adopting":  # a silent worker may still train: never form a group beside it
            self._deadline = now + settings.adopt_timeout_s
            self._out.append(m.Enquire())

    def _drained_members(self) -> list[str]:
        on = self.roster.on
        return [node for node in self.roster.draining if not on([node]).isdisjoint(self.roster.joined)]

    def _drain_view(self, node: str, now: float) -> DrainView:
        roster = self.roster
        covered = len(roster.within_reach()) >= len(roster.leaving)
        return DrainView(node, now, roster.draining[node], self.step_s, self.pause_s, covered)

    def _check_drains(self, now: float) -> None:
        for node in self._drained_members() if self.roster.draining else ():
            decision = decide_drain(self._drain_view(node, now), self.settings)
            if decision.action == "hold":
                self._report_once(f"drain {node}", decision)
                continue
            if decision.action == "leave-now":
                self._report(decision)
                self._fault(decision.reason, now, counted=False)
            else:
                self._stop(decision, now)
            return

    def _check_leaving(self, now: float) -> None:
        """Ranks that leave without a deadline (evicted, quarantined) do so at the next boundary."""
        roster = self.roster
        waiting = [worker for worker in roster.leaving if roster.node_of[worker] not in roster.draining]
        if waiting:
            why = roster.leaving[waiting[0]]
            self._stop(Decision("leave-at-boundary", f"{len(waiting)} ranks: {why}", key("straggler_evict_after")), now)

    def _check_growth(self, now: float) -> None:
        roster, settings = self.roster, self.settings
        room, ready = settings.max_blocks - len(self.blocks), len(roster.within_reach())
        if room <= 0 or ready < settings.block:
            return
        reachable = len(self.blocks) + min(room, ready // settings.block)
        decision = decide_growth(GrowthView(len(self.blocks), reachable, self.pause_s, self.quiet_s), settings)
        if decision.action == "grow":
            self._stop(decision, now)
        else:
            self._report_once("growth", decision)

    # ---- a restarted controller

    def _inventory(self, event: m.Inventory, now: float) -> None:
        if self.phase == "adopting":
            self._found += event.found
            if event.last:
                self._adopt(now)

    def _adopt(self, now: float) -> None:
        """Take over live workers: unchanged if the newest generation is whole, else abort and re-form."""
        roster, takeover = self.roster, read_inventory(self._found, self.generation, self.settings)
        for one in self._found:
            roster.place(one.worker, one.node)
            (roster.joined if one.worker in takeover.seated else roster.standby).add(one.worker)
        self.generation = max(self.generation, takeover.view.generation)
        decision = decide_adoption(takeover.view, self.settings)
        self.blocks, self.reason = takeover.blocks, decision.reason
        self._deadline = now + self.settings.start_timeout_s
        self._report(decision)
        for node in (*roster.draining, *roster.unfit):
            self._clear(node, f"{node} may not be used")
        if decision.action == "adopt":
            self.phase, self._deadline, self._running_since = "running", None, now
            self._formed = True
            self._advanced_to(takeover.step)
        elif takeover.seated:
            self._fault(decision.reason, now, counted=False)
        else:
            self.phase = "starting"
            if len(roster.standby) >= self.settings.max_workers:
                self._reform(now)

    # ---- reports

    def _report(self, decision: Decision) -> None:
        self._out.append(m.Report(decision))

    def _report_once(self, about: str, decision: Decision) -> None:
        """Log a decision that every event repeats only when it changes."""
        if self._said.get(about) != decision.action:
            self._said[about] = decision.action
            self._report(decision)

    def _end(self, succeeded: bool, decision: Decision) -> None:
        self.phase, self.reason, self._deadline = "finished" if succeeded else "failed", decision.reason, None
        roster = self.roster
        everyone = frozenset(roster.standby | roster.joined | roster.aborted | roster.ordered)
        roster.forget(everyone)
        self._out += [m.Dismiss(everyone, decision.reason), m.End(succeeded, decision)]
