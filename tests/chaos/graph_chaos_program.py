"""A small deterministic graph as a driver process: `python graph_chaos_program.py SETTINGS_JSON FOLDER`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from infra.errors import RecuaError
from workflows.driver import session
from workflows.driver.settings import RunSettings
from workflows.graph import Artifact, context, step, workflow


@step
def make(number: int) -> Artifact:
    out = context().artifact("part")
    for index in range(3):
        (out.path / f"{index}.txt").write_text(f"{number * index}\n" * 100)
    return out.seal(number=number)


@step
def combine(parts: list[Artifact]) -> dict[str, Any]:
    text = "".join((part.path() / "2.txt").read_text() for part in parts)
    out = context().artifact("whole")
    (out.path / "all.txt").write_text(text)
    (out.path / "size.txt").write_text(str(len(text)))
    return {"whole": out.seal(), "size": len(text)}


@step
def refine(whole: Artifact, by: int) -> dict[str, Any]:
    size = len((whole.path() / "all.txt").read_text()) % (by + 7)
    out = context().artifact("refined")
    (out.path / "size.txt").write_text(str(size))
    return {"size": size, "refined": out.seal()}


@step
def wait_for(folder: str) -> str:
    """Ends when the file `go` is there; leaves a child of its own in another session."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    with (Path(folder) / "begun").open("a") as stream:
        stream.write(f"{child.pid}\n")
    while not (Path(folder) / "go").exists():
        time.sleep(0.02)
    child.kill()
    return "went"


@workflow
def graph() -> dict[str, Any]:
    parts = [make(number) for number in range(5)]
    whole = combine(parts).result()
    seen = [0]
    for _ in range(6):
        seen.append(refine(whole["whole"], seen[-1]).result()["size"])
    return {"whole": whole["whole"], "seen": seen}


@workflow
def waiting(folder: str) -> Any:
    make(1).result()
    return wait_for(folder)


@workflow
def waiting_twice(folder: str) -> Any:
    return [wait_for(folder), wait_for(folder)]


def main(settings: str, folder: str) -> None:
    given = json.loads(settings)
    bodies = waiting_twice if given.pop("twice", False) else waiting
    options = RunSettings(**given)

    def hook() -> None:
        with (Path(folder) / "hooks").open("a") as stream:
            stream.write(f"{os.getpid()}\n")

    try:
        if folder:
            result = session.run(bodies, folder, settings=options, on_end=[hook])
        else:
            result = session.run(graph, settings=options)
    except RecuaError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        raise SystemExit(3) from None
    value = result.value
    print(json.dumps([value["whole"].digest, value["seen"]] if isinstance(value, dict) else value), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
