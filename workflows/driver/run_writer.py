"""A driver's writes: the journal's slots, the heartbeat, the status, the index for later runs.

The loop's thread passes on the data and never waits. Each part has a writing thread of its own, which calls `abort` if
the store fails or another driver has taken over.
"""

from collections.abc import Callable

from workflows.driver.call import Call, RunContext
from workflows.driver.reuse import ReuseIndex, ReuseLookup
from workflows.graph.step_state import StepStates
from workflows.runs.journal import GroupCommit, Heartbeat
from workflows.runs.records import Commit, End, Record
from workflows.runs.status import StatusFile

GATHER_S = 0.005
"""How long the journal waits for more results while much is in flight: a slot costs two flushes of the disk however
much is in it."""
REMOTE_GATHER_S = 0.01


class RunWriter:
    """`crowded()`: whether so many attempts are in flight that waiting for a few milliseconds costs nothing.
    `abort(error)`, and `cancel()` after a cancel request in the store, are called on the writing threads."""

    def __init__(
        self,
        run: RunContext,
        lookup: ReuseLookup,
        crowded: Callable[[], bool],
        abort: Callable[[BaseException], None],
        cancel: Callable[[], None],
    ) -> None:
        journal = run.journal
        self._run = run
        self._crowded = crowded
        self._least_gather_s = REMOTE_GATHER_S if journal.store.local_path("runs") is None else 0.0
        self._states = StepStates(journal.store, journal.run_id, lookup.commits)
        self._index = ReuseIndex(journal.store, abort)
        self._commits = GroupCommit(journal, abort, self._gather_s, written=self._after_write)
        self._status = StatusFile(journal)
        self._heartbeat = Heartbeat(journal, cancel, abort, self._status.write, lookup.marks.acknowledge)

    def note(self, record: Record) -> None:
        """Write a record with the next slot, or alone after a while."""
        self._commits.note(record)

    def commit(self, record: Commit, then: Callable[[], None]) -> None:
        """Write a record as soon as possible, then call `then` on the journal's thread."""
        self._commits.commit(record, then)

    def committed(self, call: Call, record: Commit) -> None:
        """A call's commit record is on the disk: publish it for later runs, and remove the call's saved state."""
        if call.options.reuse:
            self._index.add(self._run.journal.run_id, record)
        if call.saved_state:
            self._states.committed(call.id)

    def valid_until(self) -> float:
        """The wall-clock time until which no other driver can have taken over."""
        return self._heartbeat.valid_until()

    def end(self, end: End | None) -> BaseException | None:
        """Write the rest, and `end` last; returns the error that kept it from being written. The heartbeat
        continues."""
        self._index.close()
        self._states.close()
        if end is not None:
            self._commits.note(end)
        self._commits.close()
        if end is not None:
            self._status.write()
        return self._commits.failure

    def close(self) -> None:
        """End the heartbeat."""
        self._heartbeat.close()

    def _gather_s(self) -> float:
        """How many seconds the journal's thread waits for more records."""
        return max(self._least_gather_s, GATHER_S if self._crowded() else 0.0)

    def _after_write(self) -> None:
        self._run.faults.reach("executor.after-commit")
