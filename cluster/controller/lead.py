"""The driver of the pure controller over Ray: hears agents and workers, carries out what the core says.

Who waits for whom: one thread (the caller's) waits for the next word of an agent, of a starting worker, or for the
core's deadline. Ranks and agents never wait for it, except for the word that forms the next generation: while nothing
happens they train without it, and a controller that takes over finds them by their beacons.

What the core is told follows from what the beacons say now, never from a message that could be lost: an acknowledged
abort is a worker whose beacon says so.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ray

from cluster.config import ElasticSettings
from cluster.controller.fault_times import FaultTimes
from cluster.controller.fleet import AgentLost, Fleet, News, Started
from cluster.controller.held_shards import HeldShards
from cluster.controller.join_board import JoinBoard
from cluster.core import messages as m
from cluster.core.beat_board import BeatBoard
from cluster.core.history import GroupJournal, Superseded
from cluster.core.state_machine import ENDED, Controller
from cluster.goodput.accounts import Pause
from cluster.goodput.group_account import watch_group
from cluster.goodput.writer import AccountWriter
from cluster.guard.guard import Finding, Guard
from cluster.guard.loss_judge import LossJudge
from cluster.guard.step_rows import Outcomes
from cluster.node.rank_watch import Beat, Sight
from cluster.policies.decision import Decision
from cluster.policies.hang import Beacon
from cluster.policies.rollback import Rollback, leave_out
from infra.errors import REACH_EACH_OTHER, NodeLost, PeersUnreachable, RecuaError, StepError, StoreError
from infra.notices import Notice, in_words
from infra.ray_internals import draining_nodes

log = logging.getLogger(__name__)

DEATH_GRACE_S = 0.3
"""How long a rank that lost a peer waits for the death that explains it, before the group is re-formed without one."""
ERROR_GRACE_S = 1.0
"""The same for a rank that raised an error of its own."""
SURROUNDINGS_PERIOD_S = 1.0
"""How often storage, new nodes and drained ones are looked for."""
FIRST_STEP_S = 2.0
"""New processes wait for a generation's first step so long."""
SILENCE_FACTOR = 4.0
"""A silent node whose raylet still takes connections is starved rather than gone, up to so many `node_timeout_s`."""
FORMING_FACTOR = 10.0
"""While networks are built an interpreter may well be locked for a second: that takes so many `pulse_timeout_s`."""
STOOD_STILL_S = 1.0
"""A turn takes a controller a tenth of a second; after so long it was itself that stood still, or its store did."""
UNANSWERED_S = 60.0
"""Starting an agent takes seconds, on a crowded machine many; after so long the network may be at fault."""
SOONER_S = 1.0
"""A later notice of the same node counts if its deadline is earlier by this much."""
OUT = ("aborted", "boundary", "finished")
"""States in which a worker is out of its generation's collectives."""


class Task(Protocol):
    """What a group does, as far as its controller has to know."""

    replicated: bool
    """Every rank's shard is the whole state."""

    def orders(self, join: m.Join, fleet: Fleet, history: Any, high_step: int) -> Mapping[str, Any]:
        """{worker: argument of its `join`}."""
        ...

    def stored(self, fresh: bool = False) -> Iterable[tuple[int, int]]:
        """(generation, step) of every snapshot that is whole in storage; `fresh`: now, not some time ago."""
        ...


@dataclass(frozen=True)
class Listener:
    """Who hears of what: `row` of every step in order, each once; `event` of everything that people may want to see."""

    row: Callable[[dict[str, Any]], None] = lambda row: None
    event: Callable[[dict[str, Any]], None] = lambda event: None


