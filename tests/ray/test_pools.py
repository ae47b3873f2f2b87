"""Pools that outlive a step: real keepers, real learner ranks (idle ones, so no model is opened)."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.pools.config import LearnerPoolSettings
from actors.pools.keeper import NAMESPACE, Pools
from engines.config import GeneratorSettings
from infra.processes import process_start
from tests.helpers.rays import local_ray

LEASE_S = 2.0
POOL = LearnerPoolSettings(workers=1, num_cpus=0.1, threads=1)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray(2):
        yield


@pytest.fixture(scope="module")
def pools(cluster: None) -> Iterator[Pools]:
    """One run's pools for all tests: processes are what costs time here."""
    lent = Pools(f"tests-{os.getpid()}", lease_s=LEASE_S)
    yield lent
    lent.close()


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def gone(pid: int) -> bool:
    return process_start(pid) is None


def pid_of(member: Any) -> int:
    return int(ray.get(member.describe.remote()).pid)


def keeper_pid(pools: Pools) -> int | None:
    """The keeper's process, or None where there is no keeper."""
    try:
        keeper = ray.get_actor(f"pools-{pools.run_id}", namespace=NAMESPACE)
        return int(ray.get(keeper.__ray_call__.remote(lambda self: os.getpid())))
    except (ValueError, ray.exceptions.RayActorError):
        return None


def hold(pools: Pools, folder: Path) -> Any:
    """A step's body that borrows and never ends."""

    def body(pools: Pools, pool: LearnerPoolSettings, file: str) -> None:  # nested: it travels by value
        with pools.learners(pool) as learners:
            member = ray.get(learners.workers[0].describe.remote()).pid
            Path(file + ".part").write_text(f"{os.getpid()} {member}")
            os.rename(file + ".part", file)
            time.sleep(600)

    return ray.remote(num_cpus=0, max_retries=0)(body).remote(pools, POOL, str(folder / "held"))


def borrowed(pools: Pools) -> int:
    """Borrow and give back at once; the member's process."""
    with pools.learners(POOL) as learners:
        return pid_of(learners.workers[0])


def test_members_are_lent_one_borrower_at_a_time_and_reused(pools: Pools) -> None:
    order: list[str] = []
    members: list[int] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with pools.learners(POOL) as learners:
            order.append("second in")
            members.append(pid_of(learners.workers[0]))

    thread = threading.Thread(target=second)
    thread.start()
    with pools.learners(POOL) as learners:
        members.append(pid_of(learners.workers[0]))
        inside.set()
        time.sleep(1.5 * LEASE_S)  # a borrower that lives keeps its lease
        order.append("first out")
    thread.join(60)
    assert order == ["first out", "second in"]
    assert members[0] == members[1], "the same processes, not new ones"


def test_a_borrower_that_fails_does_not_hand_its_members_on(pools: Pools) -> None:
    member = borrowed(pools)
    with pytest.raises(RuntimeError, match="half-way"), pools.learners(POOL):
        raise RuntimeError("half-way")
    assert gone(member)


def test_the_pool_of_a_killed_borrower_is_built_anew(pools: Pools, tmp_path: Path) -> None:
    reference = hold(pools, tmp_path)
    wait_for((tmp_path / "held").exists, "nothing was borrowed")
    borrower, member = map(int, (tmp_path / "held").read_text().split())
    os.kill(borrower, signal.SIGKILL)
    assert borrowed(pools) != member
    assert gone(member)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(reference)


def test_a_dead_member_is_replaced(pools: Pools) -> None:
    member = borrowed(pools)
    os.kill(member, signal.SIGKILL)
    wait_for(lambda: gone(member), "SIGKILL did nothing")
    assert borrowed(pools) != member


def test_close_leaves_no_process_and_may_come_twice(pools: Pools) -> None:
    member, keeper = borrowed(pools), keeper_pid(pools)
    assert keeper is not None
    pools.close()
    wait_for(lambda: gone(member) and gone(keeper), "closed, but still there", 20)
    pools.close()


def test_an_idle_keeper_ends_itself_and_its_members(pools: Pools) -> None:
    pool = POOL.model_copy(update={"idle_timeout_s": 1.0})
    with pools.learners(pool) as learners:
        member, keeper = pid_of(learners.workers[0]), keeper_pid(pools)
        assert keeper is not None
        time.sleep(2 * LEASE_S)
        assert not gone(member) and not gone(keeper), "not while it is borrowed from"
    wait_for(lambda: gone(member) and gone(keeper), "the idle pool is still there", 30)


def test_members_end_with_a_killed_keeper(pools: Pools) -> None:
    member, keeper = borrowed(pools), keeper_pid(pools)
    assert keeper is not None, "a later borrower got a new keeper"
    os.kill(keeper, signal.SIGKILL)
    wait_for(lambda: gone(member), "the member outlived its owner", 20)


def test_weights_for_generators_go_where_the_recipe_says(pools: Pools, tmp_path: Path) -> None:
    with pools.learners(POOL) as learners:
        learners.build_sender(GeneratorSettings(shared_folder=tmp_path), [1])
        assert [path.name for path in tmp_path.iterdir()] == [f"recua-weights-{os.getuid()}"]
