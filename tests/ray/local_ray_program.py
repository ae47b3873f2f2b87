"""A driver with a Ray of its own. Arguments: settings as JSON, and a folder.

Every phase is a step that adds a line to `begun-PHASE` when its body begins, and ends when `go-PHASE` is there.
"""

import json
import os
import sys
import time
from pathlib import Path

from infra.errors import RecuaError
from infra.reaper import LOCAL_RAY
from workflows.driver import session
from workflows.driver.settings import RunSettings
from workflows.graph import Gang, context, step, workflow
from workflows.runs.events import Event

DEADLINE_S = 300.0


@step(num_cpus=0.1)
def square(x: int, folder: str) -> int:
    with Path(folder, "squares").open("a") as stream:
        stream.write(f"{x}\n")
    return x * x


@step(num_cpus=1)
def phase(name: str, before: int, folder: str) -> int:
    """Two bodies of a phase may never overlap: the second would find the first one's process."""
    with Path(folder, f"begun-{name}").open("a") as stream:
        stream.write(f"{os.environ[LOCAL_RAY]}\n")
    context().progress(0, 1)
    deadline = time.monotonic() + DEADLINE_S
    while not Path(folder, f"go-{name}").exists():
        assert time.monotonic() < deadline, f"nobody lets {name} go"
        time.sleep(0.02)
    return before + len(name)


@workflow
def phases(names: list[str], folder: str) -> int:
    """Each phase takes what all squares before it come to; every second one runs on a placement group."""
    total = 0
    for number, name in enumerate(names):
        squares = [square(10 * number + each, folder) for each in range(3)]
        how = phase.options(gang=Gang([{"CPU": 1}, {"CPU": 1}])) if number % 2 else phase
        total = how(name, total + sum(each.result() for each in squares), folder).result()
    return total


def expected(names: list[str]) -> int:
    """What `phases` returns where nothing fails."""
    numbers = [10 * number + each for number in range(len(names)) for each in range(3)]
    return sum(number * number for number in numbers) + sum(map(len, names))


def show(event: Event) -> None:
    if event.kind in ("warning", "retry"):
        print(f"{event.kind} {event.call_id}: {event.data.get('message') or event.data['error']}", flush=True)


if __name__ == "__main__":
    given, folder = json.loads(sys.argv[1]), sys.argv[2]
    names = given.pop("names")
    try:
        result = session.run(phases, names, folder, settings=RunSettings(**given), observers=[show])
    except RecuaError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(json.dumps(result.value))
