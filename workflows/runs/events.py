"""The events of a run, for its observers: the terminal display, logs, tests."""

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """One event. `call_id` and `step` are empty if it concerns the whole run.

    kind            data
    run-started     run_id, workflow, store, resumed (calls committed by earlier drivers)
    started         node, pid, attempt
    progress        done, total, metrics {name: float}
    log             message
    committed       seconds, node, attempt
    reused          seconds (of the original execution), reused_from (run id)
    resumed         seconds (of the original execution)
    waiting         message, deadline (seconds since the epoch or None), command (that answers it): the call waits for a
                    person or an event
    pending         message: an attempt waits for resources that others hold
    retry           error, error_type, seconds (until the next attempt)
    failed          error, error_type, traceback
    warning         message
    run-ended       status, seconds
    """

    kind: str
    call_id: str = ""
    step: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)
