"""The loop's side of a run: turns calls into committed results.

Who waits for whom: one loop thread owns all state; all input reaches it through its inbox (a new call, an ended
attempt, a written commit, a timer). The workflow's thread (workflows.driver.runtime) puts calls there and waits in
`workflows.driver.ends`; Ray's threads and the channel put ended attempts and messages there; the journal's thread
writes slots and puts "written" there. The loop never waits. Only after "written" is a call done, and are its dependents
started.

A body may run more than once (a driver can die between a body's end and its commit). There is exactly one commit record
per call, no attempt of a committed call, and no dependent before its inputs are committed.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from infra.errors import FencedError, NonDeterminismError, RecuaError, UserError
from workflows.driver.attempts import AttemptEvents, Attempts
from workflows.driver.call import Call, RunContext
from workflows.driver.determinism import RecordedPath
from workflows.driver.ends import Ends
from workflows.driver.loop import Loop
from workflows.driver.reuse import Reusable, ReuseLookup
from workflows.driver.run_writer import RunWriter
from workflows.graph.inputs import IDENTITY
from workflows.graph.mapping import Fanout
from workflows.graph.steps import resolve_edges
from workflows.graph.values import encode
from workflows.graph.waits import Wait
from workflows.runs import records
from workflows.runs.records import Commit, End, Failed, Json
from workflows.runs.signals import Poller, answer, check_question, command, wait_record
from workflows.worker.failures import describe

CANCEL_DEADLINE_S = 10.0
LEAVING_PATIENCE_S = 5.0
REST_S = 0.002
"""How long the loop waits for more work while many attempts are in flight."""
LOOKUP_THREADS = 8


class Executor:
    """Executes the calls of one run. `check_path`, `stop` and `leave` are for the workflow's thread, `begin` and
    `abort` for any thread; everything else is for the loop's thread."""

    def __init__(self, run: RunContext, lookup: ReuseLookup, ends: Ends) -> None:
        journal = run.journal
        self._run = run
        self._lookup = lookup
        self._ends = ends
        self._path = RecordedPath(journal.state)
        self._loop = Loop(self.abort, lambda: REST_S if self._attempts.crowded() else 0.0)
        self._writer = RunWriter(run, lookup, lambda: self._attempts.crowded(), self.abort, self._on_cancel)
        told = AttemptEvents(self._writer.note, self._on_result, self._fail, self.abort, self._writer.valid_until)
        self._attempts = Attempts(run, self._loop, told)
        self._asked: dict[str, tuple[Call, records.Wait]] = {}
        self._poller = Poller(journal.store, journal.run_id, self._on_answer, self.abort)
        remote = journal.store.local_path("runs") is None
        self._lookups = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="recua-lookup") if remote else None
        journal.state.forget()
        self._loop.start()

    # --- the workflow's thread ---

    def begin(self, call: Call) -> None:
        """Execute a call as soon as its inputs are committed."""
        self._ends.opened(call)
        self._loop.post(self._on_call, call)

    def check_path(self) -> None:
        """At the workflow's end: all that was committed before was called again. Raises as `RecordedPath.check`."""
        self._loop.ask(self._path.check, self._run.warn)

    def stop(self, end: End | None) -> BaseException | None:
        """Start no more attempts, kill the running ones, and write `end`, before the rest is taken down: if the whole
        process group was told to stop, Ray is ending too, and its client may end this process at any moment.

        Returns the error that kept `end` from being written, if any.
        """
        if end is None or end.status != "finished":
            self._run.journal.store.hurry(LEAVING_PATIENCE_S)
        self.abort(RecuaError("the run is ending"))
        self._attempts.wait_until_none_runs(CANCEL_DEADLINE_S)
        self._poller.close()
        self._loop.close()
        if self._lookups is not None:
            self._lookups.shutdown(cancel_futures=True)
        return self._writer.end(end)

    def leave(self) -> None:
        """Release the lease, and disconnect from Ray."""
        self._writer.close()
        try:
            self._attempts.close()
        except Exception as error:  # Ray may be gone; the run's end is already recorded
            self._run.warn(f"leaving Ray failed: {error!r}")

    def abort(self, error: BaseException) -> None:
        """Stop the run with `error`, from any thread, unless something has stopped it before."""
        self._ends.abort(error)
        self._loop.post(self._end_attempts, isinstance(error, FencedError))

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
        if call.ended or self._ends.fatal is not None:
            return
        if call.fanout is not None:
            self._on_map(call, call.fanout)
            return
        if call.upstream:
            call.arguments = resolve(call.arguments, call.upstream)
            call.upstream = {}
        try:
            record = self._lookup.committed(call.id, call.step, call.options, call.arguments)
            self._path.made(call.id, record)
            if record is not None:
                self._lookup.forget(call.id)
                self._run.tell("resumed", call, seconds=record.seconds)
                self._succeed(call, record.result)
                return
            call.inputs, call.code, call.key = self._lookup.identify(call.step, call.options, call.arguments)
        except NonDeterminismError:
            raise
        except UserError as error:
            self._fail(call, error)
            return
        if not self._lookup.may_reuse(call.id, call.step, call.options):
            self._begin(call)
            return
        self._lookup.marks.begin(call.id)
        if self._lookups is None:
            self._on_looked_up(call, self._lookup.find(call.step, call.options, call.arguments, call.key))
        else:
            self._lookups.submit(self._look_up, call)

    def _on_map(self, call: Call, fanout: Fanout) -> None:
        """Make one call per item of a map's list. When all of them have ended: collect their results, and forget
        them."""
        if call.children is None:
            try:
                items = resolve(fanout.items, call.upstream) if fanout.waits_for else fanout.items
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
                self.begin(made)
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
            found = self._lookup.find(call.step, call.options, call.arguments, call.key)
        except BaseException as error:
            self.abort(error)
            return
        self._loop.post(self._on_looked_up, call, found)

    def _on_looked_up(self, call: Call, found: Reusable | None) -> None:
        if found is None:
            self._lookup.marks.end(call.id)
            self._attempts.enqueue(call)
            return
        now = time.time()
        self._commit(call, found.result, started=now, ended=now, seconds=found.seconds, reused_from=found.run)

    def _begin(self, call: Call) -> None:
        if isinstance(call.step, Wait):
            self._wait_outside(call)
        else:
            self._attempts.enqueue(call)

    # --- waits for people and events ---

    def _wait_outside(self, call: Call) -> None:
        record = self._run.journal.state.waits.get(call.id)
        if record is None:
            record = wait_record(call.id, call.step.name, call.needs, call.options, call.arguments, call.inputs)
            self._writer.note(record)
        check_question(record, self._lookup.same_inputs(record, call.arguments), call.arguments["args"][0])
        self._asked[call.id] = call, record
        journal = self._run.journal
        what = command(journal.run_id, call.id, call.step.name, journal.store.url)
        self._run.tell("waiting", call, message=record.message, deadline=record.deadline, command=what)
        self._poller.add(call.id, record.deadline, final=call.options.may_fail)

    def _on_answer(self, call_id: str, signal: Json) -> None:
        self._loop.post(self._on_signal, call_id, signal)

    def _on_signal(self, call_id: str, signal: Json) -> None:
        call, record = self._asked.pop(call_id)
        if self._ends.fatal is not None:
            return
        now = time.time()
        try:
            result = encode(answer(record, signal), f"{call_id}: the answer")
        except RecuaError as error:
            self._writer.note(Failed(call_id, call.step.name, error=describe(error), final=True, time=now))
            self._fail(call, error)
            return
        self._commit(call, result, started=record.time, ended=now, seconds=now - record.time, by=signal["who"])

    # --- ends of calls ---

    def _on_result(self, call: Call, outcome: Json) -> None:
        call.saved_state = "state" in outcome
        made = {name: outcome[name] for name in ("started", "seconds", "node")}
        attempt = {"attempt": call.attempt, "attempt_id": call.attempt_id}
        self._commit(call, outcome["result"], ended=time.time(), **made, **attempt)

    def _commit(self, call: Call, result: Any, **made: Any) -> None:
        """Commit a result. `made`: the fields of the record that describe its origin."""
        record = Commit(
            call.id,
            call.step.name,
            call.needs,
            key=call.key,
            code=call.code,
            libraries=self._lookup.libraries_of(call.code),
            inputs=call.inputs,
            identity=IDENTITY,
            arguments=self._lookup.shown_arguments(call.arguments),
            result=result,
            of=call.of,
            **made,
        )
        self._writer.commit(record, lambda: self._loop.post(self._on_committed, call, record))

    def _on_committed(self, call: Call, record: Commit) -> None:
        self._lookup.marks.end(call.id)
        shown = {name: getattr(record, name) for name in ("seconds", "node", "attempt", "reused_from")}
        self._run.tell(record.status, call, **shown)
        if call.options.may_fail:
            self._path.succeeded(call.id)
        self._writer.committed(call, record)
        self._succeed(call, record.result)
        self._attempts.settled(call)

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
        traceback = getattr(error, "user_traceback", "")
        if not call.children:  # a map's calls have reported themselves
            self._run.tell("failed", call, error=str(error), error_type=type(error).__name__, traceback=traceback)
        for dependent in self._end(call):
            if dependent.children is not None:  # a map ends when all of its calls have
                self._on_input(dependent)
            else:
                self._loop.post(self._fail, dependent, error)

    def _end(self, call: Call) -> list[Call]:
        """Drop the data that only a running call needs; returns the calls that wait for this one."""
        dependents, call.dependents = call.dependents, []
        call.arguments, call.upstream = None, {}
        self._ends.ended(call)
        return dependents

    def _on_cancel(self) -> None:
        self.abort(Cancelled(f"run {self._run.journal.run_id} was cancelled; run it again to resume"))

    def _end_attempts(self, fenced: bool) -> None:
        self._attempts.abandon() if fenced else self._attempts.cancel_all()


class Cancelled(RecuaError):
    """The run was asked to stop (`recua cancel`, Ctrl-C, SIGTERM). It can be resumed."""


def resolve(tree: Any, upstream: dict[str, Call]) -> Any:
    """An encoded tree with each edge replaced by the result of its call."""
    return resolve_edges(tree, lambda call_id: upstream[call_id].result)
