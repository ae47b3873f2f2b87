"""Steps for the tests of batches: short ones, of which one may raise, kill its worker or wait for the others."""

import os
import time
from pathlib import Path
from typing import Any

from infra.errors import StepError
from workflows.graph import context, step, workflow

WAIT_S = 60.0


def mark(folder: str, x: int) -> None:
    """One line per body: whose it is, its attempt, and the Ray task that ran it."""
    import ray

    run = context()
    task = ray.get_runtime_context().get_task_id()
    with (Path(folder) / "trace").open("a") as stream:
        stream.write(f"{x} {run.attempt} {run.attempt_id} {task}\n")


@step
def short(folder: str, x: int, special: int, how: str) -> int:
    mark(folder, x)
    if x == special and how == "raises":
        raise ValueError(f"{x} is no good")
    if x == special and how == "says":
        print(f"this is {x}", flush=True)
    if x == special and how == "kills" and context().attempt == 1:
        os._exit(3)
    if x == special and how == "blocks":  # until everybody else's result has been used
        deadline = time.monotonic() + WAIT_S
        while not (Path(folder) / "after").exists():
            assert time.monotonic() < deadline, "the others did not end meanwhile"
            time.sleep(0.01)
    return x + 1


@step
def after(folder: str, others: list[int]) -> int:
    (Path(folder) / "after").touch()
    return sum(others)


@workflow
def crowd(folder: str, chains: int, length: int, special: int, how: str) -> dict[str, Any]:
    """`chains` chains of `length` short steps: chain c counts from 1000 c, and `special` is in the middle of one."""
    ends = []
    for chain in range(chains):
        value: Any = 1000 * chain
        for _ in range(length):
            value = short.options(may_fail=True)(folder, value, special, how)
        ends.append(value)
    odd = ends.pop(special // 1000)
    total = after(folder, ends).result()
    try:
        return {"total": total, "odd": odd.result()}
    except StepError as error:
        return {"total": total, "odd": str(error)}
