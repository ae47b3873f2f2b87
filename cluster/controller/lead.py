"""Drives the pure controller over Ray: carries out the core's commands, and rolls back if training went wrong.

Who waits for whom: one thread (the caller's) waits for the next message of an agent or a starting worker, or for the
core's deadline. Ranks and agents wait for it only to form the next generation: until something happens they train
without it, and a controller that takes over finds them by their beacons.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import ray

from cluster.config import ElasticSettings
from cluster.controller.fleet import Fleet
from cluster.controller.hearing import Hearing
from cluster.core import messages as m
from cluster.core.history import GroupJournal, Superseded
from cluster.core.state_machine import ENDED, StateMachine
from cluster.goodput.accounts import Pause
from cluster.goodput.group_account import watch_group
from cluster.goodput.writer import AccountWriter
from cluster.guard.guard import Finding, Guard
from cluster.guard.loss_judge import LossJudge
from cluster.guard.step_rows import StepRows
from cluster.policies.decision import Decision
from cluster.policies.rollback import Rollback, leave_out
from infra.errors import NodeLost, RecuaError, StepError, StoreError

log = logging.getLogger(__name__)

SURROUNDINGS_PERIOD_S = 1.0
"""Seconds between looks at storage, and for new and drained nodes."""
FIRST_STEP_S = 2.0
"""Longest time that starting new processes waits for a generation's first step."""
STOOD_STILL_S = 1.0
"""A turn takes a tenth of a second; if it took this long, the controller itself or its store stood still."""


class Task(Protocol):
    """The parts of a group's task that its controller needs."""

    replicated: bool
    """Every rank's shard is the whole state."""

    def orders(self, join: m.Join, fleet: Fleet, history: Any, high_step: int) -> Mapping[str, Any]:
        """{worker: argument of its `join`}."""
        ...

    def stored(self, fresh: bool = False) -> Iterable[tuple[int, int]]:
        """(generation, step) of every snapshot that is whole in storage; `fresh`: as of now, not some time ago."""
        ...


@dataclass(frozen=True)
class Listener:
    """Callbacks: `row` gets every step in order, each once; `event` gets everything that people may want to see."""

    row: Callable[[dict[str, Any]], None] = lambda row: None
    event: Callable[[dict[str, Any]], None] = lambda event: None


