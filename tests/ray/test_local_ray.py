"""The Ray that a run started dies: another one is started, and the run goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import local_ray_program as program
import pytest

from infra.processes import process_start
from infra.reaper import LOCAL_RAY, marked
from infra.storage import open_store
from workflows.runs.catalog import load_run
from workflows.runs.journal import lease_key

SERVERS = {
    "raylet": ("/raylet --",),
    "dashboard-agent": ("ray::DashboardAgent", "/dashboard/agent.py"),
    "gcs": ("/gcs_server --",),
    "runtime-env-agent": ("ray::RuntimeEnvAgent", "/runtime_env/agent/main.py"),
}
"""Phases of the run, and how the command line of the process begins that is killed in each. (An agent has another one
when its imports are done.)"""
SPARE = ("/dashboard/dashboard.py", "/monitor.py", "/log_monitor.py")
"""Servers that it does without."""


class Driver:
    """A process of the program, and what it prints."""

    def __init__(self, folder: Path, mark: str, **settings: Any) -> None:
        self.folder = folder
        self._mark = mark
        given = {"store": str(folder / "store"), "run_id": "r", "backoff_s": 0.01, "lease_s": 3, **settings}
        given["ray_options"] = {"num_cpus": 2, "object_store_memory": 80 << 20}
        command = [sys.executable, program.__file__, json.dumps(given), str(folder)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, start_new_session=True, **pipes)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def bodies(self, phase: str) -> list[str]:
        """The mark of the local Ray that each body of a phase began on."""
        file = self.folder / f"begun-{phase}"
        return file.read_text().split() if file.exists() else []

    def wait(self, condition: Callable[[], Any], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it ended: {self.said()}"
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def kill(self, phase: str, server: str, number: int = signal.SIGKILL) -> set[tuple[int, str | None]]:
        """A signal to one process of the Ray that a phase runs on; returns all of that Ray's, and when each started.

        Ray's agents lose their environment, and the mark with it, when they take a name: they are the raylet's.
        """
        there = marked(f"{LOCAL_RAY}={self.bodies(phase)[-1]}")
        (raylet,) = [pid for pid in there if SERVERS["raylet"][0] in _command(pid)]
        there = list({*there, *(int(each.name) for each in Path("/proc").glob("[0-9]*") if _parent(each) == raylet)})
        assert not [pid for pid in there if any(part in _command(pid) for part in SPARE)]
        (pid,) = [pid for pid in there if any(part in _command(pid) for part in SERVERS[server])]
        processes = {(each, process_start(each)) for each in there}
        os.kill(pid, number)
        return processes

    def end(self) -> str:
        self.process.wait(timeout=180)
        self._reader.join(timeout=60)
        return self.said()

    def said(self) -> str:
        return "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:300]
    except OSError:
        return ""


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


Start = Callable[..., Driver]


@pytest.fixture
def start(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a driver; nothing of it may be left at the end."""
    mark = f"RECUA_TEST_MARK={uuid.uuid4().hex}"
    monkeypatch.setenv(*mark.split("="))
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    drivers: list[Driver] = []

    def launch(**settings: Any) -> Driver:
        drivers.append(Driver(tmp_path, mark, **settings))
        return drivers[-1]

    yield launch
    for driver in drivers:
        driver.process.kill()
        driver.process.wait()
    deadline = time.monotonic() + 60
    while left := [_command(pid)[:80] for pid in marked(mark)]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


