"""The graph of the chaos campaign as a driver process: `python campaign_program.py SETTINGS_JSON MARKS VARIANT`.

About 50 calls: a fan-out over a list known only at run time, nested workflows, a loop that decides on results, a step
that fails at its first attempt, an approval, an event from outside, artifacts written and read, children of a body.
Results are a pure function of the variant and the event's value. Every body appends a line to the file MARKS, outside
the store, when it begins and when it ends.
"""

import contextlib
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from infra.errors import RecuaError
from infra.processes import process_start
from workflows.driver import session
from workflows.driver.settings import RunSettings
from workflows.graph import Artifact, approval, context, event, step, workflow
from workflows.runs.events import Event


@contextlib.contextmanager
def body(marks: str) -> Iterator[None]:
    """Marks the begin and the end of a body, which takes 5 to 60 ms, always the same for one call."""
    run = context()
    pid = os.getpid()
    who = {"call": run.call_id, "attempt": run.attempt_id, "pid": pid, "start": process_start(pid)}
    mark(marks, {"what": "began", **who})
    time.sleep(0.005 + hashlib.sha256(run.call_id.encode()).digest()[0] / 255 * 0.055)
    yield
    mark(marks, {"what": "ended", **who})


def mark(marks: str, line: dict[str, Any]) -> None:
    """One write to a file opened for appending: lines of different processes never mix."""
    descriptor = os.open(marks, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, json.dumps({**line, "time": time.time()}).encode() + b"\n")
    finally:
        os.close(descriptor)


@step
def plan(marks: str, variant: int) -> dict[str, Any]:
    with body(marks):
        return {"numbers": [variant + 3 * index for index in range(15 + variant % 3)], "seed": 27 + variant % 3}


@step
def grind(number: int, marks: str) -> int:
    with body(marks):
        return number * number % 101


@step(retries=1)
def flaky(marks: str, number: int) -> int:
    """A user's error that passes at the second attempt."""
    with body(marks):
        if context().attempt == 1:
            raise ValueError("not at the first attempt")
        return number + 1


@step
def pack(marks: str, numbers: list[int]) -> Artifact:
    with body(marks):
        out = context().artifact("numbers")
        for index, number in enumerate(numbers[:6]):
            (out.path / f"{index}.txt").write_text(f"{number}\n" * 500)
        return out.seal(count=len(numbers))


@step
def read(marks: str, numbers: Artifact, index: int) -> int:
    print(f"reading {index}")
    with body(marks):
        return int((numbers.path() / f"{index}.txt").read_text().split()[0])


@step
def grow(marks: str, numbers: Artifact, left: int, right: int) -> Artifact:
    with body(marks):
        text = (numbers.path() / "0.txt").read_text() + f"{left} {right}\n" * 200
        out = context().artifact("grown")
        (out.path / "all.txt").write_text(text)
        return out.seal()


@step
def measure(marks: str, grown: Artifact) -> int:
    with body(marks):
        return len((grown.path() / "all.txt").read_text())


@step
def parent(marks: str, number: int) -> int:
    """Leaves it to recua to end its child where it is killed itself."""
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    mark(marks, {"what": "child", "pid": child.pid, "start": process_start(child.pid)})
    try:
        with body(marks):
            return number * 2
    finally:
        child.kill()
        child.wait()


@step
def half(marks: str, number: int) -> int:
    with body(marks):
        return number // 2 if number % 2 == 0 else 3 * number + 1


@step
def total(marks: str, parts: dict[str, Any]) -> int:
    with body(marks):
        return sum(map(sum, (parts["ground"], parts["levels"], parts["children"]))) + parts["last"] + parts["extra"]


@workflow
def level(marks: str, numbers: Artifact, index: int) -> Any:
    left = read(marks, numbers, index)
    right = flaky(marks, left)
    grown = grow(marks, numbers, left, right)
    if right.result() % 2 == 0:
        grown = grow(marks, numbers, right, left)
    return measure(marks, grown)


@workflow
def campaign(marks: str, variant: int) -> dict[str, Any]:
    first = plan(marks, variant)
    ground = grind.map(first.numbers, marks)
    numbers = pack(marks, ground)
    children = [parent(marks, index) for index in range(3)]
    levels = [level(marks, numbers, index) for index in range(3)]
    extra, go = event("extra"), approval("go", "the numbers are packed", show=numbers)
    rounds, number = 0, flaky(marks, first.seed).result()
    go.result()
    while number != 1 and rounds < 12:
        number = half(marks, number).result()
        rounds += 1
    parts = {"ground": ground, "levels": levels, "children": children, "last": number, "extra": extra}
    return {"total": total(marks, parts), "rounds": rounds, "numbers": numbers}


def main(settings: str, marks: str, variant: str) -> None:
    options = json.loads(settings)
    if (limit := options.pop("largest_file", None)) is not None:  # the kernel refuses to write on, as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def tell(event: Event) -> None:
        if event.kind in ("run-started", "warning"):
            line = json.dumps({"event": event.kind, **event.data})
            os.write(1, f"{line}\n".encode())  # in one piece: Ray prints from threads of its own

    try:
        result = session.run(campaign, marks, int(variant), settings=RunSettings(**options), observers=[tell])
    except RecuaError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        raise SystemExit(3) from None
    value = {**result.value, "numbers": result.value["numbers"].digest}
    os.write(1, f"{json.dumps({'result': value}, sort_keys=True)}\n".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
