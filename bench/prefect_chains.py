"""The chains of `bench.chains` on Prefect 3 with persisted results. Runs in the peers' own Python, without recua.

    python prefect_chains.py threads|ray --chains 20 --length 20

Standard output: one JSON object with the seconds of one flow run, without its start.
"""

import argparse
import json
import os
import sys
import time
from typing import Any

SPREAD = 1_000_000


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runner", choices=["threads", "ray"])
    parser.add_argument("--chains", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    given = parser.parse_args(arguments)
    from prefect import flow, task

    if given.runner == "threads":
        from prefect.task_runners import ThreadPoolTaskRunner

        runner: Any = ThreadPoolTaskRunner()
    else:
        from prefect_ray import RayTaskRunner

        runner = RayTaskRunner(init_kwargs={"num_cpus": os.cpu_count(), "include_dashboard": False})

    @task(persist_result=True)
    def link(number: int) -> int:
        return number + 1

    @flow(task_runner=runner, persist_result=True)
    def chains(number: int, length: int) -> float:
        warm = [link.submit(-1) for _ in range(2)]
        for future in warm:
            future.result()
        began = time.perf_counter()
        ends: list[Any] = [index * SPREAD for index in range(number)]
        for _ in range(length):
            ends = [link.submit(end) for end in ends]
        total = sum(end.result() for end in ends)
        assert total == sum(index * SPREAD + length for index in range(number))
        return time.perf_counter() - began

    print(json.dumps({"seconds": chains(given.chains, given.length)}))


if __name__ == "__main__":
    main(sys.argv[1:])
