"""The outcome of steps as ranks leave them in their beacons: in order, each once, also across recoveries."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.policies.rollback import judged_loss

log = logging.getLogger(__name__)

ROWS_LATE_S = 3.0
"""How long the outcomes of steps before the present generation are waited for."""


class StepRows:
    """Args:
    known: outcomes from earlier; that of the next step is wanted first. floor: the oldest generation that may tell
        of it. remembered: losses that are kept.
    """

    def __init__(self, known: Sequence[Mapping[str, Any]], floor: int, remembered: int) -> None:
        self.next, self.floor = len(known), floor
        """The step that is wanted next, and the oldest generation that may tell of it."""
        self.losses = [judged_loss(row) for row in known[-remembered:]]
        """Of the steps before `next`, oldest first; NaN if the update was not applied."""
        self.generation = -1
        """Which told of the last step."""
        self._remembered = remembered
        self._rate = 0.0
        self._late_since: float | None = None

    def take(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The row, complete, if it is the one that is wanted."""
        generation = row.pop("generation") if row["step"] == self.next else -1
        if generation < self.floor:
            return None
        self.next, self.generation = self.next + 1, generation
        self._rate = row.setdefault("tokens_per_s", self._rate)
        self.losses.append(judged_loss(row))
        del self.losses[: -self._remembered]
        return row

    def back_to(self, step: int, floor: int) -> None:
        """Steps from `step` on are undone; generation `floor` will tell of them again."""
        undone = self.next - step
        if undone > 0:
            del self.losses[-undone:]
        self.next, self.floor = step, floor

    def give_up_before(self, step: int, now: float) -> None:
        """Rows before `step`, where this generation began, that nobody has any more (a machine itself was lost)."""
        if self.next >= step:
            self._late_since = None
        elif self._late_since is None:
            self._late_since = now
        elif now - self._late_since > ROWS_LATE_S:
            log.warning("the outcomes of steps %d to %d are lost", self.next, step - 1)
            self.next = step
