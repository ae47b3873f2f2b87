"""Attempts of calls: starts them on Ray up to `max_in_flight`, watches them, and retries them if that is allowed. Short
calls share Ray tasks (workflows.worker.batch).

All code here runs on the loop's thread. A call holds its place from the start of an attempt until its commit is
written, so that no more bodies start than a slow or stopped store can take results of.
"""

import functools
import itertools
import json
import os
import random
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from infra.errors import UserError
from workflows.driver.call import Batch, Call, RunContext
from workflows.driver.loop import Loop
from workflows.driver.pace import TASKS_PER_CPU, Pace, may_share
from workflows.driver.ray_tasks import NODES_AGE_S, RayTasks
from workflows.driver.stopped_drivers import StoppedDrivers
from workflows.graph.artifacts import ArtifactSource
from workflows.runs.journal import fenced
from workflows.runs.records import Failed, Json, Record, Start
from workflows.worker.batch import BYTES, ENDED, HANDED_BACK, SLOW_S
from workflows.worker.channel import Listener
from workflows.worker.failures import of_ray_error, rebuild

LONGEST_PAUSE_S = 30.0
GANG_PATIENCE_S = 2.0
TIMEOUT_GRACE_S = 15.0
RAY_LOST: Json = {"kind": "system", "type": "NodeLost", "message": "the local Ray is gone", "traceback": ""}
CROWD = 32
"""With this many attempts in flight, waiting for a few milliseconds costs nothing: Ray has work for longer."""


@dataclass(frozen=True)
class AttemptEvents:
    """The executor as attempts see it, on the loop's thread."""

    note: Callable[[Record], None]
    """Write a record into the journal."""
    on_result: Callable[[Call, Json], None]
    """A body succeeded; its place is held until `Attempts.settled(call)`."""
    on_failure: Callable[[Call, BaseException], None]
    """A call failed for good."""
    on_error: Callable[[BaseException], None]
    """The run cannot continue."""
    lease_until: Callable[[], float]
    """Wall-clock time until which no other driver can have taken the lease."""


