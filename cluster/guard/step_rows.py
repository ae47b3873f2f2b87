"""The outcomes of steps from the ranks' beacons: in order, each once, also across recoveries."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.policies.rollback import judged_loss

log = logging.getLogger(__name__)

ROWS_LATE_S = 3.0
"""Longest wait for the outcomes of steps before the present generation."""


class StepRows:
    """Args:
    known: earlier outcomes; the next step's is wanted first. floor: the oldest generation that may report it.
        remembered: the number of losses kept.
    """

    def __init__(self, known: Sequence[Mapping[str, Any]], floor: int, remembered: int) -> None:
        self.next, self.floor = len(known), floor
        """The step that is wanted next, and the oldest generation that may report it."""
        self.losses = [judged_loss(row) for row in known[-remembered:]]
        """The losses of the steps before `next`, oldest first; NaN if the update was not applied."""
        self.generation = -1
        """The generation that reported the last step."""
        self._remembered = remembered
        self._rate = 0.0
        self._late_since: float | None = None

    def take(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The complete row if it is the wanted one, else None."""
        generation = row.pop("generation") if row["step"] == self.next else -1
        if generation < self.floor:
            return None
        self.next, self.generation = self.next + 1, generation
        self._rate = row.setdefault("tokens_per_s", self._rate)
        self.losses.append(judged_loss(row))
        del self.losses[: -self._remembered]
        return row

    def back_to(self, step: int, floor: int) -> None:
        """Undo the steps from `step` on; generation `floor` will report them again."""
        undone = self.next - step
        if undone > 0:
            del self.losses[-undone:]
        self.next, self.floor = step, floor

    def give_up_before(self, step: int, now: float) -> None:
        """Stop waiting for rows before `step`, where this generation began, if they are lost (with a machine)."""
        if self.next >= step:
            self._late_since = None
        elif self._late_since is None:
            self._late_since = now
        elif now - self._late_since > ROWS_LATE_S:
            log.warning("the outcomes of steps %d to %d are lost", self.next, step - 1)
            self.next = step
