"""Turns the messages to an elastic group's controller into events of its core.

The core gets the present state of the beacons, never a message that could have been lost: an abort is acknowledged if
the worker's beacon says so. Nothing here waits; the lead carries out the core's answers.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import ray

from cluster.config import ElasticSettings
from cluster.controller.fault_times import FaultTimes
from cluster.controller.fleet import AgentLost, Fleet, News, Started
from cluster.controller.held_shards import HeldShards
from cluster.controller.join_board import JoinBoard
from cluster.core import messages as m
from cluster.core.beat_board import BeatBoard
from cluster.core.state_machine import ENDED, StateMachine
from cluster.guard.guard import Finding, Guard
from cluster.node.rank_watch import Beat, Sight
from cluster.policies.hang import RankProgress
from infra.errors import REACH_EACH_OTHER, PeersUnreachable
from infra.notices import Notice, in_words
from infra.ray_internals import draining_nodes

log = logging.getLogger(__name__)

DEATH_GRACE_S = 0.3
"""Wait after a rank lost a peer for the death that explains it; after that the group re-forms without one."""
ERROR_GRACE_S = 1.0
"""The same for a rank that raised an error of its own."""
SILENCE_FACTOR = 4.0
"""A silent node whose raylet takes connections counts as starved, not gone, for this many `node_timeout_s`."""
FORMING_FACTOR = 10.0
"""The factor on `pulse_timeout_s` while networks are built, which may lock an interpreter for a second."""
UNANSWERED_S = 60.0
"""An agent starts within seconds, or many on a crowded machine; after this long the network may be at fault."""
SOONER_S = 1.0
"""A later notice of the same node counts if its deadline is earlier by this many seconds."""
OUT = ("aborted", "boundary", "finished")
"""States in which a worker is out of its generation's collectives."""


class Lead(Protocol):
    """Acts on the messages. Each call takes effect before it returns, and may change the core's phase."""

    def tell(self, event: m.Event) -> None:
        """Pass an event to the core, and carry out its commands."""
        ...

    def say(self, kind: str, **facts: Any) -> None:
        """Report an event for people."""
        ...

    def row(self, row: dict[str, Any]) -> None:
        """Take one step's outcome."""
        ...

    def follow(self, finding: Finding) -> None:
        """Act on a finding of the guard."""
        ...

    def kill(self, workers: Collection[str], reason: str) -> None:
        """End workers whose places are given up."""
        ...

    def fail(self, error: BaseException | None) -> None:
        """End the run with an error that no recovery can repair."""
        ...


