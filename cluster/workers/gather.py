"""Waiting for several actors at once."""

from collections.abc import Sequence
from typing import Any

import ray

from cluster.workers.ray_errors import name_fault


def gather(references: Sequence[Any], what: str) -> list[Any]:
    """`ray.get` of all that raises as soon as the first of them fails; number i is called "`what` i" in the error.

    Raises:
        NodeLost, Preempted, OutOfMemory: an actor died. RecuaError: its own. StepError: any other error of its code.
    """
    pending = list(references)
    while pending:
        done, pending = ray.wait(pending, num_returns=1)
        try:
            ray.get(done)
        except Exception as error:
            raise name_fault(error, f"{what} {list(references).index(done[0])}").error from error
    return ray.get(list(references))
