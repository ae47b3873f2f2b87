"""The path that a run took before: a resumed workflow that takes another path is stopped, with both paths named.

A call whose id now has another step or other inputs is found at its lookup (workflows.driver.reuse). This module finds
changes over several calls: a map over a list of another length, and a branch that is no longer taken.
"""

from collections.abc import Callable
from itertools import islice

from infra.errors import NonDeterminismError
from workflows.runs.fold import JournalState
from workflows.runs.records import Commit

NAMED = 3


class RecordedPath:
    """The calls that earlier drivers committed. Memory: one reference per committed call that was not yet made
    again."""

    def __init__(self, state: JournalState) -> None:
        self._missing = dict.fromkeys(state.commits)
        self._lengths = {
            record.call.rpartition("/")[0]: record.of for record in state.commits.values() if record.of is not None
        }
        self._failed = {call for call, failures in state.failures.items() if failures[-1].final}
        self._begun = {call for call in state.starts if call not in state.commits}
        self._resumed = bool(state.commits)
        self._new: list[str] = []
        self._excused = ""

    def made(self, call_id: str, record: Commit | None) -> None:
        """The workflow made this call again, which has this commit record."""
        if record is not None:
            self._missing.pop(call_id, None)
        elif self._resumed and call_id not in self._begun and len(self._new) < NAMED:
            self._new.append(call_id)

    def succeeded(self, call_id: str) -> None:
        """A call whose failure the workflow handles itself was committed now. If it had failed before, the workflow may
        take another branch."""
        if call_id in self._failed:
            self._excused = call_id

    def check_map(self, map_id: str, length: int) -> None:
        """Raises NonDeterminismError, with both lengths, if a resumed map has a list of another length."""
        before = self._lengths.get(map_id, length)
        if before != length:
            raise NonDeterminismError(
                f"{map_id} had a list of {before} items when its calls were committed, and has one of {length} now: "
                "the workflow took another path; start another run with --new"
            )

    def check(self, warn: Callable[[str], None]) -> None:
        """Check at the workflow's end that every committed call was made again.

        Raises:
            NonDeterminismError: the message names calls of the old path and of the new one.
        """
        if not self._missing:
            return
        old = _some(self._missing)
        if self._excused:
            warn(f"{self._excused} had failed before and succeeded now; {old} of then is no part of this run's result")
            return
        new = f"and made {_some(self._new)} instead" if self._new else "and nothing instead"
        raise NonDeterminismError(
            f"this run had committed {old} before; now the workflow never called it {new}: it took another path; "
            "start another run with --new (or --rerun STEP, which reuses what still fits)"
        )


def _some(calls: dict[str, None] | list[str]) -> str:
    named = ", ".join(islice(calls, NAMED))
    return named if len(calls) <= NAMED else f"{named} and {len(calls) - NAMED} more"
