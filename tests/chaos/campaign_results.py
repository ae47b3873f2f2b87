"""What every campaign does with its runs: seeds, a file of results that grows, replays, a bound, a clean end.

Every run takes the next seed, and its line goes to the end of a file, so that a long campaign can be stopped and
continued. `SEED=n` in the environment replays one schedule. A line says of which commit the code was, with a plus where
it had changes beside; `--since` leaves out what was run with older code, or earlier.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

FAILURES = 3
"""In a row: more are no matter of an overloaded machine."""
Record = dict[str, Any]
Open = Callable[[Path], AbstractContextManager[Callable[[int], Record]]]
"""Given the folder of the results: surroundings in which a seed becomes a line of the results."""


def carry_out(seeds: Iterable[int], results: Path, surroundings: Open) -> Generator[Record, None, None]:
    """Run these seeds; each line is kept and given. Where the surroundings fail, on an overloaded machine say, the
    seed is run again in new ones."""
    commit = _git("rev-parse", "--short", "HEAD") + "+" * bool(_git("status", "--porcelain", "--untracked-files=no"))
    left, failures = deque(seeds), 0
    while left:
        try:
            with surroundings(results.parent) as perform:
                while left:
                    line = {**perform(left[0]), "commit": commit, "time": round(time.time())}
                    left.popleft()
                    failures = 0
                    with results.open("a") as stream:
                        stream.write(json.dumps(line) + "\n")
                    yield line
        except Exception as error:
            failures += 1
            if failures > FAILURES:
                raise
            traceback.print_exc()
            print(f"the surroundings of SEED={left[0]} failed, which is run again: {error!r}", flush=True)


def main(
    prog: str,
    description: str | None,
    results: Path,
    surroundings: Open,
    show: Callable[[Record], None],
    summary: Callable[[list[Record]], str],
    arguments: Sequence[str] | None = None,
) -> int:
    """The command of a campaign; returns 1 when a run of this call has violations."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--runs", type=int, help="how many more runs (20)")
    parser.add_argument("--faults", type=int, help="until so many faults have hit, those in the file included")
    parser.add_argument("--for", dest="seconds", type=_seconds, help="no new run after this time, e.g. 10m")
    parser.add_argument("--results", type=Path, default=results, help=f"the file of results ({results})")
    parser.add_argument("--first-seed", type=int, help="default: after the last seed in the file")
    parser.add_argument("--since", default="", help="count only runs of this commit and later ones, or after this time")
    given = parser.parse_args(arguments)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(text) for text in given.results.read_text().splitlines()] if given.results.exists() else []
    first = given.first_seed or max((line["seed"] for line in lines), default=0) + 1
    if given.since:
        lines = since(lines, given.since)
    bounded = given.faults is not None or given.seconds is not None
    runs = given.runs if given.runs is not None else 10**6 if bounded else 20
    seeds = range(first, first + runs)
    if replay := os.environ.get("SEED"):
        seeds = range(int(replay), int(replay) + 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what runs in its background
    deadline = None if given.seconds is None else time.monotonic() + given.seconds
    fresh: list[Record] = []
    enough = given.faults is not None and _hits(lines) >= given.faults
    try:
        with contextlib.closing(carry_out(() if enough else seeds, given.results, surroundings)) as performed:
            for line in performed:
                show(line)
                fresh.append(line)
                late = deadline is not None and time.monotonic() > deadline
                if late or (given.faults is not None and _hits([*lines, *fresh]) >= given.faults):
                    break
    except KeyboardInterrupt:
        print("interrupted; what was run so far:", flush=True)
    print(summary([*lines, *fresh]), flush=True)
    return 1 if any(line["violations"] for line in fresh) else 0


def since(lines: Sequence[Record], start: str) -> list[Record]:
    """Runs after a time (ISO 8601, e.g. 2026-11-21T15:20), or with code that has a commit in its history."""
    with contextlib.suppress(ValueError):
        time_s = datetime.fromisoformat(start).timestamp()
        return [line for line in lines if line["time"] >= time_s]
    has = {commit: _has(commit.rstrip("+"), start) for commit in {line["commit"] for line in lines}}
    return [line for line in lines if has[line["commit"]]]


def _has(commit: str, earlier: str) -> bool:
    command = ["git", "merge-base", "--is-ancestor", earlier, commit]
    return subprocess.run(command, capture_output=True).returncode == 0


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()


def _hits(lines: list[Record]) -> int:
    return sum(number for line in lines for kind, number in line["faults"].items() if "nobody" not in kind)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text}: write 90s, 10m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
