"""A rank's own judgement of the losses: which steps may have to be undone, so that it keeps the state before them.

Every rank knows every loss, also from before its own start: the state holds them. So all ranks judge alike (see
`cluster.policies.rollback`). The controller decides whether training goes back; by the time that it does, ranks may
have taken more steps than they keep snapshots of.
"""

from collections.abc import Sequence

from cluster.config import ElasticSettings
from cluster.policies.rollback import doubt_of, sure_doubt
from engines.snapshots.milestones import Milestones


class LossDoubts:
    """Notes the first doubtful step in `milestones`, which decide what stays."""

    def __init__(self, milestones: Milestones, settings: ElasticSettings) -> None:
        self._milestones, self._settings = milestones, settings
        self._sent_to: int | None = None

    def begin(self, losses: Sequence[float], step: int) -> None:
        """A generation resumes from the state after `step` steps; `losses` of the last of these, oldest first."""
        if self._sent_to is None or step <= self._sent_to:  # training has gone back
            doubt = sure_doubt(losses, step - 1, self._settings)
            self._sent_to = None if doubt is None else doubt.first
        self.saw(losses, step)

    def saw(self, losses: Sequence[float], step: int) -> None:
        """Judge the losses after one more step."""
        doubt = doubt_of(losses, step - 1, self._settings)
        if self._sent_to is None and doubt is not None and doubt.sure:
            self._sent_to = doubt.first  # the order comes late: good steps may follow until then
        first = None if doubt is None else doubt.first
        self._milestones.doubtful = min((one for one in (self._sent_to, first) if one is not None), default=-1)