class Attempts:
    """The attempts of one run."""

    def __init__(self, run: RunContext, loop: Loop, told: AttemptEvents) -> None:
        journal, settings = run.journal, run.settings
        self._run = run
        self._loop = loop
        self._told = told
        lost, back = (functools.partial(loop.post, work) for work in (self._on_ray_lost, self._on_ray_back))
        self._placement = RayTasks(settings, journal.store, lost, back, told.on_error)
        self._source = ArtifactSource(journal.store.url, settings.cache)
        self._listener: Listener | None = None
        self._cluster_checks = run.cluster_checks
        self._no_node = False
        self._earlier = {call: len(starts) for call, starts in journal.state.starts.items()}
        self._ready: deque[Call] = deque()
        self._running: dict[str, tuple[Call, Batch]] = {}
        self._numbers = itertools.count()
        self._pace = Pace()
        self._pump_comes = False
        self._unsettled: set[str] = set()
        self._stopped = False
        self._changed = threading.Condition()

    def crowded(self) -> bool:
        """Whether so many attempts are in flight that waiting for a few milliseconds costs nothing."""
        return len(self._running) >= CROWD

    def enqueue(self, call: Call) -> None:
        """Start an attempt as soon as there is a place."""
        if self._stopped:
            return
        if self._listener is None:
            self._connect()
        self._ready.append(call)
        self._pump_soon()

    def settled(self, call: Call) -> None:
        """The call's result is committed: its place is free."""
        self._unsettled.discard(call.id)
        self._pump_soon()

    def cancel_all(self) -> None:
        """Start no more attempts, and kill the running ones."""
        self._stopped = True
        self._placement.leave()
        self._ready.clear()
        for batch in {batch for _, batch in self._running.values()}:
            self._placement.cancel(batch.reference)
        if self._placement.is_lost():  # nothing runs, and no task will report that
            self._running.clear()
        with self._changed:
            self._changed.notify_all()

    def abandon(self) -> None:
        """Another driver has taken over: start no more attempts. The running ones end with this process: cancelling
        them would race with results that came while this driver slept, and Ray aborts a process where both happen."""
        self._running.clear()
        self.cancel_all()

    def wait_until_none_runs(self, seconds: float) -> None:
        """Close; called by the thread that closes the run."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running, timeout=max(0.0, seconds))

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._placement.close()

    def _connect(self) -> None:
        host = self._placement.start()
        self._listener = Listener(host, functools.partial(self._loop.post, self._on_message), self._told.on_error)
        run = {
            "run": self._run.journal.run_id,
            "lease_slot": self._run.journal.lease_slot,
            "store": self._source.store_url,
            "cache": self._source.cache,
            "channel": self._listener.address,
            "driver_pid": os.getpid(),
            "nodes_come": self._run.settings.wait_for_nodes,
        }
        self._placement.prepare(json.dumps(run))
        replaced = self._run.journal.state.replaced
        if replaced and not self._placement.is_local:
            killed = functools.partial(self._loop.post, self._on_killed)
            drivers = StoppedDrivers([lease.to_json() for lease in replaced], self._placement.everywhere, killed)
            self._loop.later(self._run.journal.ttl_s, self._free_workers, drivers, frozenset())

    def _pump_soon(self) -> None:
        """Submit after all that is in the inbox now, so that calls that are ready together can share a task."""
        if not self._pump_comes:
            self._pump_comes = True
            self._loop.post(self._pump)

    def _pump(self) -> None:
        self._pump_comes = False
        if not self._ready or self._placement.is_lost() or not self._has_node():
            return
        most = self._run.settings.max_in_flight
        while self._ready and len(self._running) + len(self._unsettled) < most and not self._stopped:
            call = self._ready.popleft()
            try:
                missing = self._placement.check(call.id, call.options)
            except UserError as error:
                if call.attempt:  # it fitted until a node was lost, and another node may join
                    lost = {"kind": "system", "type": "NodeLost", "message": str(error), "traceback": ""}
                    self._on_attempt_failed(call, lost)
                else:
                    self._told.on_failure(call, error)
            else:
                self._start(call, missing)

    def _has_node(self) -> bool:
        """Whether the cluster has a node; without one, steps wait. The first nodes are checked."""
        nodes = self._placement.nodes()
        if not nodes:
            if not self._no_node:
                self._no_node = True
                self._run.warn("the Ray cluster has no live node: steps wait until one joins it")
                self._loop.later(NODES_AGE_S, self._look_for_node)
            return False
        checks, self._cluster_checks = self._cluster_checks, ()
        if not self._run.settings.wait_for_nodes:
            for check in checks:
                check(nodes)
        return True

    def _look_for_node(self) -> None:
        if self._placement.nodes():
            self._no_node = False
            self._pump_soon()
        elif not self._stopped:
            self._loop.later(NODES_AGE_S, self._look_for_node)

    def _on_ray_lost(self, message: str) -> None:
        """The run's own Ray died with its tasks; another one is starting."""
        gone = [call for call, batch in list(self._running.values()) if self._let_go(call, batch)]
        if not self._stopped:
            self._run.warn(message)
        for call in gone:
            self._on_attempt_failed(call, RAY_LOST, blamed=self._may_not_repeat)

    def _on_ray_back(self) -> None:
        self._placement.look_again()
        self._pump_soon()

    def _start(self, call: Call, missing: str | None) -> None:
        """Submit a task for this call, and for waiting calls that may share it. `missing`: the request that the present
        nodes cannot meet, if any."""
        batch = Batch(next(self._numbers), [call])
        together = 1 if missing is not None else self._together(call)
        texts = [self._payload(call)]
        room = BYTES - len(texts[0])
        while len(texts) < together and room > 0 and self._ready and self._alike(call, self._ready[0]):
            batch.calls.append(self._ready.popleft())
            texts.append(self._payload(batch.calls[-1]))
            room -= len(texts[-1])

        def done(outcomes: bytes | None, error: BaseException | None) -> None:
            self._loop.post(self._on_done, batch, outcomes, error)

        text = f'{{"batch": {batch.number}, "calls": [{",".join(texts)}]}}'.encode()
        batch.reference = self._placement.submit(call.id, call.step.short_name, call.options, text, done)
        self._running.update({each.id: (each, batch) for each in batch.calls})
        if missing is not None:
            self._run.tell("pending", call, message=f"waits for nodes: it {missing}")
        elif call.options.gang is not None:
            self._loop.later(GANG_PATIENCE_S, self._on_no_gang_yet, weakref.ref(call), call.attempt_id)

    def _together(self, call: Call) -> int:
        """The number of calls that may share a task with this one, itself included; every CPU should have several
        tasks. None if retries are not allowed, because all calls of a task run again when its worker dies."""
        if not self._is_first(call) or not may_share(call.options) or not self._run.settings.system_retries:
            return 1
        crowd, places = len(self._ready) + len(self._running), len(self._running) + len(self._unsettled)
        tasks = TASKS_PER_CPU * max(1, self._placement.at_once(call.options))
        return min(self._pace.together(call.step.name), crowd // tasks, self._run.settings.max_in_flight - places)

    def _alike(self, call: Call, other: Call) -> bool:
        return other.step.name == call.step.name and other.options == call.options and self._is_first(other)

    @property
    def _may_not_repeat(self) -> bool:
        """A lost Ray counts as no failure of the call, but ends the run if retries are not allowed."""
        return not self._run.settings.system_retries

    def _is_first(self, call: Call) -> bool:
        return call.attempt == 0 and call.id not in self._earlier

    def _payload(self, call: Call) -> str:
        """Begin an attempt, or continue the one that was handed back; returns its data for the worker, in JSON."""
        if not call.handed_back:
            call.attempt = max(call.attempt, self._earlier.pop(call.id, 0)) + 1
            call.attempt_id, call.started = uuid.uuid4().hex, None
            attempt = (call.attempt, call.attempt_id)
            self._told.note(Start(call.id, call.step.name, call.needs, *attempt, time.time()))
        call.handed_back = False
        payload = {
            "call": call.id,
            "step": call.step.name,
            "arguments": call.arguments,
            "attempt": call.attempt,
            "attempt_id": call.attempt_id,
            "timeout": call.options.timeout,
            "lease_until": self._told.lease_until(),
        }
        due = {point: self._run.faults.take(point) for point in ("executor.body", "artifact.upload")}
        if any(due.values()):
            payload["faults"] = {point: action for point, action in due.items() if action}
        return json.dumps(payload)

    def _on_message(self, message: Json) -> None:
        call, batch = self._running.get(message.get("call", ""), (None, None))
        if call is None or batch is None or message.get("attempt_id") != call.attempt_id:
            return
        kind = message["kind"]
        if kind in (ENDED, HANDED_BACK):
            if message["batch"] == batch.number and self._let_go(call, batch):
                self._on_slow_batch(call, message.get("outcome"))
        elif kind == "started":
            call.started = time.monotonic()
            self._run.tell("started", call, node=message["node"], pid=message["pid"], attempt=call.attempt)
            if call.options.timeout is not None:
                overdue = call.options.timeout + TIMEOUT_GRACE_S
                self._loop.later(overdue, self._on_overdue, weakref.ref(call), call.attempt_id)
        elif kind in ("progress", "log"):
            data = {key: value for key, value in message.items() if key not in ("kind", "call", "attempt_id")}
            self._run.tell(kind, call, **data)

    def _on_no_gang_yet(self, waiting: "weakref.ref[Call]", attempt_id: str) -> None:
        """Report that a gang waits: all its bundles must be free at the same time, which may take long."""
        call = waiting()
        if call is not None and call.attempt_id == attempt_id and call.id in self._running and call.started is None:
            self._run.tell("pending", call, message=f"waiting for resources: {call.options.whole_gang()}")

    def _free_workers(self, before: StoppedDrivers, waiting: frozenset[str]) -> None:
        """If an attempt that was `waiting` still waits, kill stopped earlier drivers, which may hold its resources."""
        now = frozenset(call.attempt_id for call, _ in self._running.values() if call.started is None)
        if now & waiting:
            before.kill()
        self._loop.later(self._run.journal.ttl_s, self._free_workers, before, now)

    def _on_killed(self, pid: int) -> None:
        self._run.warn(f"killed process {pid}, a stopped driver of this run that held workers of the cluster")

    def _on_overdue(self, late: "weakref.ref[Call]", attempt_id: str) -> None:
        """Handle an attempt past its timeout that its reaper should have killed: the whole node may be stuck."""
        call = late()
        if call is not None and call.attempt_id == attempt_id and call.id in self._running:
            self._placement.cancel(self._running[call.id][1].reference)

    def _on_slow_batch(self, call: Call, outcome: str | None) -> None:
        """Another call's body delays the task: this call has ended, or is handed back."""
        if outcome is None:
            self._pace.saw(call.step.name, SLOW_S)
            self._hand_back(call)
        else:
            self._on_outcome(call, json.loads(outcome))

    def _on_done(self, batch: Batch, text: bytes | None, error: BaseException | None) -> None:
        if error is not None:
            self._on_lost(batch, error)
        else:
            assert text is not None
            for call, outcome in zip(batch.calls, json.loads(text), strict=True):
                if not self._let_go(call, batch):
                    continue
                if outcome is None:
                    self._hand_back(call)
                else:
                    self._on_outcome(call, outcome)
        self._pump_soon()

    def _let_go(self, call: Call, batch: Batch) -> bool:
        """Take the call from its batch. False if that was done before, or if the run is ending."""
        if self._running.get(call.id, (call, None))[1] is not batch:
            return False
        del self._running[call.id]
        if self._stopped:
            with self._changed:
                self._changed.notify_all()
        return not self._stopped

    def _hand_back(self, call: Call) -> None:
        call.handed_back = True
        self._ready.appendleft(call)
        self._pump_soon()

    def _on_outcome(self, call: Call, outcome: Json) -> None:
        self._pace.saw(call.step.name, outcome["seconds"])
        if "warning" in outcome:
            self._run.tell("warning", call, message=outcome["warning"])
        if outcome["ok"]:
            self._run.faults.reach("executor.before-commit")
            self._unsettled.add(call.id)
            self._told.on_result(call, outcome)
        else:
            self._on_attempt_failed(call, outcome["error"])

    def _on_lost(self, batch: Batch, error: BaseException) -> None:
        """The task ended without a report of these calls. If there are several, the faulty one is unknown: each is
        retried alone, without counting as a retry."""
        lost = [call for call in batch.calls if self._let_go(call, batch)]
        if lost:
            self._placement.judge(error)
        preempted = bool(lost) and self._placement.was_preempted(error)
        for call in lost:
            ran = None if call.started is None else time.monotonic() - call.started
            record = of_ray_error(error, ran, call.options.timeout, preempted)
            self._on_attempt_failed(call, record, blamed=len(lost) == 1)

    def _on_attempt_failed(self, call: Call, record: Json, blamed: bool = True) -> None:
        if record["type"] == "FencedError" and record["kind"] == "system":  # not a class of the user's with this name
            self._told.on_error(fenced(self._run.journal.run_id))
            return
        if self._placement.is_lost():  # its Ray has died, so the error is not the call's
            record, blamed = RAY_LOST, self._may_not_repeat
        system, settings = record["kind"] == "system", self._run.settings
        if system:
            if call.started is not None and time.monotonic() - call.started > settings.retry_window_s:
                call.system_failures = 0  # weeks of training may lose more processes than a crashing step may
            call.system_failures += blamed
            final = call.system_failures > settings.system_retries
        else:
            call.user_failures += 1
            final = record["kind"] == "refused" or call.user_failures > call.options.retries
        attempt = (call.attempt, call.attempt_id)
        self._told.note(Failed(call.id, call.step.name, (), *attempt, error=record, final=final, time=time.time()))
        if final:
            self._told.on_failure(call, rebuild(call.id, record))
            return
        failures = call.system_failures if system else call.user_failures
        pause = min(LONGEST_PAUSE_S, self._run.settings.backoff_s * 2.0 ** min(failures - 1, 64)) * random.uniform(
            0.5, 1.0
        )
        self._run.tell("retry", call, error=record["message"], error_type=record["type"], seconds=pause)
        self._loop.later(pause, self.enqueue, call)
