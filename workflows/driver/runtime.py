"""The workflow's side of a run: calls of steps, and waiting for their results.

The workflow function runs here, on the thread that drives the run. Calls are passed to the loop's thread
(workflows.driver.executor), which alone changes them until they have ended; workflows.driver.ends returns them.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from workflows.driver.call import Call, RunContext
from workflows.driver.ends import Ends
from workflows.driver.executor import Executor, resolve
from workflows.driver.reuse import ReuseLookup
from workflows.graph.artifacts import ArtifactSource
from workflows.graph.mapping import edges_in, fan_out
from workflows.graph.steps import Step, StepOptions, edges_of
from workflows.graph.values import decode, encode
from workflows.runs.records import End


class WorkflowRuntime:
    """The `graph.Runtime` of a driven run. An ended call keeps its result only while there is a Future of it, or a call
    that takes the result and has not begun."""

    def __init__(self, run: RunContext, lookup: ReuseLookup) -> None:
        self._run = run
        self._source = ArtifactSource(run.journal.store.url, run.settings.cache)
        self._calls: WeakValueDictionary[str, Call] = WeakValueDictionary()
        self._hooks: list[Callable[[], None]] = []
        self._ends = Ends()
        self._executor = Executor(run, lookup, self._ends)

    @property
    def run_id(self) -> str:
        return self._run.journal.run_id

    @property
    def fatal(self) -> BaseException | None:
        """The error that ends the run, if there is one: a failed store, another driver, a cancel."""
        return self._ends.fatal

    def call(self, call_id: str, step: Step[..., Any], options: StepOptions, arguments: dict[str, Any]) -> Call:
        self._run.faults.reach("executor.between-steps")
        self._ends.raise_fatal()
        needs: list[str] = []
        tree = encode(arguments, f"{call_id}: argument", edges_of(self, needs))
        upstream = self._upstream(needs)
        return self._begin(Call(call_id, step, options, tree, tuple(upstream), upstream))

    def map(self, call_id: str, step: Step[..., Any], options: StepOptions, items: Any, arguments: Any) -> Call:
        self._ends.raise_fatal()
        fanout = fan_out(self, call_id, items, arguments)
        upstream = self._upstream([*fanout.waits_for, *fanout.shared, *edges_in(fanout.items)])
        return self._begin(Call(call_id, step, options, None, fanout.waits_for, upstream, fanout))

    def result(self, call_id: str) -> Any:
        call = self._calls[call_id]
        self._ends.wait_for(call)
        if call.error is not None:
            call.seen = True
            raise call.error
        return decode(call.result, self._source)

    def done(self, call_id: str) -> bool:
        return self._calls[call_id].ended

    def on_end(self, hook: Callable[[], None]) -> None:
        self._hooks.append(hook)

    def finish(self, value: Any) -> Any:
        """Wait for every call, then return the workflow's own result, encoded. Raises the first unhandled failure."""
        self._ends.wait_for_all()
        self._executor.check_path()
        needs: list[str] = []
        tree = encode(value, "the workflow's result", edges_of(self, needs))
        return resolve(tree, self._upstream(needs))

    def close(self, end: End | None) -> None:
        """Cancel running calls, write `end` (None: the run belongs to another driver), call the hooks, leave Ray.

        Hooks remove the run's processes from the cluster. They are skipped if the end is not recorded: then another
        driver has the run, or will have it.

        Raises:
            StoreError, FencedError: the run is finished, but its `end` could not be written; the next start writes it.
                After any other end, an earlier error is raised instead.
        """
        try:
            failure = self._executor.stop(end)
            if end is not None and failure is None:
                self._call_hooks()
        finally:  # always: a live lease, or a Ray that keeps running, would delay the next driver
            self._executor.leave()
        if failure is not None and end is not None and end.status == "finished":
            raise failure

    def is_lost(self) -> bool:
        """Whether another driver has taken over; False if the store cannot say."""
        return self._run.journal.is_lost()

    def _begin(self, call: Call) -> Call:
        self._calls[call.id] = call
        self._executor.begin(call)
        return call

    def _upstream(self, needs: list[str]) -> dict[str, Call]:
        return {need: self._calls[need] for need in needs}

    def _call_hooks(self) -> None:
        for hook in reversed(self._hooks):
            try:
                hook()
            except Exception as error:
                self._run.warn(f"a hook at the end of the run failed: {error!r}")
