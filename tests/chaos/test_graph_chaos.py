"""Drivers that are killed, stopped, doubled and interrupted: real processes, real Ray."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from infra.storage import Store, open_store
from workflows.graph.values import digest
from workflows.runs.catalog import load_run

PROGRAM = Path(__file__).with_name("graph_chaos_program.py")
POINTS = [
    "executor.between-steps:2",
    "executor.body:1",
    "artifact.upload:1",
    "executor.before-commit:1",
    "executor.after-commit:1",
    "executor.between-steps:5",
    "executor.body:2",
    "artifact.upload:2",
    "executor.before-commit:2",
    "executor.after-commit:1",
]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """In the environment of every process that a test's drivers start, whatever session or parent it has."""
    value = f"recua-test-{uuid.uuid4().hex}"
    monkeypatch.setenv("RECUA_TEST_MARK", value)
    return value


@pytest.fixture
def start(mark: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a driver: `start(store_url, folder="", **settings)`."""
    monkeypatch.setenv("PYTHONPATH", str(repository))
    drivers: list[subprocess.Popen[str]] = []

    def launch(store: str, folder: str = "", **settings: Any) -> subprocess.Popen[str]:
        given = {"store": store, "ray_options": {"num_cpus": 2}, "backoff_s": 0.01, "run_id": "r", **settings}
        command = [sys.executable, str(PROGRAM), json.dumps(given), folder]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        driver = subprocess.Popen(command, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]
        drivers.append(driver)
        return driver

    yield launch
    for driver in drivers:
        if driver.poll() is None:
            driver.kill()
        driver.communicate()
    # Ray's own processes take about 12 s to notice that the driver which started them was killed, longer under load.
    wait_for(lambda: not marked(mark), lambda: f"left behind: {marked(mark)}")


def marked(mark: str) -> list[str]:
    """Living processes that carry the mark, this one apart."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mine = f"RECUA_TEST_MARK={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if mine and int(folder.name) != os.getpid():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80])
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], Any], what: str | Callable[[], str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.05)


def commits(store: Store) -> list[dict[str, Any]]:
    found = []
    for key in store.list("runs/r/journal"):
        raw = store.get(key)
        assert raw is not None
        found += [record for record in json.loads(raw)["records"] if record["type"] == "commit"]
    return found


def survive(start: Start, url: str, expected: str, points: Sequence[str] = POINTS, **settings: Any) -> None:
    """Kill the driver at each of `points` in turn, run again each time, and compare with the run that had no faults."""
    store = open_store(url)
    seen: dict[str, str] = {}
    for point in points:
        driver = start(url, faults=f"{point}=kill", **settings)
        output, _ = driver.communicate(timeout=180)
        assert driver.returncode == -signal.SIGKILL, f"{point} was not reached: {output}"
        now = {record["call"]: digest(record["result"]) for record in commits(store)}
        assert seen.items() <= now.items(), f"a committed result changed after {point}"
        seen = now
    assert 0 < len(seen) < 12, "the kills came in the middle of the run"
    driver = start(url, **settings)
    output, _ = driver.communicate(timeout=180)
    assert driver.returncode == 0, output
    assert output.splitlines()[-1] == expected
    records = commits(store)
    assert max(Counter(record["call"] for record in records).values()) == 1
    assert len(records) == 12 and seen.items() <= {r["call"]: digest(r["result"]) for r in records}.items()
    run = load_run(store, "r")
    assert run.status == "finished" and run.drivers == len(points) + 1


@pytest.fixture(scope="module")
def cluster(s3_endpoint: str) -> Iterator[str]:
    """A cluster that outlives its drivers, as a job's does; its nodes have credentials of their own."""
    import ray

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", s3_endpoint)
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        node = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield node.address_info["gcs_address"]
    ray.shutdown()


def fault_free(start: Start, url: str, **settings: Any) -> str:
    driver = start(url, **settings)
    output, _ = driver.communicate(timeout=180)
    assert driver.returncode == 0, output
    return str(output.splitlines()[-1])


def test_five_driver_kills_on_a_folder_with_a_local_ray(start: Start, tmp_path: Path) -> None:
    """Its Ray goes with each driver, and comes again with the next one, which takes seconds."""
    expected = fault_free(start, str(tmp_path / "quiet"))
    survive(start, str(tmp_path / "store"), expected, POINTS[::2])


