"""The worker group on a real local Ray: seats, results, deaths of real processes, and what is left afterwards."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.workers.group import WorkerGroup
from cluster.workers.seat import Worker
from infra.errors import DataError, NodeLost, ResourceError, StepError


class Probe(Worker):
    def __init__(self, greeting: str = "hello") -> None:
        self.greeting = greeting

    def greet(self, name: str, punctuation: str = "") -> str:
        assert self.seat is not None
        return f"{self.greeting} {name} from {self.seat.rank} of {self.seat.world_size}{punctuation}"

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

    def raise_when_gone(self, pids: list[int]) -> None:
        """What a survivor does: notices that a neighbour died, and raises before Ray reports the death."""
        assert self.seat is not None
        if self.seat.rank == 1:
            threading.Event().wait()
        while alive(pids[1]):
            pass
        raise RuntimeError("connection closed by peer")

    def count(self, upto: int) -> Iterator[int]:
        assert self.seat is not None
        for value in range(upto):
            yield value + 100 * self.seat.rank
        if upto > 50:
            threading.Event().wait()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    runtime_env = {"env_vars": {"PYTHONPATH": paths}}  # workers import the actor classes of this file
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=runtime_env)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def group(local_ray: None) -> Iterator[WorkerGroup]:
    with WorkerGroup(
        Probe, 2, num_cpus=0.5, env={"OMP_NUM_THREADS": "3"}, name="shared", actor_args=("hi",)
    ) as started:
        yield started


def test_every_rank_answers_in_rank_order_with_its_own_arguments(group: WorkerGroup) -> None:
    assert group.run("greet", per_rank=[("ann",), ("bob",)], punctuation="!") == [
        "hi ann from 0 of 2!",
        "hi bob from 1 of 2!",
    ]
    assert group.run_on(1, "greet", "eve") == "hi eve from 1 of 2"
    with pytest.raises(ValueError, match="3 entries for 2 ranks"):
        group.run("greet", per_rank=[(), (), ()])


def test_environment_is_set_and_the_reserved_port_can_be_listened_on(group: WorkerGroup) -> None:
    (threads, rank0, port0), (_, rank1, port1) = group.run("environment")
    assert (threads, rank0, rank1) == ("3", "0", "1")
    assert port0 == port1 and int(port0) > 0
    assert group.run_on(0, "listen_on_reserved_port")


def test_an_error_of_one_rank_is_raised_while_the_others_still_wait() -> None:
    raises = WorkerGroup(Probe, 2, num_cpus=0.5, name="raises")
    with raises as group, pytest.raises(DataError, match=r"train\.jsonl:3"):
        group.run("raise_on", 1, "ours")
    with raises as group, pytest.raises(StepError, match=r"rank 0 of group raises.*KeyError") as caught:
        group.run("raise_on", 0, "foreign")
    assert "raise_on" in caught.value.user_traceback


def test_a_stream_yields_every_value_of_every_rank(group: WorkerGroup) -> None:
    values = list(group.stream("count", 5))
    assert [value for rank, value in values if rank == 0] == [0, 1, 2, 3, 4]
    assert [value for rank, value in values if rank == 1] == [100, 101, 102, 103, 104]


@pytest.mark.parametrize("how", ["run", "stream"])
def test_a_killed_rank_is_named_at_once(how: str) -> None:
    with WorkerGroup(Probe, 2, num_cpus=0.5, name=f"killed-{how}", generation=4) as group:
        pids = [info.pid for info in group.infos]
        killed_at: list[float] = []

        def kill() -> None:
            killed_at.append(time.monotonic())
            os.kill(pids[1], signal.SIGKILL)

        with pytest.raises(NodeLost, match=f"rank 1 of group killed-{how}, generation 4"):
            if how == "run":
                timer = threading.Timer(0.3, kill)
                timer.start()
                group.run("wait_forever")
            else:
                for _, value in group.stream("count", 60):
                    if value == 159:
                        kill()
        assert time.monotonic() - killed_at[0] < 10, "15 ms on a quiet machine; no time-out of a collective"
        assert alive(pids[0])
    assert not any(alive(pid) for pid in pids)


def test_the_death_is_the_cause_even_when_a_survivor_complains_first() -> None:
    with WorkerGroup(Probe, 2, num_cpus=0.5, name="complains") as group:
        pids = [info.pid for info in group.infos]
        threading.Timer(0.3, os.kill, (pids[1], signal.SIGKILL)).start()
        with pytest.raises(NodeLost, match="rank 1"):
            group.run("raise_when_gone", pids)


def test_shutdown_leaves_no_process_no_resources_and_frees_the_name() -> None:
    for generation in range(2):
        group = WorkerGroup(Probe, 2, num_cpus=1.5, name="again", generation=generation).start()
        pids = [info.pid for info in group.infos]
        os.kill(pids[0], signal.SIGSTOP)
        group.shutdown(timeout_s=1.0)
        group.shutdown()
        assert not any(alive(pid) for pid in pids)


def test_a_new_owner_takes_over_the_resources_of_a_dead_one() -> None:
    @ray.remote(num_cpus=0, max_retries=0)
    def owner_that_dies() -> None:
        WorkerGroup(Probe, 2, num_cpus=1.5, name="orphan").start()
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(owner_that_dies.remote())
    with WorkerGroup(Probe, 2, num_cpus=1.5, name="orphan", generation=1) as group:
        assert len(group.run("greet", "x")) == 2


def test_a_request_that_can_never_be_met_is_named_at_once() -> None:
    with pytest.raises(
        ResourceError, match=r"3 ranks x \(CPU=2\), PACK, but that is CPU=6 in all, and this cluster has CPU=4"
    ):
        WorkerGroup(Probe, 3, num_cpus=2, name="huge").start()
    with pytest.raises(ResourceError, match="GPU"):
        WorkerGroup(Probe, 1, num_gpus=1, name="gpu").start()
