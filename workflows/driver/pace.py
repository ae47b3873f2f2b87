"""Which calls are short enough to share a Ray task (workflows.worker.batch)."""

import math

from workflows.graph.steps import StepOptions
from workflows.worker.batch import SLOW_S

SHORT_S = 0.01


TOGETHER_S = 0.03
"""Bodies are short that take less than SHORT_S in the mean; as many share a task as take TOGETHER_S."""


MOST = 64


ENOUGH_SEEN = 4


TASKS_PER_CPU = 3


class Pace:
    """How long the bodies of each step take in this run: a mean in which the newest count most."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float]] = {}

    def saw(self, step: str, seconds: float) -> None:
        seconds = min(seconds, SLOW_S)  # the first body of a process may have to import much
        number, mean = self._seen.get(step, (0, seconds))
        self._seen[step] = number + 1, mean + (seconds - mean) / 4

    def together(self, step: str) -> int:
        """How many calls of the step may share a task: 1 where it is not known to be short."""
        number, mean = self._seen.get(step, (0, math.inf))
        return min(MOST, int(TOGETHER_S / mean)) if number >= ENOUGH_SEEN and mean < SHORT_S else 1


def may_share(options: StepOptions) -> bool:
    """Whether such calls ask for nothing but CPUs. A timeout is a time for one body, by a clock of its own."""
    special = (options.timeout, options.gang, options.memory)
    return special == (None, None, None) and not options.num_gpus and options.num_cpus > 0