class GroupController:
    """Leads one group to its end, from its start or from the state that an earlier controller left.

    Args:
        rows: the outcomes of earlier steps; the first one to read is that of the next step.
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
        self.core = StateMachine(settings, prefix=f"c{number}w", stored=valid, joins=joins, adopting=number > 0)
        self.core.book.verified = history.verified
        journal.note(controllers=number + 1)
        self.watch = watch_group(fleet.settings.accounts, self.core)
        floor = max((one for one, step in history.joins.items() if step <= len(rows)), default=0)
        self.rows = StepRows(rows, floor, 4 * settings.spike_window)
        self.judge = LossJudge(settings, self.core, journal, self.rows, lambda: self._stored)
        guard = Guard(settings, self.core, journal, self.judge.saved)
        self.hearing = Hearing(self, fleet, self.core, settings, guard, task.replicated)
        self._account = AccountWriter(fleet.settings.accounts)
        self._stored = stored
        self._end: m.End | None = None
        self._error: Exception | None = None
        self._looked_at = 0.0
        self._turned_at = time.monotonic()
        self._stacks: list[Any] = []
        self._to_spawn: list[m.Spawn] = []
        self._formed_at, self._formed_row = 0.0, 0

    def run(self) -> None:
        """Lead the group until the last step is committed.

        Raises:
            StepError, UserError: a rank raised it.
            SystemFault: the group cannot continue; the message has the decision and its setting.
            ResourceError: the cluster can never hold `min_workers`.
            Superseded: a later controller leads.
            SystemExit, StoreError: Ray ends this process, or the store fails; the group stays for the next controller.
        """
        ended = False
        try:
            self.fleet.open_agents()
            if not self.journal.history.joins:  # a group that existed before waits for its nodes to come back
                self.fleet.refuse_impossible(self.settings.min_workers)
            self.tell(m.Tick())
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

    # ---- one turn

    def _listen(self) -> None:
        deadline = self.core.next_deadline
        timeout = 0.1 if deadline is None else min(0.1, max(0.0, deadline - time.monotonic()))
        for news in self.fleet.wait(timeout, self._rows_wanted):
            self.hearing.hear(news)
        before, self._turned_at = self._turned_at, time.monotonic()
        if (gap := self._turned_at - before) > STOOD_STILL_S:  # the messages are from before that
            self.hearing.board.excuse(gap, self._turned_at)
        self.hearing.judge()
        self._spawn()
        self._look_around()
        deadline = self.core.next_deadline
        if deadline is not None and time.monotonic() >= deadline:
            self.tell(m.Tick())

    def _rows_wanted(self, node: str) -> tuple[int, int]:
        """Without a fault the rows of one node suffice: the node of rank 0."""
        if self.core.phase == "running" and self.core.blocks:
            first = self.core.blocks[0][0]
            if self.core.roster.node_of.get(first) != node:
                return 1 << 60, 0
        return self.rows.next, self.rows.floor

    def _look_around(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < SURROUNDINGS_PERIOD_S:
            return
        self._looked_at = now
        if self.core.phase not in ENDED:
            self._see_stored()
            self.hearing.look_around()
            if self.core.phase == "running":
                self.rows.give_up_before(self.core.joins.get(self.core.generation, 0), now)
        self._show_stacks()
        self._account.write(self.watch)

    def _see_stored(self, fresh: bool = False) -> None:
        before, self._stored = self._stored, set(self.task.stored(fresh))
        for generation, step in self._stored - before:
            self.tell(m.SnapshotFlushed(generation, step))

    def _show_stacks(self) -> None:
        """Report where the stacks of killed ranks are, once their agent has them."""
        if self._stacks:
            done, self._stacks = ray.wait(self._stacks, num_returns=len(self._stacks), timeout=0)
            for reference in done:
                try:
                    for worker, place in ray.get(reference).items():
                        self.say("stacks", worker=worker, stacks=place)
                except ray.exceptions.RayError as error:
                    log.warning("the stacks of a killed rank are lost: %s", error)

    def _spawn(self) -> None:
        """Start new workers, but not while the live ones re-form or take their first step: starting a process takes
        seconds of computing, which they need."""
        busy = self.core.phase in ("aborting", "forming")
        if self.core.phase == "running" and self.rows.next <= self._formed_row:
            busy = time.monotonic() - self._formed_at < FIRST_STEP_S
        if self._to_spawn and not busy:
            for command in self._to_spawn:
                wanted = [worker for worker in command.workers if worker in self.core.roster.ordered]
                self.fleet.spawn(wanted, command.avoid)
            self._to_spawn.clear()

    # ---- messages (see cluster.controller.hearing.Lead)

    def follow(self, finding: Finding) -> None:
        """Act on a rank or node that the guard found slow, wrong, or about to fail."""
        for kind, facts in finding.said:
            self.say(kind, **facts)
        if finding.event is not None:
            self.tell(finding.event)
        if finding.back is not None:
            self._roll_back(finding.step, finding.back, finding.guilty)

    def fail(self, error: BaseException | None) -> None:
        """End the run with this error."""
        if not isinstance(error, RecuaError):
            error = StepError(f"a rank of group {self.fleet.group} failed: {error}")
        self._error = error
        self._end = m.End(False, Decision("fail", str(error), "none"))

    def say(self, kind: str, **facts: Any) -> None:
        """Report an event for people."""
        self.listener.event({"event": kind, "generation": self.core.generation, **facts})

    def kill(self, workers: Collection[str], reason: str) -> None:
        """Kill workers through their nodes' agents; the location of their stacks is reported later."""
        self.hearing.dismissed.update(workers)
        self._stacks += self.fleet.kill(workers, reason)

    # ---- the outcome of steps

    def row(self, row: dict[str, Any]) -> None:
        """Take one step's outcome; steps come in order, each once."""
        taken = self.rows.take(row)
        if taken is not None:
            self.listener.row(taken)
            self.judge.doubt()
            self._judge_loss(taken["step"])

    def _judge_loss(self, step: int) -> None:
        verdict = self.judge.verdict(step)
        if verdict.decision.action in ("roll-back", "fail"):
            self._see_stored(fresh=True)  # when all ranks have left, memory holds only newer states
            verdict = self.judge.verdict(step)
        if verdict.decision.action == "skip-update":
            self.say("decided", decision=str(verdict.decision))
        else:
            self._roll_back(step, verdict)

    def _roll_back(self, step: int, verdict: Rollback, guilty: Sequence[str] = ()) -> None:
        """Carry out a judgement after step `step`, if it asks for anything; `guilty` workers are replaced."""
        history = self.journal.history
        action = verdict.decision.action
        if action == "fail":
            self.fail(StepError(f"training does not recover: {verdict.decision}"))
        elif action == "roll-back" and verdict.to_step is not None:
            if self.core.phase not in ("running", "stopping"):
                self.judge.put_off(step, verdict, guilty)
                return
            window = verdict.skip
            skipped = history.skipped if window is None else leave_out(history.skipped, window)
            self.say("rolled-back", step=step, to_step=verdict.to_step, decision=str(verdict.decision))
            joins = {**history.joins, self.core.generation + 1: verdict.to_step}  # for a later controller too
            verified = min(history.verified, verdict.to_step)
            self.journal.note(skipped=skipped, rollbacks=history.rollbacks + 1, joins=joins, verified=verified)
            self.rows.back_to(verdict.to_step, self.core.generation + 1)
            self.judge.doubt()
            self.tell(m.RollBack(self.core.generation, verdict.to_step, verdict.decision, guilty))

    def _roll_back_now(self) -> None:
        """Carry out the rollback that fell due while no generation ran."""
        if (due := self.judge.due) is not None:
            self._see_stored(fresh=True)
            self._roll_back(*self.judge.take(due))

    # ---- the core's events and commands

    def tell(self, event: m.Event) -> None:
        """Pass an event to the core, and carry out its commands."""
        before, now = self.core.phase, time.monotonic()
        if isinstance(event, m.Joined) and event.step not in (None, self.core.step):
            self._note_join(event.step)
        commands = self.core.handle(event, now)
        pause = self.watch.saw(event, commands, time.time())
        for command in commands:
            self._carry_out(command, now, self.hearing.faults.age_s(event, now))
        if self.core.phase == "running" and before != "running":
            self.hearing.running(now)
            self._started(pause)
            self._roll_back_now()

    def _carry_out(self, command: m.Command, now: float, fault_age_s: float) -> None:
        if isinstance(command, m.Spawn):
            self._to_spawn.append(command)
        elif isinstance(command, m.Abort):
            for worker in command.workers:
                self.fleet.tell(worker, "abort", command.generation, max(0.1, command.deadline - now), fault_age_s)
        elif isinstance(command, m.Kill):
            self.say("decided", decision=f"kill {', '.join(sorted(command.workers))} | {command.reason}")
            self.kill(command.workers, command.reason)
        elif isinstance(command, m.Dismiss):
            self.hearing.dismissed |= command.workers
            self.fleet.dismiss(command.workers)
        elif isinstance(command, m.Join):
            self._join(command)
        elif isinstance(command, m.StopAtBoundary):
            for worker in self.core.roster.joined:
                self.fleet.tell(worker, "stop_at_boundary", command.generation)
        elif isinstance(command, m.Enquire):
            self.hearing.enquire()
        elif isinstance(command, m.Report):
            log.info("%s", command.decision)
            self.say("decided", decision=str(command.decision), **asdict(command.decision))
        else:
            self._end = command

    def _join(self, command: m.Join) -> None:
        if command.restore.source == "storage":
            step = self._newest_stored(command.restore.step)
            command = replace(command, restore=replace(command.restore, step=step))
        self.hearing.forming(command)
        high = max(self.core.high_step, self.rows.next)
        orders = self.task.orders(command, self.fleet, self.journal.history, high)
        for worker, order in orders.items():
            self.fleet.tell(worker, "join", order)
        self._note_join(command.restore.step)  # if this controller dies before this line, beacons tell the next one

    def _newest_stored(self, default: int) -> int:
        """Look at storage again: a newer state may have replaced the one there."""
        history = self.journal.history
        stored = [step for gen, step in self.task.stored(fresh=True) if history.on_trajectory(gen, step)]
        return max(stored, default=default)

    def _note_join(self, step: int) -> None:
        """Record that this generation resumes from `step`: later steps that were verified are computed again."""
        history = self.journal.history
        joins = {**history.joins, self.core.generation: step}
        self.core.book.verified = min(history.verified, step)
        self.journal.note(joins=joins, verified=self.core.book.verified)

    def _started(self, pause: Pause | None) -> None:
        core = self.core
        self._formed_at, self._formed_row = time.monotonic(), max(self.rows.next, core.step)
        members = core.members
        pids = self.hearing.pids(members)
        event = {"generation": core.generation, "ranks": len(members), "pids": pids, "step": core.step}
        if pause is not None:
            event |= {"pause_s": pause.ended - pause.began, "lost_steps": pause.lost_steps, "action": pause.action}
            event |= {"reason": pause.reason, "key": pause.key}
        self.say("started", **event)
