"""Errors by kind, for real: the user's, the platform's, and what becomes of processes and saved states."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keeping_program as program
import psutil
import pytest

from infra.errors import NodeLost, OutOfMemory, RecuaError, StepError, StepTimeout, UserError
from infra.storage import open_store
from tests.helpers import rays
from workflows.driver import session
from workflows.driver.settings import RunSettings
from workflows.runs.catalog import find_steps, load_run, read_log
from workflows.runs.events import Event


class Bench:
    """One store, one trace folder, and the events of the last run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = open_store(folder / "store")
        self.events: list[Event] = []

    def run(self, name: str, *args: Any, **settings: Any) -> Any:
        self.events = []
        given = RunSettings(store=self.store.url, **{"backoff_s": 0.01, "run_id": name, **settings})
        arguments = (name, str(self.folder), *args)
        return session.run(program.one, *arguments, settings=given, observers=[self.events.append]).value

    def count(self, name: str) -> int:
        file = self.folder / name
        return file.stat().st_size if file.exists() else 0

    def retries(self) -> list[str]:
        return [event.data["error_type"] for event in self.events if event.kind == "retry"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="class")
def cluster() -> Iterator[Any]:
    with rays.cluster(num_cpus=2) as made:
        yield made


@pytest.mark.usefixtures("cluster")
class TestOnACluster:
    """On two CPUs of one node, and on a second node that comes and goes."""

    def test_the_users_error_is_repeated_as_often_as_asked_and_shown_without_our_frames(self, bench: Bench) -> None:
        with pytest.raises(StepError, match=r"wrong\[0\]: ValueError: the table is empty") as caught:
            bench.run("wrong")
        assert bench.count("wrong") == 3 and bench.retries() == ["ValueError"] * 2
        text = caught.value.user_traceback
        files = [line.split('"')[1] for line in text.splitlines() if line.strip().startswith("File ")]
        assert {Path(file).name for file in files} == {"keeping_program.py"} and "KeyError: 'no such row'" in text
        assert text.endswith("ValueError: the table is empty\n")

    def test_a_system_fault_eats_no_retry_of_the_user(self, bench: Bench) -> None:
        assert bench.run("killed_then_wrong") == 5
        assert bench.retries() == ["NodeLost", "ValueError", "NodeLost", "ValueError"]

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ("exit", r"leaves\[0\]: SystemExit: the body called sys.exit\(3\)"),
            ("outrage", r"leaves\[0\]: Outrage: enough"),
            ("interrupt", r"leaves\[0\]: KeyboardInterrupt"),
        ],
    )
    def test_a_body_that_leaves_by_another_door_has_failed(self, bench: Bench, how: str, message: str) -> None:
        with pytest.raises(StepError, match=message):
            bench.run("leaves", how)
        assert bench.count(how) == 1

    def test_a_result_that_cannot_be_kept_names_the_place(self, bench: Bench) -> None:
        with pytest.raises(
            UserError, match=r"leaves\[0\]: the result\['models'\]\[0\] is a builtins.object, which cannot"
        ):
            bench.run("leaves", "unkeepable")
        assert bench.count("unkeepable") == 1

    def test_a_process_that_always_ends_itself_is_given_up(self, bench: Bench) -> None:
        with pytest.raises(NodeLost, match=r"leaves\[0\]: its worker process died"):
            bench.run("leaves", "os-exit", system_retries=1)
        assert bench.count("os-exit") == 2

    def test_much_output_is_kept_and_hurts_nobody(self, bench: Bench) -> None:
        assert bench.run("leaves", "noise") == "done"
        step = find_steps(load_run(bench.store, "leaves"), "leaves")[0]
        assert len(read_log(bench.store, "leaves", step.attempts[-1])) == 160 * ((1 << 16) + 1)

    def test_errors_in_a_bodys_own_actors(self, bench: Bench) -> None:
        with pytest.raises(StepError, match="cannot add 1") as caught:
            bench.run("broken_actor", "raises", run_id="a")
        assert bench.count("raises") == 1 and "keeping_program.py" in caught.value.user_traceback
        assert "site-packages/ray" not in caught.value.user_traceback
        with pytest.raises(StepError, match="no table to count"):
            bench.run("broken_actor", "init", run_id="b")
        assert bench.count("init") == 1, "its own __init__ is the user's code"
        assert bench.run("broken_actor", "dies", run_id="c") == 2
        assert bench.retries() == ["NodeLost"], "a lost process is the platform's"

    def test_a_timeout_ends_children_in_any_session_and_actors(self, bench: Bench) -> None:
        """On a slow machine the first attempts may be over before they have started everything."""
        assert bench.run("family") == "enough"
        (failure, *_) = [event.data for event in bench.events if event.kind == "retry"]
        assert failure["error_type"] == StepTimeout.__name__
        assert failure["error"].startswith("ran past its timeout of 5 s; its processes were killed (timeout= of")
        pids = [int(pid) for pid in (bench.folder / "pids").read_text().split()]
        wait_for(lambda: not any(map(lives, pids)), f"still alive of {pids} (worker, child, grandchild, actor)")

    def test_a_saved_state_lives_until_the_commit(self, bench: Bench) -> None:
        with pytest.raises(RuntimeError, match="error injected"):
            bench.run("resumes", faults="executor.before-commit:1=error")
        folder = bench.folder / "store" / "runs" / "resumes" / "state" / "resumes[0]"
        assert (folder / "seen").stat().st_size == 1, "the body had ended, its commit was never written"
        assert bench.run("resumes") == "2" and bench.count("resumes") == 2
        assert not folder.exists(), "committed: nobody goes on from it"

    def add_node(self, cluster: Any) -> Any:
        return cluster.add_node(num_cpus=3, object_store_memory=80 << 20)

    def lose(self, bench: Bench, cluster: Any, take: Callable[[Any], None], **settings: Any) -> list[str]:
        """Take the node away on which `away` is running; another one is there by then, and stays."""
        node = next(iter(cluster.worker_nodes), None) or self.add_node(cluster)
        cluster.wait_for_nodes()
        result: list[Any] = []
        errors: list[BaseException] = []

        def drive() -> None:
            try:
                result.append(bench.run("away", **settings))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=drive)
        thread.start()
        wait_for(lambda: bench.count("away") == 1, "the step did not start")
        take(node)
        thread.join(timeout=120)
        assert not thread.is_alive() and not errors, errors
        assert result == [2]
        return bench.retries()

    def test_a_preempted_node_is_told_from_a_lost_one(self, bench: Bench, cluster: Any) -> None:
        """The first of the two: nothing is scheduled on a drained node, but for seconds it is on a lost one."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        def take(node: Any) -> None:
            reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            deadline = int((time.time() + 1) * 1000)
            accepted, why = GcsClient(address=cluster.address).drain_node(node.node_id, reason, "reclaimed", deadline)
            assert accepted, why
            self.add_node(cluster)
            wait_for(lambda: time.time() * 1000 > deadline, "time stands still")
            cluster.remove_node(node, allow_graceful=False)

        assert self.lose(bench, cluster, take) == ["Preempted"]

    def test_a_lost_node_is_waited_for_and_the_step_repeated(self, bench: Bench, cluster: Any) -> None:
        def take(node: Any) -> None:
            cluster.remove_node(node, allow_graceful=False)
            wait_for(lambda: bench.retries(), "the loss was not seen")
            self.add_node(cluster)

        assert set(self.lose(bench, cluster, take, backoff_s=1.0)) == {"NodeLost"}


def test_a_step_that_always_runs_out_of_memory_ends_with_that(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's memory monitor, set to a little above what this machine uses now. If other processes take that first, the
    worker is killed before the body begins."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + (1 << 30)) / memory.total
    config = {"memory_usage_threshold": threshold, "memory_monitor_refresh_ms": 100}
    options = {"num_cpus": 2, "_system_config": config, "object_store_memory": 80 << 20}
    with pytest.raises(OutOfMemory, match=r"hungry\[0\]: killed for memory by Ray; give the step more \(memory=\)"):
        bench.run("hungry", 10_000, system_retries=1, ray_options=options)
    assert bench.retries() == ["OutOfMemory"]
    step = find_steps(load_run(bench.store, "hungry"), "hungry")[0]
    assert step.status == "failed" and step.error is not None and step.error["type"] == "OutOfMemory"
    assert issubclass(OutOfMemory, RecuaError) and os.getpid()
