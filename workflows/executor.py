"""The driver: turns a workflow's calls into committed results.

Who waits for whom. The main thread runs the workflow function and waits in `result()`. One loop thread owns all state:
everything reaches it as a function in its inbox (a new call, a finished attempt, a written commit, a timer). Ray's
threads and the channel put finished attempts and messages into that inbox; the journal's thread writes slots and puts
"written" into it. The loop waits for nobody; only after "written" is a call done and are its dependents started.

A body may run more than once (a driver can die between a body's end and its commit); what holds is one commit record
per call, no attempt of a committed call, and no dependent before its inputs are committed.
"""

import functools
import heapq
import itertools
import json
import os
import queue
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from infra.errors import NonDeterminismError, RecuaError, UserError
from infra.faults import FaultSchedule
from workflows.artifacts import ArtifactSource
from workflows.channel import Listener
from workflows.config import RunSettings
from workflows.events import Event
from workflows.fanout import Fanout, fan_out
from workflows.graph import Step, StepOptions, edges_of, resolve_edges
from workflows.journal import GroupCommit, Heartbeat, Journal, fenced
from workflows.known import Known, ReuseIndex, inputs_digest, shown_arguments
from workflows.outcome import describe, of_ray_error, rebuild
from workflows.placement import Placement
from workflows.status import StatusFile
from workflows.taken import PathTaken
from workflows.values import decode, encode
from workflows.waits import Poller, Wait, answer, check_question, command, wait_record

Record = dict[str, Any]
ClusterCheck = Callable[[list[dict[str, float]]], None]
LONGEST_PAUSE_S = 30.0
TIMEOUT_GRACE_S = 15.0
CANCEL_DEADLINE_S = 10.0
LEAVING_PATIENCE_S = 5.0


@dataclass
class Call:
    """One call of one step, from its making to its end. A map is one too: it has a `fanout`, makes its `children` when
    its list is there, and ends when they have; `of`: how many items the map has that this call belongs to."""

    id: str
    step: Step[..., Any]
    options: StepOptions
    arguments: Any
    needs: tuple[str, ...]
    fanout: Fanout | None = None
    children: list["Call"] | None = None
    of: int | None = None
    waiting: int = 0
    dependents: list["Call"] = field(default_factory=list)
    key: str = ""
    code: str = ""
    attempt: int = 0
    attempt_id: str = ""
    started: float | None = None
    user_failures: int = 0
    system_failures: int = 0
    result: Any = None
    error: BaseException | None = None
    ended: bool = False
    seen: bool = False