def test_a_run_survives_the_loss_of_each_of_its_local_rays_servers(start: Start, tmp_path: Path) -> None:
    """One driver, four times another Ray; the fifth loss is one too many, and the next driver goes on."""
    names = [*SERVERS, "once-too-often"]
    driver = start(names=names, local_ray_restarts=len(SERVERS))
    store = open_store(tmp_path / "store")

    def beats() -> int:
        raw = store.get(lease_key("r", 1))
        return int(json.loads(raw)["beat"]) if raw else 0

    for server in SERVERS:
        driver.wait(lambda server=server: driver.bodies(server))  # type: ignore[misc]
        before = beats()
        old = driver.kill(server, server)
        driver.wait(lambda server=server: len(driver.bodies(server)) == 2)  # type: ignore[misc]
        assert beats() > before, "the lease was kept alive meanwhile"
        first, second = driver.bodies(server)
        assert first != second
        driver.wait(lambda old=old: not any(process_start(pid) == began for pid, began in old))  # type: ignore[misc]
        (tmp_path / f"go-{server}").touch()
    driver.wait(lambda: driver.bodies("once-too-often"))
    driver.kill("once-too-often", "raylet")
    output = driver.end()
    assert driver.process.returncode == 1
    told = [line for line in output.splitlines() if line.startswith("warning")]
    assert [line.partition("(start ")[2] for line in told] == [f"{n} of local_ray_restarts=4)" for n in range(1, 5)]
    assert "(its GCS was killed by SIGKILL); starting another one" in told[2]
    last = output.splitlines()[-1]
    assert last.startswith("SystemFault: the local Ray of this run is gone (its raylet was killed by SIGKILL), and ")
    assert "local_ray_restarts=4 allows no further restart" in last and "run it again to resume" in last
    assert "no single node" not in output and "Traceback" not in output, output

    (tmp_path / "go-once-too-often").touch()
    assert start(names=names).end().splitlines()[-1] == str(program.expected(names))
    run = load_run(store, "r")
    assert run.status == "finished" and run.drivers == 2
    commits = Counter(record["call"] for record in journal(tmp_path) if record["type"] == "commit")
    assert len(commits) == 4 * len(names) and set(commits.values()) == {1}
    assert [len(driver.bodies(name)) for name in names] == [2, 2, 2, 2, 2]
    squares = (tmp_path / "squares").read_text().split()
    assert len(squares) == len(set(squares)) == 3 * len(names), "what was committed did not run again"


@pytest.mark.long
def test_a_run_survives_a_raylet_and_a_gcs_that_stay_stopped(start: Start, tmp_path: Path) -> None:
    """While a step runs that asks Ray for nothing: nobody else would notice."""
    names = ["raylet", "gcs"]
    driver = start(names=names)
    for server in names:
        driver.wait(lambda server=server: driver.bodies(server))  # type: ignore[misc]
        old = driver.kill(server, server, signal.SIGSTOP)
        driver.wait(lambda server=server: len(driver.bodies(server)) == 2)  # type: ignore[misc]
        driver.wait(lambda old=old: not any(process_start(pid) == began for pid, began in old))  # type: ignore[misc]
        (tmp_path / f"go-{server}").touch()
    output = driver.end()
    assert output.splitlines()[-1] == str(program.expected(names))
    assert "gone (its raylet has been stopped for 15 s); starting another one" in output
    assert "gone (its GCS has been stopped for 15 s); starting another one" in output


@pytest.mark.long
def test_an_interrupt_while_another_ray_is_started_leaves_nothing_behind(start: Start) -> None:
    """To the whole process group, as a terminal's Ctrl-C."""
    driver = start(names=["only"])
    driver.wait(lambda: driver.bodies("only"))
    old = driver.kill("only", "raylet")
    driver.wait(lambda: "starting another one" in driver.said())
    os.killpg(driver.process.pid, signal.SIGINT)
    output = driver.end()
    assert driver.process.returncode != 0 and output.splitlines()[-1] == "KeyboardInterrupt", output
    assert len(driver.bodies("only")) == 1
    assert not any(process_start(pid) == began for pid, began in old)


def journal(folder: Path) -> list[dict[str, Any]]:
    """Every record of the run's journal."""
    files = sorted((folder / "store" / "runs" / "r" / "journal").iterdir())
    return [record for file in files for record in json.loads(file.read_bytes())["records"]]
