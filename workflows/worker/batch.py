"""Batches: several short calls in one Ray task.

A Ray task costs the driver more than all other work for a call. If many short calls are ready, they share tasks, but
nothing else: each has its own start record, attempt id, log, lease check, outcome and commit.

First attempts of one step with the same options share tasks, if the step's bodies took a few milliseconds so far in
this run, and only as many as leave several tasks to every CPU. A call that was handed back or lost with its worker, and
every retry, has a task of its own.

Who waits for whom: a task's calls run one after another. None waits for a body that turns out to be slow: a watchdog
then tells the driver which calls have ended, and hands back those that have not begun. Both are sent through the
channel at once, and again in the task's result, so that nothing is lost with the channel. Task and watchdog take calls
from one queue, so that each call is either begun or handed back.
"""

import contextlib
import functools
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from workflows.worker.attempt import may_run_more, run_attempt, tell_driver
from workflows.worker.watchdog import Watchdog

SLOW_S = 0.1
LONGEST_S = 0.25
"""A body that takes longer than SLOW_S is the last of its task, and no body begins after LONGEST_S of a task."""
BYTES = 64 << 10
"""Approximate sizes of a task's input and result; a message of the channel must hold one outcome."""
ENDED, HANDED_BACK = "ended", "handed-back"
"""Messages of the channel: {"kind", "batch", "call", "attempt_id"}, with the "outcome" if the body has ended."""

Record = dict[str, Any]


def bootstrap(roots: list[str], run: str) -> Callable[[bytes], bytes]:
    """The function that Ray ships, once per run; nested, so that Ray pickles it by value and it can first make our
    modules importable. `run`: the data that all attempts of the run share."""

    def recua_step(batch: bytes) -> bytes:
        import os
        import sys

        for root in roots:
            if root not in sys.path and os.path.isdir(root):
                sys.path.append(root)
        from workflows.worker.batch import run_batch

        return run_batch(run, batch)

    return recua_step


def run_batch(run: str, batch: bytes) -> bytes:
    """The Ray task: run attempts one after another. `run`: the data that all attempts of a run share; `batch`:
    {"batch": its number, "calls": [each call's own part]}; both JSON.

    Returns a JSON list of their outcomes, null for each call that is handed back.
    """
    given = json.loads(batch)
    task = _Task(run, given["batch"], given["calls"])
    if len(task.calls) == 1:
        return f"[{run_attempt(run, task.calls[0])}]".encode()
    watchdog, deadline, room = _watchdog(), time.monotonic() + LONGEST_S, BYTES
    try:
        for number in _taken(task.waiting):
            watchdog.set(functools.partial(task.tell))
            outcome = task.outcomes[number] = run_attempt(run, task.calls[number])
            task.untold.append(number)
            room -= len(outcome)
            if room < 0 or time.monotonic() > deadline or not may_run_more():
                break
    finally:
        watchdog.clear()
    return f"[{','.join(task.outcomes)}]".encode()


@dataclass
class _Task:
    """State that the task's thread and its watchdog share. `waiting`: not begun; `untold`: ended, but not reported to
    the driver. Numbers are indices into `calls`."""

    run: str
    batch: int
    calls: list[Record]
    outcomes: list[str] = field(init=False)
    waiting: deque[int] = field(init=False)
    untold: deque[int] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.outcomes = ["null"] * len(self.calls)
        self.waiting = deque(range(len(self.calls)))

    def tell(self) -> None:
        """The running body is slow: report ended calls, and hand back all others."""
        for number in _taken(self.waiting):
            self._send(number, {"kind": HANDED_BACK})
        for number in _taken(self.untold):
            self._send(number, {"kind": ENDED, "outcome": self.outcomes[number]})

    def _send(self, number: int, message: Record) -> None:
        who = {name: self.calls[number][name] for name in ("call", "attempt_id")}
        tell_driver(self.run, {**message, "batch": self.batch, **who})


def _taken(numbers: deque[int]) -> Iterator[int]:
    """Take from the left until the queue is empty; two threads never get the same item."""
    with contextlib.suppress(IndexError):
        while True:
            yield numbers.popleft()


@functools.cache
def _watchdog() -> Watchdog:
    return Watchdog(SLOW_S)
