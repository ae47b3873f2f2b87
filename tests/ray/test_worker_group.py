"""The worker group on a real local Ray: seats, results, deaths of real processes, and what is left afterwards."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.workers.gather import gather
from cluster.workers.group import WorkerGroup
from cluster.workers.seat import Worker
from infra.errors import DataError, NodeLost, ResourceError, StepError, StepTimeout
from infra.processes import process_start
from tests.helpers import rays


class Probe(Worker):
    def greet(self, name: str) -> str:
        assert self.seat is not None
        return f"hello {name} from {self.seat.rank} of {self.seat.world_size}"

    def environment(self) -> tuple[str, str, str]:
        return os.environ["OMP_NUM_THREADS"], os.environ["RANK"], os.environ["MASTER_PORT"]

    def listen_on_reserved_port(self) -> bool:
        assert self.seat is not None
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", self.seat.master_port))
            listener.listen()
        return True

    def raise_on(self, rank: int, kind: str) -> None:
        assert self.seat is not None
        if self.seat.rank == rank:
            raise DataError("train.jsonl:3: no such column") if kind == "ours" else KeyError("unexpected")
        threading.Event().wait()

    def wait_forever(self) -> None:
        threading.Event().wait()


def alive(pid: int) -> bool:
    return process_start(pid) is not None


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    runtime_env = {"env_vars": {"PYTHONPATH": paths}}  # workers import the actor classes of this file
    with rays.local_ray(4, runtime_env=runtime_env):
        yield


@pytest.fixture(scope="module")
def group(local_ray: None) -> Iterator[WorkerGroup]:
    with started("shared", env={"OMP_NUM_THREADS": "3"}) as group:
        yield group


@contextmanager
def started(name: str, **settings: Any) -> Iterator[WorkerGroup]:
    group = WorkerGroup(Probe, 2, num_cpus=0.5, name=name, **settings).start()
    try:
        yield group
    finally:
        group.shutdown()


def test_every_rank_answers_in_rank_order_with_its_own_arguments(group: WorkerGroup) -> None:
    names = zip(group.workers, ("ann", "bob"), strict=True)
    assert gather([worker.greet.remote(name) for worker, name in names], "rank") == [
        "hello ann from 0 of 2",
        "hello bob from 1 of 2",
    ]


def test_environment_is_set_and_the_reserved_port_can_be_listened_on(group: WorkerGroup) -> None:
    answers = gather([worker.environment.remote() for worker in group.workers], "rank")
    (threads, rank0, port0), (_, rank1, port1) = answers
    assert (threads, rank0, rank1) == ("3", "0", "1")
    assert port0 == port1 and int(port0) > 0
    assert ray.get(group.workers[0].listen_on_reserved_port.remote())


def test_an_error_of_one_rank_is_raised_while_the_others_still_wait() -> None:
    with started("ours") as group, pytest.raises(DataError, match=r"train\.jsonl:3"):
        gather([worker.raise_on.remote(1, "ours") for worker in group.workers], "rank")
    with started("foreign") as group, pytest.raises(StepError, match=r"rank 0.*KeyError") as caught:
        gather([worker.raise_on.remote(0, "foreign") for worker in group.workers], "rank")
    assert "raise_on" in caught.value.user_traceback


def test_a_killed_rank_is_named_at_once() -> None:
    with started("killed") as group:
        pids = [info.pid for info in group.infos]
        waiting = [worker.wait_forever.remote() for worker in group.workers]
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(NodeLost, match="rank 1 died"):
            gather(waiting, "rank")
        assert alive(pids[0])
    assert not any(alive(pid) for pid in pids)


def test_ranks_that_do_not_answer_in_time_are_named() -> None:
    with started("late") as group, pytest.raises(StepTimeout, match=r"rank 0, 1 did not answer within 0\.1 s"):
        gather([worker.wait_forever.remote() for worker in group.workers], "rank", timeout_s=0.1)


def test_shutdown_leaves_no_process_no_resources_and_frees_the_name() -> None:
    for _ in range(2):
        group = WorkerGroup(Probe, 2, num_cpus=1.5, name="again").start()
        pids = [info.pid for info in group.infos]
        os.kill(pids[0], signal.SIGSTOP)
        group.shutdown(timeout_s=1.0)
        group.shutdown()
        assert not any(alive(pid) for pid in pids)


def test_a_request_that_can_never_be_met_is_named_at_once() -> None:
    with pytest.raises(
        ResourceError, match=r"3 ranks x \(CPU=2\), PACK, but that is CPU=6 in all, and this cluster has CPU=4"
    ):
        WorkerGroup(Probe, 3, num_cpus=2, name="huge").start()
    with pytest.raises(ResourceError, match="GPU"):
        WorkerGroup(Probe, 1, num_gpus=1, name="gpu").start()
