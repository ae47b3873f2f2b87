"""Judges the outcomes of a group's steps: which are in doubt, whether to roll back, and what must wait.

Nothing here knows Ray or acts: the controller passes outcomes on, and carries out the verdicts.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from cluster.config import ElasticSettings
from cluster.core.history import GroupJournal
from cluster.core.state_machine import StateMachine
from cluster.guard.step_rows import StepRows
from cluster.policies.rollback import Rollback, SavedState, doubt_of, judge_step, sure_doubt


@dataclass(frozen=True)
class Due:
    """A rollback after step `step` that waits until ranks run, to a state no later than `first`.

    Without a `verdict`, the `losses` up to that step are judged when it is due.
    """

    step: int
    first: int
    losses: Sequence[float] = ()
    verdict: Rollback | None = None
    guilty: tuple[str, ...] = ()


class LossJudge:
    """The judge of one group.

    Args:
        rows: the known outcomes of steps; an earlier controller's last ones are judged again.
        stored: (generation, step) of the snapshots that are whole in storage.
    """

    def __init__(
        self,
        settings: ElasticSettings,
        core: StateMachine,
        journal: GroupJournal,
        rows: StepRows,
        stored: Callable[[], Collection[tuple[int, int]]],
    ) -> None:
        self._settings, self._core, self._journal = settings, core, journal
        self._rows, self._stored = rows, stored
        self.due: Due | None = None
        """A rollback that waits until ranks run."""
        self._look_back()
        self.doubt()

    def doubt(self) -> None:
        """Tell the core which steps may have to be undone, given the outcomes so far."""
        following = self._rows.next
        doubt = doubt_of(self._rows.losses, following - 1, self._settings)
        first = following if doubt is None else doubt.first
        self._core.book.doubtful = first if self.due is None else min(first, self.due.first)

    def verdict(self, step: int, losses: Sequence[float] | None = None) -> Rollback:
        """The verdict on the losses up to `step`: the known ones, or those given."""
        history = self._journal.history
        losses = self._rows.losses if losses is None else losses
        return judge_step(losses, step, self.saved(), history.skipped, history.rollbacks, self._settings)

    def saved(self) -> list[SavedState]:
        """The states that training can go back to."""
        core, rows = self._core, self._rows
        book, generation = core.book, core.generation
        whole = {step for step, snapshot in book.snapshots.items() if snapshot.whole}
        steps = {0} | whole | (book.flushed & {step for _, step in self._stored()})
        if rows.generation == generation and generation in core.joins:
            before = int(book.doubtful) - int(book.doubtful) % self._settings.snapshot_every
            if core.joins[generation] <= before < rows.next:
                steps.add(before)  # once a step has an outcome, all copies of the state before it exist
        verified = self._journal.history.verified
        return [SavedState(step, step <= verified) for step in sorted(steps)]

    def put_off(self, step: int, verdict: Rollback, guilty: Sequence[str]) -> None:
        """Ranks re-form: make the rollback due when they run. Of several the first one counts."""
        if self.due is None and verdict.to_step is not None:
            self.due = Due(step, verdict.to_step, verdict=verdict, guilty=tuple(guilty))

    def take(self, due: Due) -> tuple[int, Rollback, tuple[str, ...]]:
        """(step, verdict, guilty) of the rollback that waited, to a state that still exists."""
        self.due = None
        verdict = due.verdict or self.verdict(due.step, due.losses)
        there = max((state.step for state in self.saved() if state.step <= due.first), default=0)
        return due.step, replace(verdict, to_step=there), due.guilty

    def _look_back(self) -> None:
        """Make a rollback due that an earlier controller did not carry out."""
        losses, last = self._rows.losses, self._rows.next - 1
        doubt = sure_doubt(losses, last, self._settings)
        if doubt is not None:
            self.due = Due(doubt.last, doubt.first, losses[: len(losses) - (last - doubt.last)])
