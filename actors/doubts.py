"""A rank's own judgement of the losses: which steps may have to be undone, so that the state before them stays.

Every rank knows every loss, and all judge alike (`cluster.policies.rollback`). Whether training goes back is up to the
controller; by the time that it says so, ranks have gone on for more steps than they keep snapshots of.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.config import ElasticSettings
from cluster.policies.rollback import doubt_of, judged_loss
from engines.snapshots.milestones import Milestones


class Doubts:
    """Of one generation.

    Args:
        milestones: of the snapshots that stay; the first doubtful step is noted there.
        told: the step after the last of `losses`, which the controller knows.
        step: where this generation goes on.
        sent_to: training goes back to this step soon.
    """

    def __init__(
        self,
        milestones: Milestones,
        settings: ElasticSettings,
        losses: Sequence[float],
        told: int,
        step: int,
        sent_to: int | None = None,
    ) -> None:
        self._milestones, self._settings = milestones, settings
        self._losses = list(losses[: max(0, len(losses) - max(0, told - step))])
        self._remembered = 4 * settings.spike_window
        self._next = min(told, step)
        self._sent_to = sent_to
        self._note()

    def saw(self, step: int, row: Mapping[str, Any]) -> None:
        """The outcome of step `step`."""
        if step >= self._next:
            self._losses.append(judged_loss(row))
            del self._losses[: -self._remembered]
            self._next = step + 1
            self._note()

    def _note(self) -> None:
        doubt = doubt_of(self._losses, self._next - 1, self._settings)
        if self._sent_to is None and doubt is not None and doubt.sure:
            self._sent_to = doubt.first  # the word comes late: good steps may follow until then
        first = None if doubt is None else doubt.first
        self._milestones.doubtful = min((step for step in (self._sent_to, first) if step is not None), default=-1)
