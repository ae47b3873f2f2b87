"""Steps and workflows for the tests of the graph: each leaves a trace of its runs in a folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from workflows.graph import Artifact, context, on_end, step, workflow


def trace(folder: str, text: str) -> int:
    """Append a line; how many equal lines there are now."""
    with (Path(folder) / "trace").open("a") as stream:
        stream.write(text + "\n")
    return traced(folder).count(text)


def traced(folder: str) -> list[str]:
    file = Path(folder) / "trace"
    return file.read_text().splitlines() if file.exists() else []


@step
def number(folder: str, x: int) -> int:
    trace(folder, f"number {x}")
    return x


@step
def total(folder: str, parts: dict[str, Any]) -> int:
    trace(folder, "total")
    return sum(parts["list"]) + sum(parts["tuple"]) + parts["deep"]["one"]


@step
def meet(folder: str, me: str, other: str) -> str:
    """Ends only while the other branch runs too."""
    (Path(folder) / me).touch()
    deadline = time.monotonic() + 60
    while not (Path(folder) / other).exists():
        assert time.monotonic() < deadline, "the branches did not run at the same time"
        time.sleep(0.01)
    return me


@step
def guarded(folder: str, x: int) -> int:
    """Fails until the file `open` is there."""
    trace(folder, "guarded")
    if not (Path(folder) / "open").exists():
        raise ValueError("the gate is closed")
    return x + 1


@step(retries=2)
def third_time(folder: str) -> int:
    seen = trace(folder, "third_time")
    if seen < 3:
        raise RuntimeError(f"try {seen}")
    return seen


@step
def crash(folder: str, times: int) -> int:
    seen = trace(folder, "crash")
    if seen <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return seen


@step
def crash_late(folder: str, times: int) -> int:
    seen = trace(folder, "crash_late")
    if seen <= times:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    return seen


@step(timeout=1.0)
def endless(folder: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    (Path(folder) / "pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)


@step
def talk(folder: str) -> Artifact:
    run = context()
    print("to standard output")
    os.system("echo from a child")
    run.log("a line")
    run.progress(1, 2, loss=0.5)
    run.progress(2, 2, loss=0.25)
    out = run.artifact("words")
    (out.path / "words.txt").write_text("words")
    (run.scratch / "rubbish").touch()
    trace(folder, str(run.scratch))
    return out.seal(count=1)


@step
def read(words: Artifact) -> str:
    return (words.path() / "words.txt").read_text()


@step
def with_actor() -> int:
    import ray

    @ray.remote(num_cpus=0)
    class Counter:
        def add(self, x: int) -> int:
            return x + 1

    counter = Counter.remote()
    return int(ray.get(counter.add.remote(1)))


@step(num_gpus=1000)
def greedy() -> None: ...


@workflow
def summing(folder: str) -> Any:
    parts = {"list": [number(folder, 1), number(folder, 2)], "tuple": (number(folder, 3),)}
    return total(folder, {**parts, "deep": {"one": 4}})


@workflow
def branches(folder: str) -> list[str]:
    first, second = meet(folder, "a", "b"), meet(folder, "b", "a")
    return [first.result(), second.result()]


@workflow
def doubling(folder: str, limit: int) -> int:
    x = 1
    while x < limit:
        x = 2 * number(folder, x).result()
    return x


@workflow
def gate(folder: str) -> Any:
    on_end(lambda: trace(folder, "hook") and None)
    return guarded(folder, number(folder, 7))


@workflow
def one(name: str, *args: Any) -> Any:
    return globals()[name](*args)


@workflow
def tolerant(folder: str) -> str:
    call = guarded.options(may_fail=True)(folder, 1)
    try:
        return str(call.result())
    except Exception as error:
        return type(error).__name__


@workflow
def impatient(folder: str) -> Any:
    slow = endless.options(timeout=600)(folder)
    deadline = time.monotonic() + 60
    while not (Path(folder) / "pids").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    guarded(folder, 1)
    return slow.result()


@workflow
def wandering(folder: str) -> Any:
    """Takes another path once the file `other` (or `changed`) is there."""
    first = number(folder, 2 if (Path(folder) / "changed").exists() else 1)
    if (Path(folder) / "other").exists():
        return crash.options(name="x")(folder, 0)
    first.result()
    return guarded(folder, 1)


@workflow
def speaking(folder: str) -> Any:
    return read(talk(folder))


@step
def leave_a_child() -> list[int]:
    """A process that would go on, and a changed working folder."""
    os.chdir("/")
    return [os.getpid(), subprocess.Popen(["sleep", "600"], start_new_session=True).pid]


@step
def where(_: list[int]) -> tuple[int, str]:
    return os.getpid(), os.getcwd()


@workflow
def leaving() -> tuple[list[int], tuple[int, str], tuple[int, str]]:
    before = where([]).result()
    left = leave_a_child().result()
    return left, before, where(left).result()
