"""A killed driver with a local Ray: what it leaves behind, and what the next one finds."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keeping_program as program
import pytest

from infra.processes import process_start
from infra.reaper import LOCAL_RAY, marked
from workflows.driver import session
from workflows.driver.settings import RunSettings

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """In the environment of every process that a driver starts, whatever session or parent it has."""
    value = uuid.uuid4().hex
    monkeypatch.setenv("RECUA_TEST_MARK", value)
    return f"RECUA_TEST_MARK={value}"


@pytest.fixture
def start(mark: str, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a driver of one step with a Ray of its own: `start(name, **settings)`."""
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    drivers: list[subprocess.Popen[str]] = []

    def launch(name: str, **settings: Any) -> subprocess.Popen[str]:
        options = {"num_cpus": 1, "object_store_memory": 80 << 20}
        given = {"store": str(tmp_path / "store"), "run_id": name, "ray_options": options, **settings}
        command = [sys.executable, program.__file__, json.dumps(given), name, str(tmp_path)]
        drivers.append(subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return drivers[-1]

    yield launch
    for driver in drivers:
        driver.kill()
        driver.wait()


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def guardian(driver: int) -> int:
    """The process beside a driver that ends its Ray."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if any(part.startswith(f"{LOCAL_RAY}=") for part in command) and str(driver) in command:
            return int(folder.name)
    raise AssertionError(f"driver {driver} has no guardian")


def test_a_killed_driver_leaves_no_process_of_its_local_ray(start: Start, mark: str, tmp_path: Path) -> None:
    driver = start("leaves_an_orphan")
    wait_for((tmp_path / "orphan").exists, "the step did not start", seconds=150)
    orphan = int((tmp_path / "orphan").read_text())
    watching = guardian(driver.pid)
    assert {driver.pid, orphan, watching} <= set(marked(mark))
    os.kill(driver.pid, signal.SIGKILL)
    wait_for(lambda: not marked(mark), "something was left behind")
    wait_for(lambda: process_start(watching) is None, "the guardian stayed")
    output, _ = driver.communicate()
    assert "Traceback" not in output, output


def test_the_next_driver_removes_the_state_of_a_call_that_was_committed(start: Start, tmp_path: Path) -> None:
    driver = start("resumes", faults="executor.after-commit:1=kill")
    output, _ = driver.communicate(timeout=150)
    assert driver.returncode == -signal.SIGKILL, output
    state = tmp_path / "store" / "runs" / "resumes" / "state" / "resumes[0]"
    assert (state / "seen").exists(), "it died between the commit and the removal"
    settings = RunSettings(store=str(tmp_path / "store"), run_id="resumes")
    result = session.run(program.one, "resumes", str(tmp_path), settings=settings)
    assert result.value == "1" and not result.already_finished
    assert (tmp_path / "resumes").stat().st_size == 1, "committed: its body did not run again"
    assert not state.exists()
