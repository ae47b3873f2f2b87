"""The supervisor with real driver processes. The workflows make no step calls, so no Ray is started."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.errors import UserError
from infra.processes import process_start
from infra.storage import open_store
from workflows.runs.catalog import load_run, submission_key
from workflows.runs.journal import Journal, lease_key, read_journal
from workflows.service.drivers import driver_process, packages, records, supervisor
from workflows.service.drivers.driver_process import CLUSTER_GONE, Watch
from workflows.service.drivers.processes import Process
from workflows.service.drivers.supervisor import Supervisor
from workflows.service.schemas import Submission

FLOW = """
import os, signal, time
from pathlib import Path
from lib import SUFFIX
from workflows.graph import workflow

@workflow
def toy(folder: str, deadly: int = 0) -> str:
    with (Path(folder) / "drivers").open("a") as stream:
        stream.write(f"{os.getpid()}\\n")
    print("driver", os.getpid(), flush=True)
    if len((Path(folder) / "drivers").read_text().split()) <= deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    while not (Path(folder) / "go").exists():
        time.sleep(0.02)
    if (Path(folder) / "go").read_text() == "fail":
        raise ValueError("no good")
    return "done" + SUFFIX

def preflight(folder, deadly=0):
    from infra.errors import ResourceError
    if deadly < 0:
        raise ResourceError("deadly: must not be negative")
