"""Steps and workflows for the tests of dynamic graphs; as a script it drives one of them:
`python dynamic_program.py SETTINGS_JSON WORKFLOW ARGUMENTS_JSON`."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from infra.errors import RecuaError
from workflows import session
from workflows.config import RunSettings
from workflows.graph import step, workflow


def trace(folder: str, text: str) -> int:
    """Append a line; how many equal lines there are now."""
    with (Path(folder) / "trace").open("a") as stream:
        stream.write(text + "\n")
    return traced(folder).count(text)


def traced(folder: str) -> list[str]:
    file = Path(folder) / "trace"
    return file.read_text().splitlines() if file.exists() else []


@step
def numbers(count: int) -> list[int]:
    return list(range(count))


@step
def numbers_in_parts(count: int) -> dict[str, list[int]]:
    return {"even": list(range(0, count, 2)), "odd": list(range(1, count, 2))}


@step
def square(x: int, plus: int = 0) -> int:
    return x * x + plus


@step
def noted(x: int, folder: str) -> int:
    trace(folder, f"noted {x}")
    return x


@step
def add_all(parts: list[int], first: int = 0) -> int:
    return first + sum(parts)


@step
def picky(x: int, bad: list[int], folder: str) -> int:
    """Fails for what is in `bad` until the file `open` is there; -1 kills its worker the first time."""
    seen = trace(folder, f"picky {x}")
    if x == -1 and seen == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if x in bad and not (Path(folder) / "open").exists():
        raise ValueError(f"{x} is bad")
    return x


@step
def crowd(x: int, folder: str) -> int:
    """How many of its kind run at the same time."""
    mine = Path(folder) / f"in-{x}"
    mine.touch()
    time.sleep(0.1)
    seen = len(list(Path(folder).glob("in-*")))
    mine.unlink()
    return seen


@workflow
def mapping(count: int) -> dict[str, Any]:
    """Lists that are known now, later, inside results, and made of futures; shared arguments that are futures."""
    later = square.map(numbers(count), plus=square(2))
    parts = numbers_in_parts(count)
    return {
        "later": later,
        "sum": add_all(later, first=1),
        "odd": square.map(parts.odd),
        "even": square.map(parts.even).result(),
        "now": square.map([1, 2, square(3)]),
        "of a map": square.map(later),
        "none": square.map(numbers(0)),
        "no list at all": square.map([]).result(),
    }


@workflow
def wide(count: int) -> Any:
    return add_all(square.map(numbers(count)))


@workflow
def crowded(folder: str) -> Any:
    return crowd.map(range(6), folder)


@workflow
def picking(items: list[int], bad: list[int], folder: str) -> Any:
    return picky.options(retries=1).map(items, bad, folder)


@workflow
def tolerant(items: list[int], bad: list[int], folder: str) -> list[Any]:
    call = picky.options(may_fail=True).map(items, bad, folder)
    try:
        return [call.result()]
    except RecuaError as error:
        return [str(error)]


@workflow
def over_no_list() -> Any:
    return square.map(square(3))


@workflow
def changing(folder: str) -> Any:
    """The list, or the branch, is another one on a later day; the last step fails until the file `open` is there."""
    day = Path(folder) / "day"
    items, branch = json.loads(day.read_text()) if day.exists() else ([1, 2, 3], "square")
    parts: Any = square.map(items) if branch == "square" else [square.options(name="elsewhere")(7)]
    add_all.options(name=branch)(parts).result()
    return picky(7, [7], folder)


def main(settings: str, name: str, arguments: str) -> None:
    try:
        result = session.run(globals()[name], *json.loads(arguments), settings=RunSettings(**json.loads(settings)))
    except RecuaError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        raise SystemExit(3) from None
    print(json.dumps(result.value), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
