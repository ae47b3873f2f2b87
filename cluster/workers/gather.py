"""Waiting for several actors at once."""

import time
from collections.abc import Sequence
from typing import Any

import ray

from cluster.workers.ray_errors import name_fault
from infra.errors import StepTimeout


def gather(references: Sequence[Any], what: str, timeout_s: float | None = None) -> list[Any]:
    """`ray.get` of all references; raises as soon as one fails, and calls number i "`what` i" in the error.

    Raises:
        NodeLost, Preempted, OutOfMemory: an actor died. RecuaError: an actor raised it. StepError: any other error of
            its code. StepTimeout: not all answered within `timeout_s`.
    """
    pending = list(references)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while pending:
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        done, pending = ray.wait(pending, num_returns=1, timeout=remaining)
        if not done:
            late = ", ".join(str(list(references).index(one)) for one in pending)
            raise StepTimeout(f"{what} {late} did not answer within {timeout_s:g} s")
        try:
            ray.get(done)
        except Exception as error:
            raise name_fault(error, f"{what} {list(references).index(done[0])}").error from error
    return ray.get(list(references))