"""


class Service:
    """A supervisor over a store, with a package that has been sent."""

    def __init__(self, folder: Path) -> None:
        self.trace = folder / "trace"
        self.trace.mkdir()
        code = folder / "code"
        code.mkdir()
        (code / "flow.py").write_text(FLOW)
        (code / "lib.py").write_text("SUFFIX = '!'\n")
        self.store = open_store(folder / "store")
        package = packages.build(code, folder / "p.zip")
        self.store.upload_file(packages.package_key(package.sha256), package.file)
        self.package, self.folder = package.sha256, folder / "drivers"
        self.supervisor = self.make()

    def make(self) -> Supervisor:
        return Supervisor(self.store, "127.0.0.1:1", self.folder, lambda: [{"CPU": 2.0}], period_s=0.05)

    def submit(self, **given: Any) -> dict[str, Any]:
        overrides = [f"folder={self.trace}", *given.pop("overrides", [])]
        body = {"package": self.package, "workflow_file": "flow.py", "overrides": overrides}
        return self.supervisor.submit(Submission(**{**body, "run_id": "r", **given}))

    def drivers(self) -> list[int]:
        file = self.trace / "drivers"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def status(self) -> str:
        return load_run(self.store, "r").status

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.05)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(supervisor, "SYNC_PERIOD_S", 0.2)
    monkeypatch.setattr(supervisor, "BEAT_PERIOD_S", 0.2)
    service = Service(tmp_path)
    service.supervisor.start()
    yield service
    service.supervisor.close()
    for pid in service.drivers():
        assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()


def test_service_drives_a_submitted_run_from_the_store_alone(service: Service) -> None:
    assert service.submit() == {"run_id": "r", "status": "submitted"}
    service.wait(service.drivers, "no driver")
    submission = records.read_submission(service.store, "r")
    assert submission["package"] == service.package and submission["overrides"] == [f"folder={service.trace}"]
    assert service.submit()["status"] == "running" and len(service.drivers()) == 1, "no second driver"
    (service.trace / "go").touch()
    service.wait(lambda: not service.supervisor.active(), "the run did not end")
    run = load_run(service.store, "r")
    assert run.status == "finished" and run.result == "done!"
    assert f"driver {service.drivers()[0]}" in (service.store.get("runs/r/driver/000001.log") or b"").decode()
    assert list(service.folder.iterdir()) == [] and records.active_runs(service.store) == []
    assert service.submit()["status"] == "finished" and len(service.drivers()) == 1


def test_service_refuses_what_run_refuses_in_the_same_words(service: Service) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"overrides": ["y=1"]}, "--set: unknown setting y; known: deadly, folder"),
        ({"overrides": ["deadly=-1"]}, "deadly: must not be negative"),
        ({"recipe": 'x = "', "recipe_name": "recipes/a.toml"}, "recipe recipes/a.toml: not valid TOML"),
        ({"workflow_file": "nope.py"}, "workflow nope.py: no such Python file"),
        ({"workflow_file": "lib.py"}, "expected one @workflow function, found none"),
        ({"workflow_file": "flow.py:other"}, "the file defines no @workflow function of that name; it has toy"),
        ({"workflow_file": "flow.py:toy", "overrides": ["deadly=x"]}, "--set: deadly: Input should be a valid integer"),
        ({"recipe": {"deadly": "x"}}, "recipe: deadly: Input should be a valid integer"),
        ({"run_id": "a/b"}, "use letters, digits, dot, dash and underscore"),
        ({"package": "0" * 64}, "package 000000000000 is not in the store"),
    ]
    for given, message in cases:
        with pytest.raises(UserError) as refused:
            service.submit(**given)
        assert message in str(refused.value)
    assert not service.supervisor.active() and list(service.store.folders("runs")) == []


def test_service_starts_a_dead_driver_again_and_adopts_a_living_one(service: Service) -> None:
    service.submit(overrides=["deadly=1"])
    service.wait(lambda: len(service.drivers()) == 2, "the killed driver was not started again")
    service.wait(lambda: service.status() == "running", "the second driver has the lease")
    service.supervisor._stop.set()  # as if the service's process were killed: the driver lives on
    first, service.supervisor = service.supervisor, service.make()
    first._thread.join()
    assert service.supervisor.start() == ["r"]
    (service.trace / "go").touch()
    service.wait(lambda: not service.supervisor.active(), "the run did not end")
    assert service.status() == "finished" and len(service.drivers()) == 2, "adopted, not doubled"


def test_service_gives_a_driver_up_that_dies_at_once_again_and_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(supervisor, "QUICK_DEATHS", 2)
    service.submit(overrides=["deadly=99"])
    service.wait(lambda: not service.supervisor.active(), "it was not given up")
    run = load_run(service.store, "r")
    assert run.status == "failed" and run.error is not None and len(service.drivers()) == 2
    assert "died 2 times" in run.error["message"] and f"driver {service.drivers()[1]}" in run.error["traceback"]
    monkeypatch.setattr(supervisor, "QUICK_DEATHS", 1000)
    assert service.supervisor.resume("r") == "submitted", "it can be tried again"
    service.wait(lambda: len(service.drivers()) > 2, "no new driver")
    assert service.supervisor.cancel("r") in ("interrupted", "failed", "cancelling")
    service.wait(lambda: not service.supervisor.active(), "it was not cancelled")
    assert service.status() == "cancelled"


def test_service_resumes_what_failed_and_cancels_what_runs(service: Service) -> None:
    (service.trace / "go").write_text("fail")
    service.submit()
    service.wait(lambda: not service.supervisor.active(), "the run did not end")
    assert service.status() == "failed" and len(service.drivers()) == 1, "the workflow's own error is not repeated"
    (service.trace / "go").unlink()
    assert service.supervisor.resume("r") == "submitted"
    service.wait(lambda: service.status() == "running", "it was not resumed")
    assert service.supervisor.cancel("r") == "cancelling"
    (service.trace / "go").touch()  # the body waits for nothing that a cancellation could interrupt
    service.wait(lambda: not service.supervisor.active(), "the run did not end")
    with pytest.raises(UserError, match="no run 'nope'"):
        service.supervisor.cancel("nope")
    service.store.put("runs/other/run.json", b"{}")
    with pytest.raises(UserError, match="not submitted to a service; resume it with `recua resume other`"):
        service.supervisor.resume("other")


def test_service_finds_active_runs_of_another_and_forgets_withdrawn_ones(service: Service) -> None:
    service.submit()
    service.wait(lambda: service.status() == "running" and service.drivers(), "no driver")  # in the workflow itself
    assert service.supervisor.close() == ["r"] and records.active_runs(service.store) == ["r"]
    service.wait(lambda: service.status() == "interrupted", "its driver was stopped")
    service.supervisor = service.make()
    assert service.supervisor.start() == ["r"]
    service.wait(lambda: service.status() == "running" and len(service.drivers()) == 2, "it was not continued")
    os.kill(service.drivers()[1], signal.SIGKILL)
    records.deactivate(service.store, "r")  # `recua cancel` on another machine, while no driver lives
    service.wait(lambda: not service.supervisor.active(), "it was not let go")
    assert service.status() == "cancelled"


def test_service_goes_on_with_a_run_whose_driver_was_told_to_end(service: Service) -> None:
    """SIGTERM comes to all processes of a machine that is shut down; `recua cancel` goes through the store."""
    service.submit()
    service.wait(lambda: service.status() == "running" and service.drivers(), "no driver")
    os.kill(service.drivers()[0], signal.SIGTERM)
    service.wait(lambda: service.status() == "running" and len(service.drivers()) == 2, "it was not continued")
    (service.trace / "go").touch()
    service.wait(lambda: not service.supervisor.active(), "the run did not end")
    assert service.status() == "finished"
    assert "SIGTERM ends this driver" in (service.store.get("runs/r/driver/000001.log") or b"").decode()


def test_service_leaves_a_driver_alone_that_somebody_started_in_a_terminal(service: Service) -> None:
    service.submit()
    service.wait(lambda: service.status() == "running" and service.drivers(), "no driver")
    service.supervisor.close()
    service.wait(lambda: service.status() == "interrupted", "its driver was stopped")
    store, root = service.store.url, Path(__file__).parents[3]
    script = f"""
