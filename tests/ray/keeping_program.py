"""Steps that go wrong in every way, for test_errors.py: each leaves a trace in a folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from workflows.driver import session
from workflows.driver.settings import RunSettings
from workflows.graph import context, step, workflow


def count(folder: str, name: str) -> int:
    """How often this was called with this name, this call included."""
    with (Path(folder) / name).open("a") as stream:
        stream.write("x")
    return (Path(folder) / name).stat().st_size


class Outrage(BaseException):
    """An exception that is no Exception."""


def deep(folder: str) -> None:
    raise KeyError("no such row")


@step(retries=2)
def wrong(folder: str) -> None:
    count(folder, "wrong")
    try:
        deep(folder)
    except KeyError as error:
        raise ValueError("the table is empty") from error


@step(retries=2)
def killed_then_wrong(folder: str) -> int:
    seen = count(folder, "killed_then_wrong")
    if seen in (1, 3):
        os.kill(os.getpid(), signal.SIGKILL)
    if seen in (2, 4):
        raise ValueError(f"try {seen}")
    return seen


@step
def leaves(folder: str, how: str) -> Any:
    count(folder, how)
    if how == "exit":
        sys.exit(3)
    if how == "outrage":
        raise Outrage("enough")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "unkeepable":
        return {"models": [object()]}
    if how == "os-exit":
        os._exit(0)
    if how == "noise":
        for _ in range(160):
            print("x" * (1 << 16))
    return "done"


@step
def broken_actor(folder: str, how: str) -> Any:
    import ray

    count(folder, how)

    @ray.remote(num_cpus=0)
    class Counter:
        def __init__(self, fails: bool) -> None:
            if fails:
                raise RuntimeError("no table to count")

        def add(self, x: int) -> int:
            import os
            import pathlib
            import signal

            mark = pathlib.Path(folder) / "died"
            if how == "dies" and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raises":
                raise ValueError(f"cannot add {x}")
            return x + 1

    return ray.get(Counter.remote(how == "init").add.remote(1))


@step(timeout=5.0, retries=20)
def family(folder: str) -> str:
    """A child in this session, a grandchild in another, an actor; then it waits for its end."""
    import ray

    if (Path(folder) / "pids").exists():
        return "enough"

    @ray.remote(num_cpus=0)
    class Helper:
        def pid(self) -> int:
            import os

            return os.getpid()

    helper = Helper.remote()
    wait = "import time; time.sleep(600)"
    apart = "start_new_session=True, stdout=subprocess.DEVNULL"
    fork = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {wait!r}], {apart}).pid)"
    child = subprocess.Popen([sys.executable, "-c", wait])
    grandchild = int(subprocess.check_output([sys.executable, "-c", fork]))
    pids = [os.getpid(), child.pid, grandchild, ray.get(helper.pid.remote())]
    (Path(folder) / "pids").write_text(" ".join(map(str, pids)))
    time.sleep(600)
    return "never"


@step
def resumes(folder: str) -> str:
    state = Path(context().state_url())  # the tests' stores are folders
    state.mkdir(parents=True, exist_ok=True)
    count(str(state), "seen")
    count(folder, "resumes")
    return str((state / "seen").stat().st_size)


@step(num_cpus=3)
def away(folder: str) -> int:
    """Runs on the node with three CPUs; the first time it stays until that node is gone."""
    seen = count(folder, "away")
    if seen == 1:
        time.sleep(600)
    return seen


@step(num_cpus=2)
def hungry(folder: str, mebibytes: int) -> int:
    """Takes memory, more and more of it (others on this machine may give some back meanwhile), and keeps it."""
    import psutil

    count(folder, "hungry")
    taken = []
    while len(taken) * 64 < mebibytes and psutil.virtual_memory().available > 2 << 30:
        taken.append(b"x" * (64 << 20))
        time.sleep(0.02)
    time.sleep(60)
    return len(taken)


@step
def leaves_an_orphan(folder: str) -> str:
    """An actor's child in another session: nobody knows of it but its environment. Then it waits for its end."""
    import ray

    @ray.remote(num_cpus=0)
    class Starter:
        def start(self) -> int:
            import subprocess
            import sys

            return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True).pid

    starter = Starter.remote()
    child = ray.get(starter.start.remote())
    (Path(folder) / "orphan.new").write_text(str(child))
    (Path(folder) / "orphan.new").rename(Path(folder) / "orphan")
    time.sleep(600)
    return "never"


@step
def gated(folder: str, before: int) -> int:
    """The second one ends when somebody says so."""
    count(folder, f"gated-{before}")
    while before == 1 and not (Path(folder) / "go").exists():
        time.sleep(0.02)
    return before + 1


@workflow
def chain(folder: str) -> int:
    reached = 0
    for _ in range(4):
        reached = gated(folder, reached).result()
    return reached


@workflow
def one(name: str, *args: Any) -> Any:
    return globals()[name](*args)


if __name__ == "__main__":  # python keeping_program.py SETTINGS_JSON NAME FOLDER
    session.run(one, *sys.argv[2:], settings=RunSettings(**json.loads(sys.argv[1])))
