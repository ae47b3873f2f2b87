"""What a rank on its way into a generation lets others see: one that hangs can be told from those that it holds up."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class JoinSigns:
    """Called by `engines.elastic.learner.ElasticLearner.join`.

    stage: the next part begins. All ranks go through the same ones in the same order: "form" and "wait" (for the
        others), "build" and "load" (its own work).
    moved: a little further within that part, however many such parts there are on this rank: "build", "load", or
        "fetch": it waits for a place that is not this machine's memory, with deadlines of its own.
    """

    stage: Callable[[str], None] = lambda name: None
    moved: Callable[[str], None] = lambda name: None
