"""Which calls are short enough to share a Ray task (workflows.worker.batch)."""

import math

from workflows.graph.steps import StepOptions
from workflows.worker.batch import SLOW_S

SHORT_S = 0.01


TOGETHER_S = 0.03
"""Bodies with a mean below SHORT_S are short; as many as fit into TOGETHER_S share a task."""


MOST = 64


ENOUGH_SEEN = 4


TASKS_PER_CPU = 3


class Pace:
    """The mean time of each step's bodies in this run; newer bodies weigh more."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float]] = {}

    def saw(self, step: str, seconds: float) -> None:
        seconds = min(seconds, SLOW_S)  # the first body of a process may import many modules
        number, mean = self._seen.get(step, (0, seconds))
        self._seen[step] = number + 1, mean + (seconds - mean) / 4

    def together(self, step: str) -> int:
        """The number of calls of the step that may share a task: 1 unless it is known to be short."""
        number, mean = self._seen.get(step, (0, math.inf))
        return min(MOST, int(TOGETHER_S / mean)) if number >= ENOUGH_SEEN and mean < SHORT_S else 1


def may_share(options: StepOptions) -> bool:
    """Whether such calls request only CPUs. A call with a timeout needs a task of its own, with its own clock."""
    special = (options.timeout, options.gang, options.memory)
    return special == (None, None, None) and not options.num_gpus and options.num_cpus > 0
