"""The driver: turns a workflow's calls into committed results.

Who waits for whom. The main thread runs the workflow function and waits in `result()`. One loop thread owns all state:
everything reaches it through its inbox (a new call, an ended attempt, a written commit, a timer). Ray's threads and
the channel put ended attempts and messages there; the journal's thread writes slots and puts "written" there. The loop
waits for nobody; only after "written" is a call done and are its dependents started.

A body may run more than once (a driver can die between a body's end and its commit); what holds is one commit record
per call, no attempt of a committed call, and no dependent before its inputs are committed.

Memory: a call that has ended keeps its result, and that only as long as a Future of it or a call that takes it is left.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from infra.errors import NonDeterminismError, RecuaError, UserError
from infra.faults import FaultSchedule
from workflows.artifacts import ArtifactSource
from workflows.attempts import Attempts, Call, ClusterCheck, call_record
from workflows.config import RunSettings
from workflows.events import Event
from workflows.fanout import Fanout, edges_in, fan_out
from workflows.graph import Step, StepOptions, edges_of, resolve_edges
from workflows.identities import IDENTITY
from workflows.journal import GroupCommit, Heartbeat, Journal
from workflows.known import Known, ReuseIndex
from workflows.loop import Loop
from workflows.outcome import describe
from workflows.saved import SavedStates
from workflows.status import StatusFile
from workflows.taken import PathTaken
from workflows.values import decode, encode
from workflows.waits import Poller, Wait, answer, check_question, command, wait_record

Record = dict[str, Any]
CANCEL_DEADLINE_S = 10.0
LEAVING_PATIENCE_S = 5.0
REST_S = 0.002
GATHER_S = 0.005
"""How long the journal waits for more results while much is in flight, and the loop for more work: a slot costs two
flushes of the disk however much is in it."""
REMOTE_GATHER_S = 0.01


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
        self._faults = faults
        self._emit = emit
        self._source = ArtifactSource(journal.store.url, settings.cache)
        self._path = PathTaken(journal.state)
        self._asked: dict[str, Record] = {}
        self._poller = Poller(journal.store, journal.run_id, self._on_answer, self.abort)
        self._calls: WeakValueDictionary[str, Call] = WeakValueDictionary()
        self._open: dict[str, Call] = {}
        self._failed: list[Call] = []
        self._fatal: BaseException | None = None
        self._hooks: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        remote = journal.store.local_path("runs") is None
        self._lookups = ThreadPoolExecutor(8, thread_name_prefix="recua-lookup") if remote else None
        self._states = SavedStates(journal.store, journal.run_id, known.commits)
        self._with_state: set[str] = set()
        self._index = ReuseIndex(journal.store, self.abort)
        self._loop = Loop(self.abort, lambda: REST_S if self._attempts.crowded() else 0.0)
        self._gather_s = REMOTE_GATHER_S if remote else 0.0
        self._commits = GroupCommit(journal, self.abort, self._gather, written=self._after_write)
        self._status = StatusFile(journal)
        self._heartbeat = Heartbeat(journal, self._on_cancel, self.abort, self._status.write, known.marks.acknowledge)
        self._attempts = Attempts(
            journal,
            settings,
            faults,
            self._heartbeat,
            self._loop,
            self._commits.note,
            emit,
            self._on_result,
            self._fail,
            self.abort,
        )
        journal.state.forget()
        self._loop.start()

    # --- the workflow's side (main thread) ---

    def call(self, call_id: str, step: Step[..., Any], options: StepOptions, arguments: dict[str, Any]) -> Call:
        self._faults.reach("executor.between-steps")
        self._raise_fatal()
        needs: list[str] = []
        tree = encode(arguments, f"{call_id}: argument", edges_of(self, needs))
        upstream = {need: self._calls[need] for need in needs}
        return self._add(Call(call_id, step, options, tree, tuple(upstream), upstream))

    def map(self, call_id: str, step: Step[..., Any], options: StepOptions, items: Any, arguments: Any) -> Call:
        self._raise_fatal()
        fanout = fan_out(self, call_id, items, arguments)
        needs = [*fanout.waits_for, *fanout.shared, *edges_in(fanout.items)]
        upstream = {need: self._calls[need] for need in needs}
        return self._add(Call(call_id, step, options, None, fanout.waits_for, upstream, fanout))

    def _add(self, call: Call) -> Call:
        with self._changed:
            self._calls[call.id] = call
            self._open[call.id] = call
        self._loop.post(self._on_call, call)
        return call

    def result(self, call_id: str) -> Any:
        call = self._calls[call_id]
        call.awaited += 1
        try:
            self._wait(lambda: call.ended)
        finally:
            call.awaited -= 1
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
        self._attempts.on_cluster(check)

    def finish(self, value: Any) -> Any:
        """Wait for every call, then return the workflow's own result, encoded. Raises the first unhandled failure."""
        self._wait(lambda: not self._open)
        self._raise_fatal()
        self._raise_unseen_failure()
        self._path.check(lambda text: self._emit(Event("warning", data={"message": text})))
        needs: list[str] = []
        tree = encode(value, "the workflow's result", edges_of(self, needs))
        return _resolve(tree, {need: self._calls[need] for need in needs})

    def close(self, end: Record | None) -> None:
        """Cancel what still runs, write `end` (unless the run is no longer ours), call the hooks, leave Ray.

        Hooks take down what the run has on the cluster. Where its end is not on record they are left out: it is
        another driver's by now, or will be.

        Raises:
            StoreError, FencedError: the run is finished but for its `end`, which could not be written: running again
                goes on from there. Of any other end there is an error to tell already.
        """
        finished = end is not None and end["status"] == "finished"
        if not finished:
            self.journal.store.hurry(LEAVING_PATIENCE_S)
        self._loop.post(self._cancel_all)
        self._attempts.wait_until_none_runs(CANCEL_DEADLINE_S)
        self._poller.close()
        self._loop.close()
        if self._lookups is not None:
            self._lookups.shutdown(cancel_futures=True)
        self._index.close()
        self._states.close()
        # The end is on record before anything else is taken down: where a whole process group was told to stop, Ray is
        # going too, and its client may end this process in the middle of a hook.
        if end is not None:
            self._commits.note(end)
        self._commits.close()
        if end is not None:
            self._status.write()
        for hook in reversed(self._hooks if end is not None and self._commits.failure is None else []):
            try:
                hook()
            except Exception as error:
                self._emit(Event("warning", data={"message": f"a hook at the end of the run failed: {error!r}"}))
        self._heartbeat.close()
        try:
            self._attempts.close()
        except Exception as error:  # Ray may be gone already; what the run came to is on record
            self._emit(Event("warning", data={"message": f"leaving Ray failed: {error!r}"}))
        if finished and self._commits.failure is not None:
            raise self._commits.failure

    def abort(self, error: BaseException) -> None:
        """Stop the run with `error`, from any thread: every waiting `result()` raises it."""
        with self._changed:
            if self._fatal is None:
                self._fatal = error
            self._changed.notify_all()
        self._loop.post(self._cancel_all)

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
            if not call.seen:
                assert call.error is not None
                call.seen = True
                raise call.error

    # --- the loop ---

    def _on_call(self, call: Call) -> None:
        for need in call.needs:
            upstream = call.upstream[need]
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
        if call.upstream:
            call.arguments = _resolve(call.arguments, call.upstream)
            call.upstream = {}
        try:
            record = self._known.committed(call.id, call.step, call.options, call.arguments)
            self._path.made(call.id, record)
            if record is not None:
                self._known.forget(call.id)
                self._tell("resumed", call, seconds=record["seconds"])
                self._succeed(call, record["result"])
                return
            call.inputs, call.code, call.key = self._known.identify(call.step, call.options, call.arguments)
        except NonDeterminismError:
            raise
        except UserError as error:
            self._fail(call, error)
            return
        if not self._known.may_reuse(call.id, call.step, call.options):
            self._begin(call)
            return
        self._known.marks.begin(call.id)
        if self._lookups is None:
            self._on_looked_up(call, self._known.find(call.step, call.options, call.arguments, call.key))
        else:
            self._lookups.submit(self._look_up, call)

    def _on_map(self, call: Call, fanout: Fanout) -> None:
        """Its list is there: one call per item. Later all of them have ended: their results, and they are forgotten."""
        if call.children is None:
            try:
                items = _resolve(fanout.items, call.upstream) if fanout.waits_for else fanout.items
                children = fanout.children(call.id, call.step.short_name, items)
            except UserError as error:
                self._fail(call, error)
                return
            self._path.check_map(call.id, len(children))
            call.children = []
            for child in children:
                upstream = {need: call.upstream[need] for need in child.needs}
                made = Call(child.call_id, call.step, call.options, child.arguments, child.needs, upstream)
                made.of = len(children)
                made.dependents.append(call)
                call.children.append(made)
            call.fanout, call.waiting, call.upstream = replace(fanout, items=None), len(children), {}
            for made in call.children:
                self._add(made)
        if call.waiting:
            return
        failed = next((child.error for child in call.children if child.error is not None), None)
        if failed is not None:
            self._fail(call, failed)
        else:
            self._succeed(call, [child.result for child in call.children])
        call.children = []

    def _look_up(self, call: Call) -> None:
        try:
            record = self._known.find(call.step, call.options, call.arguments, call.key)
        except BaseException as error:
            self.abort(error)
            return
        self._loop.post(self._on_looked_up, call, record)

    def _on_looked_up(self, call: Call, record: Record | None) -> None:
        if record is None:
            self._known.marks.end(call.id)
            self._attempts.enqueue(call)
            return
        now = time.time()
        times = {"started": now, "ended": now, "seconds": record["seconds"], "node": "", "attempt": 0}
        self._commit(call, record["result"], {**times, "reused_from": record["run"]})

    def _begin(self, call: Call) -> None:
        if isinstance(call.step, Wait):
            self._wait_outside(call)
        else:
            self._attempts.enqueue(call)

    # --- waits for people and events ---

    def _wait_outside(self, call: Call) -> None:
        record = self.journal.state.waits.get(call.id)
        if record is None:
            asked = wait_record(call.id, call.step.name, call.options, call.arguments, call.inputs)
            record = {**asked, **call_record("wait", call)}
            self._commits.note(record)
        check_question(record, self._known.same_inputs(record, call.arguments), call.arguments["args"][0])
        self._asked[call.id] = record
        what = command(self.run_id, call.id, call.step.name, self.journal.store.url)
        self._tell("waiting", call, message=record["message"], deadline=record["deadline"], command=what)
        self._poller.add(call.id, record["deadline"], final=call.options.may_fail)

    def _on_answer(self, call_id: str, signal: Record) -> None:
        self._loop.post(self._on_signal, call_id, signal)

    def _on_signal(self, call_id: str, signal: Record) -> None:
        call, record = self._open.get(call_id), self._asked.pop(call_id)
        if call is None or self._fatal is not None:
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

    def _on_result(self, call: Call, outcome: Record) -> None:
        if "state" in outcome:
            self._with_state.add(call.id)
        times = {name: outcome[name] for name in ("started", "seconds", "node")}
        extra = {"attempt": call.attempt, "attempt_id": call.attempt_id, "ended": time.time()}
        self._commit(call, outcome["result"], {**times, **extra})

    def _commit(self, call: Call, result: Any, extra: Record) -> None:
        record = {
            **call_record("commit", call),
            "key": call.key,
            "code": call.code,
            "libraries": self._known.libraries_of(call.code),
            "inputs": call.inputs,
            "identity": IDENTITY,
            "arguments": self._known.shown_arguments(call.arguments),
            "result": result,
            **({} if call.of is None else {"of": call.of}),
            **extra,
        }
        self._commits.commit(record, lambda: self._loop.post(self._on_committed, call, record))

    def _on_committed(self, call: Call, record: Record) -> None:
        self._known.marks.end(call.id)
        kind = "reused" if "reused_from" in record else "committed"
        shown = {name: record[name] for name in ("seconds", "node", "attempt")}
        self._tell(kind, call, **shown, reused_from=record.get("reused_from"))
        if call.options.may_fail:
            self._path.succeeded(call.id)
        if call.options.reuse:
            self._index.add(self.journal.run_id, record)
        if call.id in self._with_state:
            self._with_state.remove(call.id)
            self._states.committed(call.id)
        self._succeed(call, record["result"])
        self._attempts.settled(call)

    def _gather(self) -> float:
        """How long the journal's thread waits for more to write, in seconds."""
        return max(self._gather_s, GATHER_S if self._attempts.crowded() else 0.0)

    def _after_write(self) -> None:
        self._faults.reach("executor.after-commit")

    def _succeed(self, call: Call, result: Any) -> None:
        call.result = result
        for dependent in self._end(call):
            self._on_input(dependent)

    def _on_input(self, call: Call) -> None:
        call.waiting -= 1
        if not call.waiting:  # through the inbox: a resumed chain may be longer than the stack
            self._loop.post(self._on_inputs, call)

    def _fail(self, call: Call, error: BaseException) -> None:
        if call.ended:
            return
        call.error = error
        if not call.options.may_fail:
            self._failed.append(call)
        traceback = getattr(error, "user_traceback", "")
        if not call.children:  # of a map its calls have told it
            self._tell("failed", call, error=str(error), error_type=type(error).__name__, traceback=traceback)
        for dependent in self._end(call):
            if dependent.children is not None:  # a map ends when all of its calls have
                self._on_input(dependent)
            else:
                self._loop.post(self._fail, dependent, error)

    def _end(self, call: Call) -> list[Call]:
        """Let go of what only a running call needs; who waits for this one is returned."""
        dependents, call.dependents = call.dependents, []
        call.arguments, call.upstream = None, {}
        with self._changed:
            call.ended = True
            self._open.pop(call.id, None)
            if call.awaited or call.error is not None or not self._open:
                self._changed.notify_all()
        return dependents

    def _on_cancel(self) -> None:
        self.abort(Cancelled(f"run {self.journal.run_id} was cancelled; run it again to go on"))

    def _cancel_all(self) -> None:
        if self._fatal is None:
            self._fatal = RecuaError("the run is ending")
        self._attempts.cancel_all()

    def _tell(self, kind: str, call: Call, **data: Any) -> None:
        self._emit(Event(kind, call.id, call.step.short_name, data))


class Cancelled(RecuaError):
    """Somebody asked this run to stop (`recua cancel`, Ctrl-C, SIGTERM). It can be run again."""


def _resolve(tree: Any, upstream: dict[str, Call]) -> Any:
    return resolve_edges(tree, lambda call_id: upstream[call_id].result)


def failure_record(error: BaseException) -> Record:
    """What an `end` record says of the error that ended a run."""
    record = describe(error)
    if getattr(error, "user_traceback", ""):
        record["traceback"] = getattr(error, "user_traceback", "")
    return record