def test_ten_driver_kills_on_s3_with_a_shared_cluster(start: Start, s3_url: str, tmp_path: Path, cluster: str) -> None:
    settings = {"ray_address": cluster, "cache": str(tmp_path / "cache")}
    expected = fault_free(start, f"{s3_url}/quiet", **settings)
    survive(start, f"{s3_url}/store", expected, **settings)


def test_a_second_driver_of_a_run_is_refused(start: Start, tmp_path: Path, cluster: str) -> None:
    url = str(tmp_path / "store")
    first = start(url, str(tmp_path), ray_address=cluster, lease_s=5)
    wait_for((tmp_path / "begun").exists, "the first driver did not begin")
    second = start(url, str(tmp_path), ray_address=cluster)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 3 and f"being driven by process {first.pid}" in output
    (tmp_path / "go").touch()
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0 and output.splitlines()[-1] == '"went"'


def test_a_driver_that_slept_past_its_lease_is_fenced(start: Start, tmp_path: Path, cluster: str) -> None:
    url = str(tmp_path / "store")
    sleeper = start(url, str(tmp_path), ray_address=cluster, lease_s=2)
    wait_for((tmp_path / "begun").exists, "the first driver did not begin")
    os.kill(sleeper.pid, signal.SIGSTOP)
    # After its own lease's time it would kill the sleeper, if no worker had come yet (see the next test).
    successor = start(url, str(tmp_path), ray_address=cluster, lease_s=120)
    wait_for(lambda: len((tmp_path / "begun").read_text().split()) == 2, "the second driver did not take over")
    (tmp_path / "go").touch()
    output, _ = successor.communicate(timeout=120)
    assert successor.returncode == 0, output
    before = commits(open_store(url))
    os.kill(sleeper.pid, signal.SIGCONT)
    output, _ = sleeper.communicate(timeout=120)
    assert sleeper.returncode == 3 and "FencedError" in output and "another driver has taken over" in output, output
    assert commits(open_store(url)) == before
    assert load_run(open_store(url), "r").status == "finished"
    hooks = (tmp_path / "hooks").read_text().split()
    assert hooks == [str(successor.pid)], "what the run has on the cluster is not the sleeper's to take down"


def test_a_stopped_driver_does_not_keep_the_clusters_workers_from_its_successor(
    start: Start, tmp_path: Path, cluster: str
) -> None:
    url = str(tmp_path / "store")
    sleeper = start(url, str(tmp_path), ray_address=cluster, lease_s=2, twice=True)
    begun = tmp_path / "begun"
    wait_for(lambda: begun.exists() and len(begun.read_text().split()) == 2, "the first driver did not begin")
    os.kill(sleeper.pid, signal.SIGSTOP)
    (tmp_path / "go").touch()
    successor = start(url, str(tmp_path), ray_address=cluster, lease_s=2, twice=True)
    output, _ = successor.communicate(timeout=120)
    assert successor.returncode == 0, output
    sleeper.communicate(timeout=60)
    assert sleeper.returncode == -signal.SIGKILL


def test_an_interrupted_run_leaves_no_process_and_goes_on(start: Start, tmp_path: Path, mark: str) -> None:
    """Interrupted, then told to end, then left alone."""
    url, begun = str(tmp_path / "store"), tmp_path / "begun"
    for number in (signal.SIGINT, signal.SIGTERM):
        begun.unlink(missing_ok=True)
        driver = start(url, str(tmp_path))
        wait_for(begun.exists, "the run did not begin")
        os.killpg(driver.pid, number)
        driver.communicate(timeout=120)
        assert driver.returncode != 0
        wait_for(lambda: not marked(mark), lambda: f"left behind: {marked(mark)}")
        run = load_run(open_store(url), "r")
        assert run.status == "cancelled" and [step.status for step in run.steps] == ["committed", "interrupted"]
    (tmp_path / "go").touch()
    again = start(url, str(tmp_path))
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and output.splitlines()[-1] == '"went"'
    assert load_run(open_store(url), "r").drivers == 3
