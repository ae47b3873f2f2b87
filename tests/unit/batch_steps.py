"""Steps for the tests of one task's batch."""

import time
from pathlib import Path

from workflows.graph import step


@step
def plain(x: int) -> int:
    return x + 1


@step
def large(x: int) -> str:
    return "x" * (100 << 10)


@step
def gated(gate: str) -> str:
    deadline = time.monotonic() + 60
    while not Path(gate).exists():
        assert time.monotonic() < deadline, "the gate stays closed"
        time.sleep(0.01)
    return "open"
