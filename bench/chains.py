"""What `bench.graph` measures, in a process of its own: chains of steps on recua, or of bare Ray tasks.

    python -m bench.chains recua|ray --address HOST:PORT --store FOLDER --chains 100 --length 100 [--die]

The last line of standard output is one JSON object: wall seconds, CPU seconds of this driver, resident memory (MiB) and
the result's checksum. `--die`: end by SIGKILL with every step committed and no end on record.
"""

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from workflows import session
from workflows.config import RunSettings
from workflows.graph import step, workflow

SPREAD = 1_000_000
"""Between the chains' first numbers: no two calls are equal, so none can be reused."""
WARM_UP = 8


def add(number: int) -> int:
    return number + 1


@step
def link(number: int) -> int:
    return add(number)


@workflow
def chains(number: int, length: int, die: bool = False) -> int:
    """The sum of the ends of `number` chains of `length` steps, each step taking the result of the one before."""
    ends = []
    for index in range(number):
        value: Any = index * SPREAD
        for _ in range(length):
            value = link(value)
        ends.append(value)
    total = sum(end.result() for end in ends)
    if die:
        _report({"total": total})
        os.kill(os.getpid(), signal.SIGKILL)
    return total


def measure_recua(number: int, length: int, store: str, die: bool = False) -> dict[str, Any]:
    """Run (or resume) the chains in `store`."""
    settings = RunSettings(store=store, run_id=f"bench-{number}-{length}")
    memory: dict[str, float] = {}

    def run() -> int:
        result = session.run(chains, number, length, settings=settings)
        return int(result.value)

    return {**_measured(run), **memory}


def measure_ray(number: int, length: int) -> dict[str, Any]:
    """The floor: the same chains as Ray tasks that nobody keeps."""
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

    return _measured(run)


def _measured(run: Callable[[], int]) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    total = run()
    return {"seconds": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "total": total}


def _report(values: dict[str, Any]) -> None:
    with open("/proc/self/status") as stream:
        status = dict(line.split(":", 1) for line in stream)
    memory = {name: int(status[field].split()[0]) / 1024 for name, field in (("rss_mb", "VmRSS"), ("peak_mb", "VmHWM"))}
    print(json.dumps({**values, **memory}), flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["recua", "ray"])
    parser.add_argument("--address", required=True)
    parser.add_argument("--store")
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--die", action="store_true")
    given = parser.parse_args(arguments)
    import ray

    ray.init(address=given.address, log_to_driver=False, logging_level=logging.ERROR)
    if given.what == "ray":
        measure_ray(WARM_UP, 4)
        _report(measure_ray(given.chains, given.length))
    else:
        measure_recua(WARM_UP, 4, given.store)
        _report(measure_recua(given.chains, given.length, given.store, given.die))


if __name__ == "__main__":
    main(sys.argv[1:])