class Hearing:
    """The messages of one group.

    Args:
        replicated: every rank's shard is the whole state.
    """

    def __init__(
        self, lead: Lead, fleet: Fleet, core: StateMachine, settings: ElasticSettings, guard: Guard, replicated: bool
    ) -> None:
        self._lead, self.fleet, self.core, self._settings, self._guard = lead, fleet, core, settings, guard
        self.board, self.joining, self.faults = BeatBoard(settings), JoinBoard(settings), FaultTimes()
        self.dismissed: set[str] = set()
        """Workers that were told to end: their beacons no longer count."""
        self._shards = HeldShards(replicated)
        self._sights: dict[str, Sight] = {}
        self._unheard: set[str] = set()
        self._out_since: dict[tuple[str, int], float] = {}
        self._draining: dict[str, float] = {}
        self._silent_since: dict[str, float] = {}
        self._away: set[str] = set()
        self._unanswered: set[str] = set()

    # ---- calls of the lead

    def hear(self, news: News) -> None:
        """Handle one message of an agent or of a starting worker."""
        now = time.monotonic()
        if isinstance(news, Beat):
            self._hear_beat(news, now)
        elif isinstance(news, AgentLost):
            if news.node in self._away:  # it did not come back: ask again later
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
            self._lead.tell(m.WorkersRefused([news.worker], str(news.error)))
        else:
            self._lead.fail(news.error)

    def judge(self) -> None:
        """Look for hangs and silent nodes."""
        now = time.monotonic()
        for node in self.board.silent_nodes(now):
            if node not in self.fleet.agents:
                continue
            if self.fleet.node_lives(node) and not self._silent_for_long(node, now):
                continue
            self._lose_node(node, f"no beat for {self._settings.node_timeout_s:g} s")
        if self._out_since:
            self._settle(now)
        if self.core.phase == "running" or (self.core.phase == "stopping" and self.board.ranks):
            decision, whom = self.board.judge(now)
            if whom is not None:
                self._suspect(whom.ranks, f"{decision.reason}: {whom.sign}", self.board.stalled_s(now))
        elif self.core.phase == "forming":
            decision, late = self.joining.judge()
            if late.ranks:
                self._suspect(late.ranks, f"{decision.reason}: {late.sign} ({decision.key})", self.joining.longest_s)

    def look_around(self) -> None:
        """Look for what no beat reports: drained, new and lost nodes."""
        self._hear_of_drains()
        self.fleet.open_agents()
        self.fleet.look_for_lost()
        self._name_unanswered()
        self._answer_enquiry()  # if no node is left, no beat will lead here

    def enquire(self) -> None:
        """The core asks for all live workers; it gets the answer when every node has reported."""
        self._unheard = set(self.fleet.agents)

    def forming(self, command: m.Join) -> None:
        """Ranks have been told to form a generation."""
        self.board.begin(command.generation, time.monotonic())
        self.joining.begin(command.generation, len(command.ranks()))

    def running(self, now: float) -> None:
        """A generation has started to run."""
        self.board.begin(self.core.generation, now)
        self._guard.begin(now)
        self._out_since.clear()

    def pids(self, workers: Sequence[str]) -> list[int]:
        """The process ids of the workers that have reported."""
        return [self._sights[worker].record.pid for worker in workers if worker in self._sights]

    # ---- agents and nodes

    def _hear_beat(self, beat: Beat, now: float) -> None:
        self._silent_since.pop(beat.node, None)
        if beat.node in self._away:
            self._come_back(beat)
        self.faults.heard(beat, now)
        for row in beat.rows:
            self._lead.row(dict(row))
        for held in self._shards.saw(beat.node, beat.shards):
            self._lead.tell(held)
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
            self._lead.tell(m.JoinMoved(self.core.generation))
        self._on_board(beat, now)
        for finding in self._guard.saw(beat, now):
            self._lead.follow(finding)
        if beat.notice is not None and self.core.phase not in ENDED:
            self._drain(beat.notice)
        if beat.node in self._unheard:
            self._unheard.discard(beat.node)
            self._answer_enquiry()
        self._settle(now)

    def _lose(self, node: str, lost: Sequence[Sight]) -> None:
        for sight in lost:
            known = self.core.worker(sight.worker)
            if known.state != "gone":
                rank = f"rank {known.rank}, " if known.rank is not None else ""
                text = f"{sight.worker} ({rank}pid {sight.record.pid}) died in {sight.record.phase}"
                self._detected(m.WorkersLost([sight.worker], text), text, worker=sight.worker, node=node)
        names = [sight.worker for sight in lost]
        self._lead.tell(m.WorkersLost(names, _deaths(lost)))
        self.fleet.bury(node, names)
        self.dismissed.difference_update(names)
        for name in names:
            self._sights.pop(name, None)

    def _lose_node(self, node: str, why: str) -> None:
        self._detected(m.NodesLost([node], why), f"node {node[:12]} is lost: {why}", node=node)
        self.fleet.lose_node(node)
        self.board.forget(node)
        self._shards.lose(node)
        self._unheard.discard(node)
        here = [name for name in self._sights if self.fleet.node_of.get(name) == node]
        self._guard.lose_node(node, here)
        for name in here:
            del self._sights[name]
        self._away.add(node)
        self._lead.tell(m.NodesLost([node], f"node {node[:12]} lost ({why})"))
        if self.core.phase == "adopting":
            self._answer_enquiry()
        self._settle(time.monotonic())

    def _come_back(self, beat: Beat) -> None:
        """A node that was given up beats again, because its link had been cut. Its workers' places are gone."""
        self._away.discard(beat.node)
        self.fleet.regain_node(beat.node)
        living = [sight.worker for sight in beat.sights if sight.alive]
        strays = {name for name in living if self.core.worker(name).state == "gone"}
        if strays:
            self._lead.kill(strays, "its node was out of reach, and its place was given up")
        self._lead.say("detected", what=f"node {beat.node[:12]} is back: it was only out of reach", node=beat.node)
        if beat.node not in self.core.roster.unfit:
            self._lead.tell(m.NodesCleared([beat.node]))

    def _silent_for_long(self, node: str, now: float) -> bool:
        """Whether a silent node is lost. A starved node is not, and is checked again later."""
        first = self._silent_since.setdefault(node, now)
        if now - first > (SILENCE_FACTOR - 1) * self._settings.node_timeout_s:
            return True
        self.board.beat(node, -1, (), now)
        return False

    def _name_unanswered(self) -> None:
        """Report agents that Ray has started but that this process does not hear from; once each."""
        for node in self.fleet.unanswered(UNANSWERED_S):
            if node not in self._unanswered and node not in self._away:
                self._unanswered.add(node)
                who = f"node {node[:12]} at {self.fleet.address(node)}"
                what = f"{who} has not answered the controller at {ray.util.get_node_ip_address()} for"
                self._lead.say("detected", what=f"{what} {UNANSWERED_S:g} s. {REACH_EACH_OTHER}", node=node)

    def _hear_of_drains(self) -> None:
        for node, deadline in draining_nodes(ray).items():
            if node in self.fleet.agents:
                self._drain(Notice(node, "ray-drain", deadline))

    def _drain(self, notice: Notice) -> None:
        """Report a node's notice once, and again if its deadline is now earlier."""
        at = time.monotonic() + max(0.0, notice.deadline - time.time())
        known = self._draining.get(notice.node)
        if known is None or at < known - SOONER_S:
            self._draining[notice.node] = at
            what = f"node {notice.node[:12]} {in_words(notice)}"
            self._lead.say("detected", what=what, node=notice.node, notice=notice.kind)
            self._lead.tell(m.NodesDraining({notice.node: at}))

    # ---- what follows from the beacons

    def _on_board(self, beat: Beat, now: float) -> None:
        """Take the present generation's beacons; a stopped process is a fault before anything else stalls."""
        core = self.core
        ranks = []
        for sight in beat.sights:
            record = sight.record
            if sight.alive and record.generation == core.generation and record.state in ("joining", "joined"):
                phase = record.phase if record.phase != "save" else "wait"
                forming = core.phase not in ("running", "stopping")
                patient = forming and sight.pulse_age < FORMING_FACTOR * self._settings.pulse_timeout_s
                age = 0.0 if patient else sight.pulse_age
                place = record.rank, record.step, phase, record.ticks
                ranks.append(RankProgress(*place, now - sight.phase_age, now - age))
            elif record.generation == core.generation and record.state == "boundary":
                self.board.ranks.pop(record.rank, None)  # it waits for no other rank: a hanging one is among the others
        stopped = self.board.beat(beat.node, core.generation, ranks, now)
        if stopped and core.phase in ("forming", "running", "stopping"):
            self._suspect(stopped, "its process stands still (stopped, or its interpreter is locked)")
        if core.phase in ("running", "stopping") and ranks:
            step = min(one.step for one in ranks)
            if step > core.step:
                self._lead.tell(m.Progress(core.generation, step, self.board.step_s))

    def _settle(self, now: float) -> None:
        """Tell the core about the workers' states that it waits for."""
        core, ready, joined, out, boundary, finished = self.core, {}, [], [], defaultdict(list), []
        for name, sight in self._sights.items():
            state, mine = sight.record.state, sight.record.generation == core.generation
            if not sight.alive or name in self.dismissed:
                continue
            if state == "standby" and core.phase != "adopting" and core.worker(name).state in ("spawned", "gone"):
                ready[name] = self.fleet.node_of[name]
            elif state == "failed" and core.worker(name).state != "gone":
                self._left(name, sight, now, ERROR_GRACE_S)
            elif core.phase == "aborting" and name in core.roster.joined and state in OUT:
                out.append(name)  # also of an older generation, if a controller died between two
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
            self._lead.tell(m.AbortAcked(core.generation, out))
        for step, names in boundary.items():
            self._lead.tell(m.BoundaryReached(core.generation, step, names))
        if core.phase == "forming" and len(joined) == len(core.roster.joined):
            step = min(step for _, step in joined)
            self._lead.tell(m.Joined(core.generation, [name for name, _ in joined], step))
        if finished and len(finished) == len(core.roster.joined):
            self._lead.tell(m.Finished(core.generation, self._sights[finished[0]].record.step))

    def _admit(self, ready: Mapping[str, str], now: float) -> None:
        """Admit workers on standby once they have made the requested measurements with good results."""
        fit = {}
        for name, node in ready.items():
            answer = self._guard.admission.ask(name, node, self._sights[name].notes.get("burn-in"), now)
            if answer.decision.action == "accept":
                fit[name] = node
            elif answer.decision.action == "measure":
                self.fleet.tell(name, "burn_in", answer.again, answer.peer)
            elif answer.decision.action == "quarantine":
                self._lead.say("detected", what=answer.decision.reason, worker=name, node=node)
                self._lead.tell(m.BurnInFailed(name, node, answer.decision))
        if fit:
            measured = {name: self._sights[name].notes.get("burn-in") for name in fit}
            self._lead.say("ready", workers=sorted(fit), burn_in=measured)
            self._lead.tell(m.WorkersReady(fit))

    def _left(self, name: str, sight: Sight, now: float, grace_s: float) -> None:
        """A rank has left its generation without an order: a death will explain it, or an error of its own."""
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
            if core.worker(name).state == "spawned" and going_on:  # another one takes its place
                refused = m.WorkersRefused([name], str(failure))
                self._detected(refused, f"{name} did not warm up: {failure}", worker=name)
                self.dismissed.add(name)
                self.fleet.dismiss([name])
                self._lead.tell(refused)
            else:
                self._lead.fail(failure)
        elif core.phase == "forming" and sight.record.phase == "apart":
            self._apart(name)
        elif core.phase in ("forming", "running", "stopping"):
            self._lead.tell(m.Suspected(core.generation, (), f"{name} lost its peers in generation {core.generation}"))

    def _apart(self, name: str) -> None:
        """A rank has found, as all others have, that machines of the generation cannot reach each other."""
        try:
            failure = self.fleet.ask(name, "failure")
        except ray.exceptions.RayError:
            return  # it has died since: that will be heard
        if not isinstance(failure, PeersUnreachable):
            return  # of an earlier generation
        members = self.core.members
        ways = [(members[rank], members[other]) for rank, other in failure.ways]
        self._lead.say("detected", what=str(failure))
        self._lead.tell(m.PeersApart(self.core.generation, ways, str(failure)))

    def _answer_enquiry(self) -> None:
        """Tell an adopting core which workers live, once every node has reported."""
        if self.core.phase != "adopting" or self._unheard:
            return
        found = []
        for name, sight in self._sights.items():
            record, node = sight.record, self.fleet.node_of[name]
            if record.state == "failed" and not record.generation:  # it failed while it warmed up: it is not needed
                self.dismissed.add(name)
                if self.fleet.adopt(name, node):
                    self.fleet.dismiss([name])
                continue
            states = {"finished": "joined", "boundary": "aborted", "failed": "aborted"}
            state = states.get(record.state, record.state)
            if sight.alive and state != "starting" and self.fleet.adopt(name, node):
                place = (record.generation, record.rank, record.world_size, record.step)
                found.append(m.Found(name, node, state, *place))
        self._lead.tell(m.Inventory(found, last=True))

    def _suspect(self, ranks: Sequence[int], why: str, stalled_s: float = 0.0) -> None:
        core, members = self.core, self.core.members
        guilty = [members[rank] for rank in ranks if rank < len(members) and members[rank] in core.roster.joined]
        if guilty or not ranks:
            who = ", ".join(f"{name} (rank {members.index(name)})" for name in guilty) or "nobody in particular"
            event = m.Suspected(core.generation, guilty, f"{who}: {why}")
            self._detected(event, event.reason, stalled_s, workers=guilty)
            self._lead.tell(event)

    def _detected(self, event: m.Event, what: str, since_s: float = 0.0, **facts: Any) -> None:
        """Report a fault and its age: since a process died, a node last beat, or a rank last made progress."""
        after_s = max(since_s, self.faults.age_s(event, time.monotonic()))
        self._lead.say("detected", what=what, after_s=round(after_s, 4), **facts)


def _deaths(lost: Sequence[Sight]) -> str:
    return ", ".join(f"{sight.worker} (pid {sight.record.pid})" for sight in lost) + " died"
