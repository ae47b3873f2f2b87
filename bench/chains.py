"""The process that `bench.graph` measures: chains of steps on recua, or of bare Ray tasks.

    python -m bench.chains ray|recua|resume --chains 100 --length 100 [--address HOST:PORT] [--store FOLDER]

`ray` and `recua` join the Ray at HOST:PORT. `resume` resumes finished chains in FOLDER; it needs no Ray, because no
step is left to run. Standard output: one JSON object; times in seconds, memory in MiB.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workflows.driver import session
from workflows.driver.settings import RunSettings
from workflows.graph import step, workflow

SPREAD = 1_000_000
"""The distance between the chains' first numbers: no two calls are equal, so that none is reused."""
WARM_UP = (8, 4)


def add(number: int) -> int:
    return number + 1


@step
def link(number: int) -> int:
    return add(number)


@workflow
def chains(number: int, length: int) -> int:
    """The sum of the last results of `number` chains of `length` steps; each step takes the result of the one
    before."""
    ends = []
    for index in range(number):
        value: Any = index * SPREAD
        for _ in range(length):
            value = link(value)
        ends.append(value)
    return sum(end.result() for end in ends)


def run_id(number: int, length: int) -> str:
    return f"chains-{number}-{length}"


def recua(number: int, length: int, store: str) -> dict[str, float]:
    """Run or resume the chains; the memory is this driver's after the last step."""
    settings = RunSettings(store=store, run_id=run_id(number, length))
    memory: dict[str, float] = {}

    def run() -> int:
        result = session.run(chains, number, length, settings=settings, on_end=[lambda: memory.update(_memory())])
        return int(result.value)

    return {**_timed(run, number, length), **memory}


def ray_tasks(number: int, length: int) -> dict[str, float]:
    """The lower bound: the same chains as Ray tasks, whose results are not kept."""
    import ray

    task = ray.remote(max_retries=0, num_cpus=1)(add)

    def run() -> int:
        ends = []
        for index in range(number):
            value: Any = index * SPREAD
            for _ in range(length):
                value = task.remote(value)
            ends.append(value)
        return sum(ray.get(ends))

    return _timed(run, number, length)


def _timed(run: Callable[[], int], number: int, length: int) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    total = run()
    seconds, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    assert total == sum(index * SPREAD + length for index in range(number)), f"wrong result {total}"
    return {"seconds": seconds, "cpu_s": cpu_s}


def _memory() -> dict[str, float]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[row].split()[0]) / 1024 for name, row in (("rss_mb", "VmRSS"), ("peak_mb", "VmHWM"))}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ray", "recua", "resume"])
    parser.add_argument("--chains", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--address")
    parser.add_argument("--store")
    given = parser.parse_args(arguments)
    if given.what == "resume":
        print(json.dumps(recua(given.chains, given.length, given.store)))
        return
    import ray

    ray.init(address=given.address, log_to_driver=False, logging_level=logging.ERROR)
    if given.what == "ray":
        ray_tasks(*WARM_UP)
        print(json.dumps(ray_tasks(given.chains, given.length)))
    else:
        recua(*WARM_UP, f"{given.store}-warm")
        print(json.dumps(recua(given.chains, given.length, given.store)))


if __name__ == "__main__":
    main(sys.argv[1:])