class GroupController:
    """Leads one group from its start, or from where an earlier controller left it, to its end.

    Args:
        rows: the outcomes that are known from earlier; that of the next step is wanted first.
    """

    def __init__(
        self,
        fleet: Fleet,
        task: Task,
        settings: ElasticSettings,
        journal: GroupJournal,
        listener: Listener,
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.fleet, self.task, self.settings, self.journal, self.listener = fleet, task, settings, journal, listener
        history = journal.history
        stored = set(task.stored())
        joins = dict(history.joins)
        for generation, step in stored:
            joins.setdefault(generation, step)
        number = history.controllers
        known = replace(history, joins=joins)
        valid = {step for generation, step in stored if known.on_trajectory(generation, step)}
        self.core = Controller(settings, prefix=f"c{number}w", stored=valid, joins=joins, adopting=number > 0)
        self.core.book.verified = history.verified
        journal.note(controllers=number + 1)
        self.board, self.joining, self.faults = BeatBoard(settings), JoinBoard(settings), FaultTimes()
        self.watch = watch_group(fleet.accounts, self.core)
        floor = max((one for one, step in history.joins.items() if step <= len(rows)), default=0)
        self.outcomes = Outcomes(rows, floor, 4 * settings.spike_window)
        self.judge = LossJudge(settings, self.core, journal, self.outcomes, lambda: self._stored)
        self.guard = Guard(settings, self.core, journal, self.judge.saved)
        self._shards = HeldShards(task.replicated)
        self._account = AccountWriter(fleet.accounts)
        self._sights: dict[str, Sight] = {}
        self._stored = stored
        self._unheard: set[str] = set()
        self._out_since: dict[tuple[str, int], float] = {}
        self._end: m.End | None = None
        self._error: Exception | None = None
        self._looked_at = 0.0
        self._turned_at = time.monotonic()
        self._stacks: list[Any] = []
        self._draining: dict[str, float] = {}
        self._silent_since: dict[str, float] = {}
        self._dismissed: set[str] = set()
        self._away: set[str] = set()
        self._unanswered: set[str] = set()
        self._to_spawn: list[m.Spawn] = []
        self._formed_at, self._formed_row = 0.0, 0

    def run(self) -> None:
        """Until the last step is committed.

        Raises:
            StepError, UserError: what a rank raised by itself.
            SystemFault: the group cannot go on; the message has the decision and its setting.
            ResourceError: `min_workers` can never be there.
            Superseded: a later controller leads.
            SystemExit, StoreError: Ray ends this process, or the store fails; the group stays for the next controller.
        """
        ended = False
        try:
            self.fleet.open_agents()
            if not self.journal.history.joins:  # a group that was there before waits for its nodes to come back
                self.fleet.refuse_impossible(self.settings.min_workers)
            self._tell(m.Tick())
            while self._end is None:
                self._listen()
            ended = self._end.succeeded
        except (Superseded, SystemExit, StoreError):  # the ranks train on, for the next controller
            self._account.leave()
            raise
        except BaseException:
            self._close(remove=False)
            raise
        self._close(remove=ended)
        if not ended:
            raise self._error or NodeLost(f"group {self.fleet.group}: {self._end.decision}")

    def _close(self, remove: bool) -> None:
        self.fleet.close(remove)
        self._account.close(self.watch)

    # ---- hearing

    def _listen(self) -> None:
        deadline = self.core.next_deadline
        timeout = 0.1 if deadline is None else min(0.1, max(0.0, deadline - time.monotonic()))
        for news in self.fleet.wait(timeout, self._rows_wanted):
            self._hear(news)
        before, self._turned_at = self._turned_at, time.monotonic()
        if (gap := self._turned_at - before) > STOOD_STILL_S:  # what was heard was said before that
            self.board.excuse(gap, self._turned_at)
        self._judge()
        self._spawn()
        self._look_around()
        deadline = self.core.next_deadline
        if deadline is not None and time.monotonic() >= deadline:
            self._tell(m.Tick())

    def _rows_wanted(self, node: str) -> tuple[int, int]:
        """Rows from one node suffice while all is well: the one of rank 0."""
        if self.core.phase == "running" and self.core.blocks:
            first = self.core.blocks[0][0]
            if self.core.roster.node_of.get(first) != node:
                return 1 << 60, 0
        return self.outcomes.next, self.outcomes.floor

    def _hear(self, news: News) -> None:
        now = time.monotonic()
        if isinstance(news, Beat):
            self._hear_beat(news, now)
        elif isinstance(news, AgentLost):
            if news.node in self._away:  # it did not come back: asked again later
                return
            if news.node_lives:
                log.warning("agent of node %s has ended; starting another", news.node[:12])
                self.board.deafen(news.node)
                self.fleet.open_agent(news.node)
            else:
                self._lose_node(news.node, news.reason)
        elif isinstance(news, Started):
            if news.node not in self.fleet.agents:
                self.fleet.open_agents()
        elif news.is_death:
            self._tell(m.WorkersRefused([news.worker], str(news.error)))
        else:
            self._fail(news.error)

    def _hear_beat(self, beat: Beat, now: float) -> None:
        self._silent_since.pop(beat.node, None)
        if beat.node in self._away:
            self._come_back(beat)
        self.faults.heard(beat, now)
        for row in beat.rows:
            self._row(dict(row))
        for held in self._shards.saw(beat.node, beat.shards):
            self._tell(held)
        lost, starved = [], 0.0
        for sight in beat.sights:
            known = self._sights.get(sight.worker)
            if known is not None:
                starved = max(starved, sight.starved_s - known.starved_s)
            self._sights[sight.worker] = sight
            if not sight.alive and (known is None or known.alive):
                lost.append(sight)
        if lost:
            self._lose(beat.node, lost)
        self.board.excuse(starved, now)
        if self.joining.saw(beat.sights) and self.core.phase == "forming":
            self._tell(m.JoinMoved(self.core.generation))
        self._on_board(beat, now)
        for finding in self.guard.saw(beat, now):
            self._follow(finding)
        if beat.notice is not None and self.core.phase not in ENDED:
            self._drain(beat.notice)
        if beat.node in self._unheard:
            self._unheard.discard(beat.node)
            self._answer_enquiry()
        self._settle(now)

    def _lose(self, node: str, lost: Sequence[Sight]) -> None:
        for sight in lost:
            seat = self.core.seat(sight.worker)
            if seat.state != "gone":
                rank = f"rank {seat.rank}, " if seat.rank is not None else ""
                text = f"{sight.worker} ({rank}pid {sight.record.pid}) died in {sight.record.phase}"
                self._detected(m.WorkersLost([sight.worker], text), text, worker=sight.worker, node=node)
        names = [sight.worker for sight in lost]
        self._tell(m.WorkersLost(names, _deaths(lost)))
        self.fleet.bury(node, names)
        self._dismissed.difference_update(names)
        for name in names:
            self._sights.pop(name, None)

    def _lose_node(self, node: str, why: str) -> None:
        self._detected(m.NodesLost([node], why), f"node {node[:12]} is lost: {why}", node=node)
        self.fleet.lose_node(node)
        self.board.forget(node)
        self._shards.lose(node)
        self._unheard.discard(node)
        here = [name for name in self._sights if self.fleet.node_of.get(name) == node]
        self.guard.lose_node(node, here)
        for name in here:
            del self._sights[name]
        self._away.add(node)
        self._tell(m.NodesLost([node], f"node {node[:12]} lost ({why})"))
        if self.core.phase == "adopting":
            self._answer_enquiry()
        self._settle(time.monotonic())

    def _come_back(self, beat: Beat) -> None:
        """A node that was given up beats again: its link was cut. Its workers' places were given up too."""
        self._away.discard(beat.node)
        self.fleet.regain_node(beat.node)
        strays = {sight.worker for sight in beat.sights if sight.alive and self.core.seat(sight.worker).state == "gone"}
        self._dismissed |= strays
        if strays:
            self._stacks += self.fleet.kill(strays, "its node was out of reach, and its place was given up")
        self._say("detected", what=f"node {beat.node[:12]} is back: it was only out of reach", node=beat.node)
        if beat.node not in self.core.roster.unfit:
            self._tell(m.NodesCleared([beat.node]))

    def _on_board(self, beat: Beat, now: float) -> None:
        """Beacons of the present generation; a stopped process is a fault before anything else stalls."""
        core = self.core
        beacons = []
        for sight in beat.sights:
            record = sight.record
            if sight.alive and record.generation == core.generation and record.state in ("joining", "joined"):
                phase = record.phase if record.phase != "save" else "wait"
                forming = core.phase not in ("running", "stopping")
                patient = forming and sight.pulse_age < FORMING_FACTOR * self.settings.pulse_timeout_s
                age = 0.0 if patient else sight.pulse_age
                beacons.append(Beacon(record.rank, record.step, phase, record.ticks, now - sight.phase_age, now - age))
            elif record.generation == core.generation and record.state == "boundary":
                self.board.beacons.pop(record.rank, None)  # it waits for nobody: whoever hangs is among the others
        stopped = self.board.beat(beat.node, core.generation, beacons, now)
        if stopped and core.phase in ("forming", "running", "stopping"):
            self._suspect(stopped, "its process stands still (stopped, or its interpreter is locked)")
        if core.phase in ("running", "stopping") and beacons:
            step = min(beacon.step for beacon in beacons)
            if step > core.step:
                self._tell(m.Progress(core.generation, step, self.board.step_s))

    # ---- what follows from the beacons

    def _settle(self, now: float) -> None:
        """Tell the core what the workers' states mean for what it waits for."""
        core, ready, joined, out, boundary, finished = self.core, {}, [], [], defaultdict(list), []
        for name, sight in self._sights.items():
            state, mine = sight.record.state, sight.record.generation == core.generation
            if not sight.alive or name in self._dismissed:
                continue
            if state == "standby" and core.phase != "adopting" and core.seat(name).state in ("spawned", "gone"):
                ready[name] = self.fleet.node_of[name]
            elif state == "failed" and core.seat(name).state != "gone":
                self._left(name, sight, now, ERROR_GRACE_S)
            elif core.phase == "aborting" and name in core.roster.joined and state in OUT:
                out.append(name)  # of an older generation too, where a controller died between two
            elif mine and name in core.roster.joined:
                if state in ("joined", "finished"):
                    joined.append((name, sight.record.start))
                if state == "boundary" and core.phase == "stopping":
                    boundary[sight.record.step].append(name)
                elif state == "aborted":
                    self._left(name, sight, now, DEATH_GRACE_S)
                if state == "finished":
                    finished.append(name)
        if ready:
            self._admit(ready, now)
        if out:
            self._tell(m.AbortAcked(core.generation, out))
        for step, names in boundary.items():
            self._tell(m.BoundaryReached(core.generation, step, names))
        if core.phase == "forming" and len(joined) == len(core.roster.joined):
            step = min(step for _, step in joined)
            if step != core.step:
                self._note_join(step)
            self._tell(m.Joined(core.generation, [name for name, _ in joined], step))
        if finished and len(finished) == len(core.roster.joined):
            self._tell(m.Finished(core.generation, self._sights[finished[0]].record.step))

    def _admit(self, ready: Mapping[str, str], now: float) -> None:
        """Workers on standby join once they have measured what is asked of them, and it is good enough."""
        fit = {}
        for name, node in ready.items():
            answer = self.guard.admission.ask(name, node, self._sights[name].notes.get("burn-in"), now)
            if answer.decision.action == "accept":
                fit[name] = node
            elif answer.decision.action == "measure":
                self.fleet.tell(name, "burn_in", answer.again, answer.peer)
            elif answer.decision.action == "quarantine":
                self._say("detected", what=answer.decision.reason, worker=name, node=node)
                self._tell(m.BurnInFailed(name, node, answer.decision))
        if fit:
            measured = {name: self._sights[name].notes.get("burn-in") for name in fit}
            self._say("ready", workers=sorted(fit), burn_in=measured)
            self._tell(m.WorkersReady(fit))

    def _left(self, name: str, sight: Sight, now: float, grace_s: float) -> None:
        """A rank is out of its generation though nobody told it to: a death will explain it, or an error of its own."""
        core = self.core
        since = self._out_since.setdefault((name, sight.record.generation), now)
        if now - since < grace_s and core.phase not in ENDED:
            return
        if sight.record.state == "failed":
            try:
                failure = self.fleet.ask(name, "failure")
            except ray.exceptions.RayError:
                return  # it has died since: that will be heard
            going_on = core.reformed or core.roster.alive
            if core.seat(name).state == "spawned" and going_on:  # another takes its place
                refused = m.WorkersRefused([name], str(failure))
                self._detected(refused, f"{name} did not warm up: {failure}", worker=name)
                self._dismissed.add(name)
                self.fleet.dismiss([name])
                self._tell(refused)
            else:
                self._fail(failure)
        elif core.phase == "forming" and sight.record.phase == "apart":
            self._apart(name)
        elif core.phase in ("forming", "running", "stopping"):
            self._tell(m.Suspected(core.generation, (), f"{name} lost its peers in generation {core.generation}"))

    def _apart(self, name: str) -> None:
        """A rank has found that machines of the generation have no way to each other; all found the same."""
        try:
            failure = self.fleet.ask(name, "failure")
        except ray.exceptions.RayError:
            return  # it has died since: that will be heard
        if not isinstance(failure, PeersUnreachable):
            return  # of a generation before
        members = [worker for block in self.core.blocks for worker in block]
        ways = [(members[rank], members[other]) for rank, other in failure.ways]
        self._say("detected", what=str(failure))
        self._tell(m.PeersApart(self.core.generation, ways, str(failure)))

    def _answer_enquiry(self) -> None:
        if self.core.phase != "adopting" or self._unheard:
            return
        found = []
        for name, sight in self._sights.items():
            record, node = sight.record, self.fleet.node_of[name]
            if record.state == "failed" and not record.generation:  # while it warmed up: nobody needs it
                self._dismissed.add(name)
                if self.fleet.adopt(name, node):
                    self.fleet.dismiss([name])
                continue
            states = {"finished": "joined", "boundary": "aborted", "failed": "aborted"}
            state = states.get(record.state, record.state)
            if sight.alive and state != "starting" and self.fleet.adopt(name, node):
                place = (record.generation, record.rank, record.world_size, record.step)
                found.append(m.Found(name, node, state, *place))
        self._tell(m.Inventory(found, last=True))

    def _judge(self) -> None:
        """Hangs and silent nodes."""
        now = time.monotonic()
        for node in self.board.silent_nodes(now):
            if node not in self.fleet.agents:
                continue
            if self.fleet.node_lives(node) and not self._silent_for_long(node, now):
                continue
            self._lose_node(node, f"no beat for {self.settings.node_timeout_s:g} s")
        if self._out_since:
            self._settle(now)
        if self.core.phase == "running" or (self.core.phase == "stopping" and self.board.beacons):
            decision, whom = self.board.judge(now)
            if whom is not None:
                self._suspect(whom.ranks, f"{decision.reason}: {whom.sign}", self.board.stalled_s(now))
        elif self.core.phase == "forming":
            decision, late = self.joining.judge()
            if late.ranks:
                self._suspect(late.ranks, f"{decision.reason}: {late.sign} ({decision.key})", self.joining.longest_s)

    def _silent_for_long(self, node: str, now: float) -> bool:
        """Silence is named once; what is starved and not gone is asked about again later."""
        first = self._silent_since.setdefault(node, now)
        if now - first > (SILENCE_FACTOR - 1) * self.settings.node_timeout_s:
            return True
        self.board.beat(node, -1, (), now)
        return False

    def _follow(self, finding: Finding) -> None:
        for kind, facts in finding.said:
            self._say(kind, **facts)
        if finding.event is not None:
            self._tell(finding.event)
        if finding.back is not None:
            self._roll_back(finding.step, finding.back, finding.guilty)

    def _suspect(self, ranks: Sequence[int], why: str, stalled_s: float = 0.0) -> None:
        core = self.core
        members = [worker for block in core.blocks for worker in block]
        guilty = [members[rank] for rank in ranks if rank < len(members) and members[rank] in core.roster.joined]
        if guilty or not ranks:
            who = ", ".join(f"{name} (rank {members.index(name)})" for name in guilty) or "nobody in particular"
            event = m.Suspected(core.generation, guilty, f"{who}: {why}")
            self._detected(event, event.reason, stalled_s, workers=guilty)
            self._tell(event)

    def _detected(self, event: m.Event, what: str, since_s: float = 0.0, **facts: Any) -> None:
        """A fault, and how long it had lasted by then: since a process died, a node last beat, a rank last moved."""
        after_s = max(since_s, self.faults.age_s(event, time.monotonic()))
        self._say("detected", what=what, after_s=round(after_s, 4), **facts)

    def _look_around(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < SURROUNDINGS_PERIOD_S:
            return
        self._looked_at = now
        if self.core.phase not in ENDED:
            self._see_stored()
            self._hear_of_drains()
            self.fleet.open_agents()
            self.fleet.look_for_lost()
            self._name_unanswered()
            if self.core.phase == "running":
                self.outcomes.give_up_before(self.core.joins.get(self.core.generation, 0), now)
            self._answer_enquiry()  # where no node is left nobody answers
        self._show_stacks()
        self._account.write(self.watch)

    def _name_unanswered(self) -> None:
        """Agents that Ray has started and that this process does not hear of; once each."""
        for node in self.fleet.unanswered(UNANSWERED_S):
            if node not in self._unanswered and node not in self._away:
                self._unanswered.add(node)
                who = f"node {node[:12]} at {self.fleet.address(node)}"
                what = f"{who} has not answered the controller at {ray.util.get_node_ip_address()} for"
                self._say("detected", what=f"{what} {UNANSWERED_S:g} s. {REACH_EACH_OTHER}", node=node)

    def _see_stored(self, fresh: bool = False) -> None:
        before, self._stored = self._stored, set(self.task.stored(fresh))
        for generation, step in self._stored - before:
            self._tell(m.SnapshotFlushed(generation, step))

    def _hear_of_drains(self) -> None:
        for node, deadline in draining_nodes(ray).items():
            if node in self.fleet.agents:
                self._drain(Notice(node, "ray-drain", deadline))

    def _drain(self, notice: Notice) -> None:
        """A node goes: told once, and again where it goes sooner than it said."""
        at = time.monotonic() + max(0.0, notice.deadline - time.time())
        known = self._draining.get(notice.node)
        if known is None or at < known - SOONER_S:
            self._draining[notice.node] = at
            what = f"node {notice.node[:12]} {in_words(notice)}"
            self._say("detected", what=what, node=notice.node, notice=notice.kind)
            self._tell(m.NodesDraining({notice.node: at}))

    def _show_stacks(self) -> None:
        """Where the stacks of killed ranks are, once their agent has them."""
        if self._stacks:
            done, self._stacks = ray.wait(self._stacks, num_returns=len(self._stacks), timeout=0)
            for reference in done:
                try:
                    for worker, place in ray.get(reference).items():
                        self._say("stacks", worker=worker, stacks=place)
                except ray.exceptions.RayError as error:
                    log.warning("the stacks of a killed rank are lost: %s", error)

    def _spawn(self) -> None:
        """Order new workers, but not while the living ones re-form or take their first step: starting a process takes
        seconds of computing, which would be taken from them."""
        busy = self.core.phase in ("aborting", "forming")
        if self.core.phase == "running" and self.outcomes.next <= self._formed_row:
            busy = time.monotonic() - self._formed_at < FIRST_STEP_S
        if self._to_spawn and not busy:
            for command in self._to_spawn:
                wanted = [worker for worker in command.workers if worker in self.core.roster.ordered]
                self.fleet.spawn(wanted, command.avoid)
            self._to_spawn.clear()

    # ---- the outcome of steps

    def _row(self, row: dict[str, Any]) -> None:
        """One step's outcome, in order, each once."""
        taken = self.outcomes.take(row)
        if taken is not None:
            self.listener.row(taken)
            self.judge.doubt()
            self._judge_loss(taken["step"])

    def _judge_loss(self, step: int) -> None:
        verdict = self.judge.verdict(step)
        if verdict.decision.action in ("roll-back", "fail"):
            self._see_stored(fresh=True)  # by the time that all ranks have left, memory has only newer states
            verdict = self.judge.verdict(step)
        if verdict.decision.action == "skip-update":
            self._say("decided", decision=str(verdict.decision))
        else:
            self._roll_back(step, verdict)

    def _roll_back(self, step: int, verdict: Rollback, guilty: Sequence[str] = ()) -> None:
        """What follows from a judgement after step `step`, if anything does; `guilty` workers are replaced."""
        history = self.journal.history
        action = verdict.decision.action
        if action == "fail":
            self._fail(StepError(f"training does not recover: {verdict.decision}"))
        elif action == "roll-back" and verdict.to_step is not None:
            if self.core.phase not in ("running", "stopping"):
                self.judge.put_off(step, verdict, guilty)
                return
            window = verdict.skip
            skipped = history.skipped if window is None else leave_out(history.skipped, window)
            self._say("rolled-back", step=step, to_step=verdict.to_step, decision=str(verdict.decision))
            joins = {**history.joins, self.core.generation + 1: verdict.to_step}  # also for whoever leads by then
            verified = min(history.verified, verdict.to_step)
            self.journal.note(skipped=skipped, rollbacks=history.rollbacks + 1, joins=joins, verified=verified)
            self.outcomes.back_to(verdict.to_step, self.core.generation + 1)
            self.judge.doubt()
            self._tell(m.RollBack(self.core.generation, verdict.to_step, verdict.decision, guilty))

    def _roll_back_now(self) -> None:
        """What fell due while no generation ran."""
        if (due := self.judge.due) is not None:
            self._see_stored(fresh=True)
            self._roll_back(*self.judge.take(due))

    # ---- telling the core, and doing what it says

    def _tell(self, event: m.Event) -> None:
        before, now = self.core.phase, time.monotonic()
        commands = self.core.handle(event, now)
        pause = self.watch.saw(event, commands, time.time())
        for command in commands:
            self._carry_out(command, now, self.faults.age_s(event, now))
        if self.core.phase == "running" and before != "running":
            self.board.begin(self.core.generation, now)
            self.guard.begin(now)
            self._out_since.clear()
            self._started(pause)
            self._roll_back_now()

    def _carry_out(self, command: m.Command, now: float, fault_age_s: float) -> None:
        if isinstance(command, m.Spawn):
            self._to_spawn.append(command)
        elif isinstance(command, m.Abort):
            for worker in command.workers:
                self.fleet.tell(worker, "abort", command.generation, max(0.1, command.deadline - now), fault_age_s)
        elif isinstance(command, m.Kill):
            self._say("decided", decision=f"kill {', '.join(sorted(command.workers))} | {command.reason}")
            self._dismissed |= command.workers
            self._stacks += self.fleet.kill(command.workers, command.reason)
        elif isinstance(command, m.Dismiss):
            self._dismissed |= command.workers
            self.fleet.dismiss(command.workers)
        elif isinstance(command, m.Join):
            self._join(command)
        elif isinstance(command, m.StopAtBoundary):
            for worker in self.core.roster.joined:
                self.fleet.tell(worker, "stop_at_boundary", command.generation)
        elif isinstance(command, m.Enquire):
            self._unheard = set(self.fleet.agents)
        elif isinstance(command, m.Report):
            log.info("%s", command.decision)
            self._say("decided", decision=str(command.decision), **vars_of(command.decision))
        else:
            self._end = command

    def _join(self, command: m.Join) -> None:
        if command.restore.source == "storage":
            step = self._newest_stored(command.restore.step)
            command = replace(command, restore=replace(command.restore, step=step))
        self.board.begin(command.generation, time.monotonic())
        self.joining.begin(command.generation, len(command.ranks()))
        high = max(self.core.high_step, self.outcomes.next)
        orders = self.task.orders(command, self.fleet, self.journal.history, high)
        for worker, order in orders.items():
            self.fleet.tell(worker, "join", order)
        self._note_join(command.restore.step)  # a controller that dies before this line is told by the beacons

    def _newest_stored(self, default: int) -> int:
        """Storage is looked at once more: what was there may have given way to a newer state since."""
        history = self.journal.history
        stored = [step for gen, step in self.task.stored(fresh=True) if history.on_trajectory(gen, step)]
        return max(stored, default=default)

    def _note_join(self, step: int) -> None:
        """This generation goes on from `step`: what older ones had verified after it will be computed again."""
        history = self.journal.history
        joins = {**history.joins, self.core.generation: step}
        self.core.book.verified = min(history.verified, step)
        self.journal.note(joins=joins, verified=self.core.book.verified)

    def _started(self, pause: Pause | None) -> None:
        core = self.core
        self._formed_at, self._formed_row = time.monotonic(), max(self.outcomes.next, core.step)
        members = [worker for block in core.blocks for worker in block]
        pids = [self._sights[worker].record.pid for worker in members if worker in self._sights]
        event = {"generation": core.generation, "ranks": len(members), "pids": pids, "step": core.step}
        if pause is not None:
            event |= {"pause_s": pause.ended - pause.began, "lost_steps": pause.lost_steps, "action": pause.action}
            event |= {"reason": pause.reason, "key": pause.key}
        self._say("started", **event)

    def _fail(self, error: BaseException | None) -> None:
        """The run ends with this error."""
        if not isinstance(error, RecuaError):
            error = StepError(f"a rank of group {self.fleet.group} failed: {error}")
        self._error = error
        self._end = m.End(False, Decision("fail", str(error), "none"))

    def _say(self, kind: str, **facts: Any) -> None:
        self.listener.event({"event": kind, "generation": self.core.generation, **facts})


def vars_of(decision: Decision) -> dict[str, str]:
    return {"action": decision.action, "reason": decision.reason, "key": decision.key}


def _deaths(lost: Sequence[Sight]) -> str:
    return ", ".join(f"{sight.worker} (pid {sight.record.pid})" for sight in lost) + " died"