class Executor:
    """Carries out the calls of one run; the Runtime of graph.py."""

    def __init__(
        self,
        journal: Journal,
        known: Known,
        settings: RunSettings,
        faults: FaultSchedule,
        emit: Callable[[Event], None],
    ) -> None:
        self.journal = journal
        self._known = known
        self._settings = settings
        self._faults = faults
        self._emit = emit
        self._source = ArtifactSource(journal.store.url, settings.cache)
        self._path = PathTaken(journal.state)
        self._earlier = {call: len(starts) for call, starts in journal.state.starts.items()}
        self._asked: dict[str, Record] = {}
        self._poller = Poller(
            journal.store,
            journal.run_id,
            lambda call_id, signal: self._inbox.put(lambda: self._on_signal(call_id, signal)),
            self.abort,
        )
        self._placement = Placement(settings, journal.store)
        self._listener: Listener | None = None
        self._calls: dict[str, Call] = {}
        self._open = 0
        self._failed: list[Call] = []
        self._fatal: BaseException | None = None
        self._hooks: list[Callable[[], None]] = []
        self._cluster_checks: list[ClusterCheck] = []
        self._changed = threading.Condition()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._ready: deque[Call] = deque()
        self._running: dict[str, Any] = {}
        remote = journal.store.local_path("runs") is None
        self._lookups = ThreadPoolExecutor(8, thread_name_prefix="recua-lookup") if remote else None
        self._index = ReuseIndex(journal.store, self.abort)
        self._commits = GroupCommit(journal, self.abort, 0.01 if remote else 0.0, written=self._after_write)
        self._status = StatusFile(journal)
        self._heartbeat = Heartbeat(journal, self._on_cancel, self.abort, self._status.write, known.marks.acknowledge)
        self._thread = threading.Thread(target=self._loop, name="recua-loop", daemon=True)
        self._thread.start()

    # --- the workflow's side (main thread) ---

    def call(self, call_id: str, step: Step[..., Any], options: StepOptions, arguments: dict[str, Any]) -> None:
        self._faults.reach("executor.between-steps")
        self._raise_fatal()
        needs: list[str] = []
        tree = encode(arguments, f"{call_id}: argument", edges_of(self, needs))
        self._add(Call(call_id, step, options, tree, tuple(dict.fromkeys(needs))))

    def map(self, call_id: str, step: Step[..., Any], options: StepOptions, items: Any, arguments: Any) -> None:
        self._raise_fatal()
        fanout = fan_out(self, call_id, items, arguments)
        self._add(Call(call_id, step, options, None, fanout.waits_for, fanout))

    def _add(self, call: Call) -> None:
        with self._changed:
            self._calls[call.id] = call
            self._open += 1
        self._inbox.put(lambda: self._on_call(call))

    def result(self, call_id: str) -> Any:
        call = self._calls[call_id]
        self._wait(lambda: call.ended)
        if call.error is not None:
            call.seen = True
            raise call.error
        return decode(call.result, self._source)

    def done(self, call_id: str) -> bool:
        return self._calls[call_id].ended

    @property
    def run_id(self) -> str:
        return self.journal.run_id

    def on_end(self, hook: Callable[[], None]) -> None:
        self._hooks.append(hook)

    def on_cluster(self, check: ClusterCheck) -> None:
        """Call `check(nodes)` once, before the first attempt: each node's resources by Ray's names. Not where an
        autoscaler may bring other nodes."""
        self._cluster_checks.append(check)

    def finish(self, value: Any) -> Any:
        """Wait for every call, then return the workflow's own result, encoded. Raises the first unhandled failure."""
        self._wait(lambda: not self._open)
        self._raise_fatal()
        self._raise_unseen_failure()
        self._path.check(lambda text: self._emit(Event("warning", data={"message": text})))
        return self._resolve(encode(value, "the workflow's result", edges_of(self, [])))

    def close(self, end: Record | None) -> None:
        """Cancel what still runs, write `end` (unless the run is no longer ours), call the hooks, leave Ray.

        Raises:
            StoreError, FencedError: the run is finished but for its `end`, which could not be written: running again
                goes on from there. Of any other end there is an error to tell already.
        """
        finished = end is not None and end["status"] == "finished"
        if not finished:
            self.journal.store.hurry(LEAVING_PATIENCE_S)
        self._inbox.put(self._cancel_all)
        deadline = time.monotonic() + CANCEL_DEADLINE_S
        with self._changed:
            self._changed.wait_for(lambda: not self._running, timeout=max(0.0, deadline - time.monotonic()))
        self._poller.close()
        self._inbox.put(None)
        self._thread.join()
        if self._lookups is not None:
            self._lookups.shutdown(cancel_futures=True)
        self._index.close()
        # The end is on record before anything else is taken down: where a whole process group was told to stop, Ray is
        # going too, and its client may end this process in the middle of a hook.
        if end is not None:
            self._commits.note(end)
        self._commits.close()
        if end is not None:
            self._status.write()
        for hook in reversed(self._hooks):
            try:
                hook()
            except Exception as error:
                self._emit(Event("warning", data={"message": f"a hook at the end of the run failed: {error!r}"}))
        self._heartbeat.close()
        if self._listener is not None:
            self._listener.close()
        self._placement.close()
        if finished and self._commits.failure is not None:
            raise self._commits.failure

    def abort(self, error: BaseException) -> None:
        """Stop the run with `error`, from any thread: every waiting `result()` raises it."""
        with self._changed:
            if self._fatal is None:
                self._fatal = error
            self._changed.notify_all()
        self._inbox.put(self._cancel_all)

    @property
    def fatal(self) -> BaseException | None:
        return self._fatal

    def _wait(self, over: Callable[[], bool]) -> None:
        with self._changed:
            while not over():
                self._raise_fatal()
                self._raise_unseen_failure()
                self._changed.wait()

    def _raise_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal

    def _raise_unseen_failure(self) -> None:
        for call in self._failed:
            if not call.seen and not call.options.may_fail:
                assert call.error is not None
                call.seen = True
                raise call.error

    def _resolve(self, tree: Any) -> Any:
        return resolve_edges(tree, lambda call_id: self._calls[call_id].result)

    # --- the loop ---

    def _loop(self) -> None:
        while True:
            wait = self._timers[0][0] - time.monotonic() if self._timers else None
            try:
                if wait is not None and wait <= 0:
                    raise queue.Empty
                work = self._inbox.get(timeout=wait)
            except queue.Empty:
                work = heapq.heappop(self._timers)[2]
            if work is None:
                return
            try:
                work()
            except BaseException as error:
                self.abort(error)

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), work))

    def _on_call(self, call: Call) -> None:
        for need in call.needs:
            upstream = self._calls[need]
            if upstream.error is not None:
                self._fail(call, upstream.error)
                return
            if not upstream.ended:
                upstream.dependents.append(call)
                call.waiting += 1
        if not call.waiting:
            self._on_inputs(call)

    def _on_inputs(self, call: Call) -> None:
        """All inputs are committed: resume, reuse, or run."""
        if call.ended or self._fatal is not None:
            return
        if call.fanout is not None:
            self._on_map(call, call.fanout)
            return
        call.arguments = self._resolve(call.arguments)
        try:
            record = self._known.committed(call.id, call.step, call.options, call.arguments)
            self._path.made(call.id, record)
            if record is not None:
                self._emit_call("resumed", call, seconds=record["seconds"])
                self._succeed(call, record["result"])
                return
            call.key = self._known.key(call.step, call.options, call.arguments)
            call.code = self._known.fingerprint(call.step, call.options).code
        except NonDeterminismError:
            raise
        except UserError as error:
            self._fail(call, error)
            return
        if not self._known.may_reuse(call.id, call.step, call.options):
            self._enqueue(call)
            return
        self._known.marks.begin(call.id)
        if self._lookups is None:
            self._on_looked_up(call, self._known.reusable(call.key))
        else:
            self._lookups.submit(self._look_up, call)

    def _on_map(self, call: Call, fanout: Fanout) -> None:
        """Its list is there: one call per item. Later all of them have ended: their results, and they are forgotten."""
        if call.children is None:
            try:
                items = self._resolve(fanout.items) if fanout.waits_for else fanout.items
                children = fanout.children(call.id, call.step.short_name, items)
            except UserError as error:
                self._fail(call, error)
                return
            self._path.check_map(call.id, len(children))
            call.children = [
                Call(child.call_id, call.step, call.options, child.arguments, child.needs, of=len(children))
                for child in children
            ]
            call.fanout, call.waiting = replace(fanout, items=None), len(children)
            for child in call.children:
                child.dependents.append(call)
                self._add(child)
        if call.waiting:
            return
        failed = next((child.error for child in call.children if child.error is not None), None)
        if failed is not None:
            self._fail(call, failed)
        else:
            self._succeed(call, [child.result for child in call.children])
        for child in call.children:
            del self._calls[child.id]
        call.children = []

    def _look_up(self, call: Call) -> None:
        try:
            record = self._known.reusable(call.key)
        except BaseException as error:
            self.abort(error)
            return
        self._inbox.put(lambda: self._on_looked_up(call, record))

    def _on_looked_up(self, call: Call, record: Record | None) -> None:
        if record is None:
            self._known.marks.end(call.id)
            self._enqueue(call)
            return
        now = time.time()
        times = {"started": now, "ended": now, "seconds": record["seconds"], "node": "", "attempt": 0}
        self._commit(call, record["result"], {**times, "reused_from": record["run"]})

    # --- attempts ---

    def _enqueue(self, call: Call) -> None:
        if self._fatal is not None:
            return
        if isinstance(call.step, Wait):
            self._wait_outside(call)
            return
        if self._listener is None:
            host = self._placement.start()
            if not self._settings.wait_for_nodes:
                for check in self._cluster_checks:
                    check(self._placement.nodes())
            self._listener = Listener(host, lambda message: self._inbox.put(lambda: self._on_message(message)))
        self._ready.append(call)
        self._pump()

    def _pump(self) -> None:
        while self._ready and len(self._running) < self._settings.max_in_flight and self._fatal is None:
            call = self._ready.popleft()
            try:
                self._placement.check(call.id, call.options)
            except UserError as error:
                self._fail(call, error)
            else:
                self._start(call)

    def _start(self, call: Call) -> None:
        call.attempt = self._earlier.get(call.id, 0) + 1
        self._earlier[call.id] = call.attempt
        call.attempt_id, call.started = uuid.uuid4().hex, None
        assert self._listener is not None
        due = {point: self._faults.take(point) for point in ("executor.body", "artifact.upload")}
        payload = {
            "run": self.journal.run_id,
            "call": call.id,
            "step": call.step.name,
            "arguments": call.arguments,
            "attempt": call.attempt,
            "attempt_id": call.attempt_id,
            "timeout": call.options.timeout,
            "store": self._source.store_url,
            "cache": self._source.cache,
            "channel": self._listener.address,
            "lease_until": self._heartbeat.valid_until(),
            "lease_slot": self.journal.lease_slot,
            "driver_pid": os.getpid(),
            "faults": {point: action for point, action in due.items() if action},
        }
        start = {"type": "start", "call": call.id, "step": call.step.name, "attempt": call.attempt}
        self._commits.note({**start, "attempt_id": call.attempt_id, "time": time.time(), **_needs(call)})
        attempt_id = call.attempt_id

        def done(outcome: str | None, error: BaseException | None) -> None:
            self._inbox.put(lambda: self._on_done(call, attempt_id, outcome, error))

        self._running[call.id] = self._placement.submit(call.id, call.options, json.dumps(payload), done)

    def _on_message(self, message: Record) -> None:
        call = self._calls.get(message.get("call", ""))
        if call is None or message.get("attempt_id") != call.attempt_id or call.id not in self._running:
            return
        kind = message["kind"]
        if kind == "started":
            call.started = time.monotonic()
            self._emit_call("started", call, node=message["node"], pid=message["pid"], attempt=call.attempt)
            if call.options.timeout is not None:
                self._later(call.options.timeout + TIMEOUT_GRACE_S, lambda: self._on_overdue(call, call.attempt_id))
        elif kind in ("progress", "log"):
            data = {key: value for key, value in message.items() if key not in ("kind", "call", "attempt_id")}
            self._emit_call(kind, call, **data)

    def _on_overdue(self, call: Call, attempt_id: str) -> None:
        """The reaper beside the worker should have killed it by now; the whole node may be stuck."""
        if call.attempt_id == attempt_id and call.id in self._running:
            self._placement.cancel(self._running[call.id])

    def _on_done(self, call: Call, attempt_id: str, text: str | None, error: BaseException | None) -> None:
        with self._changed:
            self._running.pop(call.id, None)
            self._changed.notify_all()
        if self._fatal is not None or call.ended:
            return
        if text is not None:
            outcome = json.loads(text)
            if "warning" in outcome:
                self._emit_call("warning", call, message=outcome["warning"])
            if outcome["ok"]:
                self._faults.reach("executor.before-commit")
                times = {name: outcome[name] for name in ("started", "seconds", "node")}
                extra = {"attempt": call.attempt, "attempt_id": attempt_id, "ended": time.time()}
                self._commit(call, outcome["result"], {**times, **extra})
            else:
                self._on_attempt_failed(call, outcome["error"])
        else:
            assert error is not None
            ran = None if call.started is None else time.monotonic() - call.started
            self._on_attempt_failed(call, of_ray_error(error, ran, call.options.timeout))
        self._pump()

    def _on_attempt_failed(self, call: Call, record: Record) -> None:
        if record["type"] == "FencedError":
            self.abort(fenced(self.journal.run_id))
            return
        system = record["kind"] == "system"
        if system:
            call.system_failures += 1
            final = call.system_failures > self._settings.system_retries
        else:
            call.user_failures += 1
            final = record["kind"] == "refused" or call.user_failures > call.options.retries
        note = {"type": "attempt-failed", "call": call.id, "step": call.step.name, "attempt": call.attempt}
        self._commits.note(
            {**note, "attempt_id": call.attempt_id, "error": record, "final": final, "time": time.time()}
        )
        if final:
            self._fail(call, rebuild(call.id, record))
            return
        failures = call.system_failures if system else call.user_failures
        pause = min(LONGEST_PAUSE_S, self._settings.backoff_s * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
        self._emit_call("retry", call, error=record["message"], error_type=record["type"], seconds=pause)
        self._later(pause, lambda: self._enqueue(call))

    # --- waits for people and events ---

    def _wait_outside(self, call: Call) -> None:
        inputs = inputs_digest(call.arguments)
        record = self.journal.state.waits.get(call.id)
        if record is None:
            record = {**wait_record(call.id, call.step.name, call.options, call.arguments, inputs), **_needs(call)}
            self._commits.note(record)
        check_question(record, inputs, call.arguments["args"][0])
        self._asked[call.id] = record
        what = command(self.run_id, call.id, call.step.name, self.journal.store.url)
        self._emit_call("waiting", call, message=record["message"], deadline=record["deadline"], command=what)
        self._poller.add(call.id, record["deadline"], final=call.options.may_fail)

    def _on_signal(self, call_id: str, signal: Record) -> None:
        call, record = self._calls[call_id], self._asked.pop(call_id)
        if call.ended or self._fatal is not None:
            return
        now = time.time()
        try:
            result = encode(answer(record, signal), f"{call_id}: the answer")
        except RecuaError as error:
            failed = {"type": "attempt-failed", "call": call_id, "step": call.step.name, "attempt": 0}
            self._commits.note({**failed, "attempt_id": "", "error": describe(error), "final": True, "time": now})
            self._fail(call, error)
            return
        times = {"started": record["time"], "ended": now, "seconds": now - record["time"], "node": "", "attempt": 0}
        self._commit(call, result, {**times, "by": signal["who"]})

    # --- ends of calls ---

    def _commit(self, call: Call, result: Any, extra: Record) -> None:
        record = {
            "type": "commit",
            "call": call.id,
            "step": call.step.name,
            "key": call.key,
            "code": call.code,
            "inputs": inputs_digest(call.arguments),
            "arguments": shown_arguments(call.arguments),
            "result": result,
            **_needs(call),
            **({} if call.of is None else {"of": call.of}),
            **extra,
        }
        self._commits.commit(record, lambda: self._inbox.put(lambda: self._on_committed(call, record)))

    def _on_committed(self, call: Call, record: Record) -> None:
        self._known.marks.end(call.id)
        kind = "reused" if "reused_from" in record else "committed"
        shown = {name: record[name] for name in ("seconds", "node", "attempt")}
        self._emit_call(kind, call, **shown, reused_from=record.get("reused_from"))
        if call.options.may_fail:
            self._path.succeeded(call.id)
        if call.options.reuse:
            self._index.add(self.journal.run_id, record)
        self._succeed(call, record["result"])

    def _after_write(self) -> None:
        self._faults.reach("executor.after-commit")

    def _succeed(self, call: Call, result: Any) -> None:
        call.result = result
        for dependent in self._end(call):
            self._on_input(dependent)

    def _on_input(self, call: Call) -> None:
        call.waiting -= 1
        if not call.waiting:  # through the inbox: a resumed chain may be longer than the stack
            self._inbox.put(functools.partial(self._on_inputs, call))

    def _fail(self, call: Call, error: BaseException) -> None:
        if call.ended:
            return
        call.error = error
        self._failed.append(call)
        traceback = getattr(error, "user_traceback", "")
        if not call.children:  # of a map its calls have told it
            self._emit_call("failed", call, error=str(error), error_type=type(error).__name__, traceback=traceback)
        for dependent in self._end(call):
            if dependent.children is not None:  # a map ends when all of its calls have
                self._on_input(dependent)
            else:
                self._inbox.put(functools.partial(self._fail, dependent, error))

    def _end(self, call: Call) -> list[Call]:
        with self._changed:
            call.ended = True
            self._open -= 1
            self._changed.notify_all()
        dependents, call.dependents = call.dependents, []
        return dependents

    def _on_cancel(self) -> None:
        self.abort(Cancelled(f"run {self.journal.run_id} was cancelled; run it again to go on"))

    def _cancel_all(self) -> None:
        self._ready.clear()
        if self._fatal is None:
            self._fatal = RecuaError("the run is ending")
        for reference in self._running.values():
            self._placement.cancel(reference)

    def _emit_call(self, kind: str, call: Call, **data: Any) -> None:
        self._emit(Event(kind, call.id, call.step.short_name, data))


class Cancelled(RecuaError):
    """Somebody asked this run to stop (`recua cancel`, Ctrl-C, SIGTERM). It can be run again."""


def _needs(call: Call) -> Record:
    """The calls whose results a call takes: the edges of the graph. Nothing where there are none."""
    return {"needs": list(call.needs)} if call.needs else {}


def failure_record(error: BaseException) -> Record:
    """What an `end` record says of the error that ended a run."""
    record = describe(error)
    if getattr(error, "user_traceback", ""):
        record["traceback"] = getattr(error, "user_traceback", "")
    return record