import time
from infra.storage import open_store
from workflows.runs.journal import Heartbeat, Journal
beat = Heartbeat(Journal.acquire(open_store({store!r}), "r"), lambda: None, lambda error: None)
print("drives", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root) as theirs:
        try:
            assert theirs.stdout is not None and theirs.stdout.readline() == b"drives\n"
            service.supervisor = service.make()
            assert service.supervisor.start() == ["r"]

            def watched() -> bool:
                process = service.supervisor._runs["r"].process
                return process is not None and process.pid == theirs.pid

            service.wait(watched, "it is not seen")
            assert service.supervisor.close() == ["r"]
            assert theirs.poll() is None and len(service.drivers()) == 1
        finally:
            theirs.kill()


def test_service_never_doubles_a_driver_of_another_machine(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workflows.runs.journal.this_machine", lambda: "elsewhere/1")
    store = service.store
    records_of = {"format": 1, "run_id": "r", "workflow": "flow:toy", "created": 1.0, "reuse": True, "rerun": []}
    store.put("runs/r/run.json", json.dumps({**records_of, "recipe": {}, "recipe_hash": "h"}).encode())
    journal = Journal.acquire(store, "r", ttl_s=1.0)
    monkeypatch.undo()
    body = {"package": service.package, "workflow_file": "flow.py", "overrides": [f"folder={service.trace}"]}
    store.put(submission_key("r"), json.dumps({**body, "recipe": None, "recipe_name": "", "run_id": "r"}).encode())
    records.activate(store, "r", 0)
    begun: list[int] = []
    monkeypatch.setattr(supervisor.processes, "start", lambda *given: begun.append(1))
    looking = service.make()
    looking._sync()
    driven = looking._runs["r"]
    for beat in range(15):
        store.put(lease_key("r", journal.lease_slot), str(beat).encode())
        driven.not_before = 0.0
        looking._look(driven)
        time.sleep(0.1)
    assert not begun, "its heart beats"
    deadline = time.monotonic() + 60
    with pytest.raises(AttributeError):  # our start() gives no process: it was called
        while time.monotonic() < deadline:
            driven.not_before = 0.0
            looking._look(driven)
            time.sleep(0.05)
    assert begun == [1] and read_journal(store, "r").drivers == 1


def test_service_driver_ends_when_its_cluster_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_process, "WATCH_PERIOD_S", 0.01)
    monkeypatch.setattr(driver_process, "GCS_PATIENCE_S", 0.2)
    head = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{head.getsockname()[1]}"
    ends: list[int] = []
    raylet = subprocess.Popen(["sleep", "600"])
    found = Process(raylet.pid, process_start(raylet.pid) or "")
    monkeypatch.setattr(driver_process, "own_raylet", lambda: found)
    Watch(address, end=ends.append).start()
    time.sleep(0.3)
    assert not ends, "both are there"
    raylet.kill()
    raylet.wait()
    deadline = time.monotonic() + 60
    while not ends:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ends == [CLUSTER_GONE]
    monkeypatch.setattr(driver_process, "own_raylet", lambda: None)
    Watch(address, end=ends.append).start()
    time.sleep(0.3)
    assert len(ends) == 1, "the head answers"
    head.close()
    while len(ends) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
