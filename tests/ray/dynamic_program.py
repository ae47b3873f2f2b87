"""Steps and workflows for the tests of dynamic graphs; as a script it drives one of them:
`python dynamic_program.py SETTINGS_JSON WORKFLOW ARGUMENTS_JSON`."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

from infra.errors import RecuaError
from workflows.driver import session
from workflows.driver.call import Call
from workflows.driver.settings import RunSettings
from workflows.graph import Future, Gang, context, on_end, run_id, step, workflow
from workflows.graph.steps import _Scope
from workflows.recipes.checks import close_pools

SLEEP = "import time; time.sleep(600)"
KEPT: list[Any] = []
"""What bodies hold on to until their process ends."""
MEMORY: list[tuple[int, int, int]] = []
"""(calls, futures and scopes; bytes in Python objects where tracemalloc is on; bytes resident) by `looping`."""


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


@step(gang=3, retries=1)
def together(folder: str) -> list[str]:
    """The group's id as the body and its children see it; the first attempt fails."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    def group_of_this_process() -> str:  # nested: it travels by value
        import ray

        return str(ray.get_runtime_context().get_placement_group_id())

    class Rank:
        def group(self) -> str:
            return group_of_this_process()

    group = context().placement_group()
    child = ray.remote(group_of_this_process)
    seen = [group.id.hex(), *ray.get([child.remote(), child.remote()])]
    rank = ray.remote(Rank).options(num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(group))
    ranks = [rank.remote(), rank.remote()]
    seen += ray.get([each.group.remote() for each in ranks])
    if trace(folder, "together") == 1:
        trace(folder, f"first {group.id.hex()}")
        raise ValueError("once")
    return seen


@step(gang=2)
def gathered() -> str:
    return str(context().placement_group().id.hex())


@step(gang=Gang([{"CPU": 1}, {"CPU": 2}]))
def hold(folder: str, me: str, until: str) -> str:
    """Ends when the file `until` is there; leaves behind all that a body can: see `household`."""
    household(Path(folder) / me)
    while not (Path(folder) / until).exists():
        time.sleep(0.02)
    return me


def household(file: Path) -> None:
    """Start children in a session and a group of their own, an actor with a child, and the actor's actor with one;
    write all seven process ids to `file`, this process's first."""
    import ray

    @ray.remote(num_cpus=0)
    class Member:
        def __init__(self, depth: int) -> None:
            self.child = subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True)
            self.member = Member.remote(depth - 1) if depth else None

        def pids(self) -> list[int]:
            mine = [os.getpid(), self.child.pid]
            return mine + (ray.get(self.member.pids.remote()) if self.member else [])

    member = Member.remote(1)
    child = subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True)
    other = subprocess.Popen([sys.executable, "-c", SLEEP], process_group=0)
    pids = [os.getpid(), child.pid, other.pid, *ray.get(member.pids.remote())]
    member.__ray_call__.remote(lambda self: time.sleep(600))
    part = file.with_suffix(".part")
    part.write_text(" ".join(map(str, pids)))
    part.rename(file)
    KEPT.append(member)


@step(num_cpus=0)
def lend(folder: str, then: str) -> int:
    """Borrow a learner; its process id. "hold": keep it until something ends this process."""
    import ray

    from actors.pools.config import LearnerPoolSettings
    from actors.pools.keeper import NAMESPACE, Pools

    pools = Pools(context().run_id, lease_s=2.0, orphan_s=1.0)
    with pools.learners(LearnerPoolSettings(workers=1, num_cpus=0.01, threads=1)) as learners:
        member = int(ray.get(learners.workers[0].describe.remote()).pid)
        keeper = ray.get_actor(f"pools-{pools.run_id}", namespace=NAMESPACE)
        pids = f"{ray.get(keeper.__ray_call__.remote(lambda self: os.getpid()))} {member}"
        part = Path(folder) / f"{then}.part"
        part.write_text(pids)
        part.rename(Path(folder) / then)
        time.sleep(600 if then == "hold" else 0)
    if then == "fail":
        raise ValueError("after the pool")
    return member


@workflow
def lending(folder: str, then: str) -> bool:
    """Whether two steps borrowed the same process."""
    on_end(partial(close_pools, run_id()))
    return lend.options(name="first")(folder, "first").result() == lend.options(name="then")(folder, then).result()


@workflow
def gathering(folder: str) -> Any:
    return together(folder)


@workflow
def holding(folder: str) -> Any:
    return [hold.options(name=me)(folder, me, "go") for me in ("a", "b")]


@workflow
def holding_one(folder: str, timeout: float) -> Any:
    return hold.options(timeout=timeout)(folder, "a", "go")


@workflow
def too_much(bundles: int) -> Any:
    return gathered.options(gang=Gang([{"CPU": 1}] * bundles, "SPREAD"))()


@workflow
def wide_round(x: int) -> int:
    return add_all(square.map([x % 5, 1])).result()


@workflow
def looping(rounds: int) -> int:
    """Every round takes two steps (or a nested workflow of a map and a step) on what the round before it gave, and the
    value decides which. Notes what the driver holds at every hundredth round."""
    x = 1
    for index in range(rounds):
        x = wide_round(x) if x % 3 == 0 else add_all([square(x % 100)], first=index).result()
        x %= 1000
        if index % 100 == 99:
            note_memory()
    return x


def looped(rounds: int) -> int:
    """The same in plain Python."""
    x = 1
    for index in range(rounds):
        x = ((x % 5) ** 2 + 1 if x % 3 == 0 else (x % 100) ** 2 + index) % 1000
    return x


def note_memory() -> None:
    gc.collect()
    kept = sum(isinstance(each, (Call, Future, _Scope)) for each in gc.get_objects())
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    MEMORY.append((kept, tracemalloc.get_traced_memory()[0], resident))


def main(settings: str, name: str, arguments: str) -> None:
    try:
        result = session.run(globals()[name], *json.loads(arguments), settings=RunSettings(**json.loads(settings)))
    except RecuaError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        raise SystemExit(3) from None
    print(json.dumps(result.value), flush=True)
    for kept, _, resident in MEMORY:
        print(f"{kept} objects, {resident / 1e6:.1f} MB resident", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
