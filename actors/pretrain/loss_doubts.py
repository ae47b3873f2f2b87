"""A rank's own judgement of the losses: which steps may have to be undone, so that the state before them stays.

Every rank knows every loss, also those from before it came: they are kept with the state. So all judge alike (see
`cluster.policies.rollback`). Whether training goes back is up to the controller; by the time that it says so, ranks
have lasted for more steps than they keep snapshots of.
"""

from collections.abc import Sequence

from cluster.config import ElasticSettings
from cluster.policies.rollback import doubt_of, sure_doubt
from engines.snapshots.milestones import Milestones


class LossDoubts:
    """The first doubtful step is noted in `milestones`, which say what stays."""

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
        """One more step was taken."""
        doubt = doubt_of(losses, step - 1, self._settings)
        if self._sent_to is None and doubt is not None and doubt.sure:
            self._sent_to = doubt.first  # the word comes late: good steps may follow until then
        first = None if doubt is None else doubt.first
        self._milestones.doubtful = min((one for one in (self._sent_to, first) if one is not None), default=-1)
