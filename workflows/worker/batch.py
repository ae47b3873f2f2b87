"""Batches: several short calls in one Ray task.

A Ray task costs the driver more than all the rest of a call. Where many short calls are ready they share tasks, and
nothing else: each has its own start record, attempt id, log, lease check, outcome and commit.

Who shares: first attempts of one step with the same options, whose bodies took a few milliseconds so far in this run,
and no more of them than leaves several tasks to every CPU. A call that was handed back, or lost with its worker, and
every repeated attempt have a task of their own.

Who waits for whom: a task's calls run one after another, and nobody waits for a body that turns out slow: a watchdog
then tells the driver which calls have ended, and hands back those that were not begun. Both go through the channel at
once, and again in the task's result, so that nothing is lost with the channel. Task and watchdog take calls out of one
queue: each call is either begun or handed back.
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
"""A body that takes longer than SLOW_S is the last of its task, and none is begun when a task took LONGEST_S."""
BYTES = 64 << 10
"""About how much a task takes and gives; a message of the channel has to hold one outcome."""
ENDED, HANDED_BACK = "ended", "handed-back"
"""Messages of the channel: {"kind", "batch", "call", "attempt_id"}, with the "outcome" where the body has ended."""

Record = dict[str, Any]


def bootstrap(roots: list[str], run: str) -> Callable[[bytes], bytes]:
    """The function that Ray ships, once per run: nested, so that it travels by value and can first make our modules
    importable. `run`: what all attempts of the run share."""

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
    """The Ray task: run attempts one after another. `run`: what all attempts of a run share, `batch`: {"batch": its
    number, "calls": [each one's own part]}, both JSON.

    Returns a JSON list of their outcomes, null for each one that is handed back.
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
    """What the task's thread and its watchdog share. `waiting`: not begun; `untold`: ended, and the driver was not
    told. Numbers are places in `calls`."""

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
        """The body that runs is slow: let go of all others."""
        for number in _taken(self.waiting):
            self._send(number, {"kind": HANDED_BACK})
        for number in _taken(self.untold):
            self._send(number, {"kind": ENDED, "outcome": self.outcomes[number]})

    def _send(self, number: int, message: Record) -> None:
        who = {name: self.calls[number][name] for name in ("call", "attempt_id")}
        tell_driver(self.run, {**message, "batch": self.batch, **who})


def _taken(numbers: deque[int]) -> Iterator[int]:
    """Take from the left until nothing is left; two threads never get the same one."""
    with contextlib.suppress(IndexError):
        while True:
            yield numbers.popleft()


@functools.cache
def _watchdog() -> Watchdog:
    return Watchdog(SLOW_S)
