"""The graph service as its users have it: up, submit, watch, kill anything, down. Its own HOME, store and Ray head."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.storage import open_store
from tests.helpers.ports import free_ports
from workflows.runs.catalog import load_run

FLOW = """
import time
from pathlib import Path
from helpers.words import shout
from workflows.graph import context, step, workflow
from workflows.graph import approval

@step(num_cpus=0.5)
def first(folder: str) -> dict:
    with (Path(folder) / "trace").open("a") as trace:
        trace.write("first\\n")
    return {"text": shout("one"), "code": __file__}

@step(num_cpus=0.5)
def second(folder: str, made: dict) -> str:
    context().progress(1, 2, loss=0.5)
    with (Path(folder) / "begun").open("a") as begun:
        begun.write("x")
    while not (Path(folder) / "go").exists():
        time.sleep(0.05)
    return made["text"]

@workflow
def toy(folder: str, ask: bool = False) -> dict:
    made = first(folder)
    if ask:
        approval("ship", "Ship it?").result()
    return {"said": second(folder, made).result(), "code": made.result()["code"]}
"""


class User:
    """Somebody with a home, a project, and the command line."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.home, self.project = folder / "home", folder / "project"
        self.home.mkdir()
        (self.project / "helpers").mkdir(parents=True)
        (self.project / "helpers" / "__init__.py").touch()
        (self.project / "helpers" / "words.py").write_text("def shout(word):\n    return word.upper()\n")
        (self.project / "flow.py").write_text(FLOW)
        self.store = open_store(self.home / ".recua" / "store")
        (self.port,) = free_ports(1)
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "RECUA_")) or name == "RAY_USAGE_STATS_ENABLED"
        }
        self.environment |= {"HOME": str(self.home), "PYTHONPATH": str(repository), "RECUA_TEST_MARK": self.mark}

    def recua(self, *arguments: str, code: int | None = 0) -> str:
        done = self.start(*arguments)
        output = done.communicate(timeout=240)[0]
        assert code is None or done.returncode == code, output
        return output

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "workflows.cli", *arguments]
        streams: Any = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        return subprocess.Popen(command, cwd=self.project, env=self.environment, **streams)

    def up(self, *options: str, code: int | None = 0) -> str:
        return self.recua("up", "--port", str(self.port), *options, code=code)

    def token(self) -> str:
        return (self.home / ".recua" / "token").read_text().strip()

    def get(self, path: str, token: str | None = None, body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {token or self.token()}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def processes(self) -> dict[int, str]:
        """Living processes of this test, by command line."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"RECUA_TEST_MARK={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def pids(self, text: str) -> list[int]:
        return [pid for pid, line in self.processes().items() if text in line]

    def kill(self, *pids: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[User]:
    user = User(tmp_path_factory.mktemp("service"), repository)
    yield user
    record = user.home / ".recua" / "service.json"
    folder = (json.loads(record.read_text()).get("head") or {}).get("folder") if record.exists() else None
    deadline = time.monotonic() + 30
    while (left := user.processes()) and time.monotonic() < deadline:
        user.kill(*left)
        time.sleep(0.1)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    folder = tmp_path / "trace"
    folder.mkdir()
    return folder


def begun(trace: Path) -> int:
    file = trace / "begun"
    return len(file.read_text()) if file.exists() else 0


def submit(user: User, trace: Path, run_id: str, *options: str) -> None:
    output = user.recua("run", "flow.py", "--set", f"folder={trace}", "--run", run_id, "--detach", *options)
    assert f"recua watch {run_id}" in output


def test_service_survives_the_loss_of_everything(user: User, trace: Path) -> None:
    """Its own process, a driver, and then the whole head node are killed in the middle of a run."""
    output = user.up()
    token = user.token()
    assert f"http://127.0.0.1:{user.port}/#token={token}" in output and "starting a Ray head" in output
    assert "up already" in user.up(), "the second time it is only shown"

    submit(user, trace, "r")
    wait_for(lambda: begun(trace) == 1, "the run never came to its second step")
    watching = user.start("watch", "r")
    assert watching.stdout is not None and "run r of flow:toy" in watching.stdout.readline()
    wait_for(lambda: user.get("/api/v1/runs/r/metrics")["events"], "no metrics while it runs")
    drivers = user.pids("driver_process run")
    assert len(drivers) == 1

    user.kill(*user.pids("ray::RecuaService"))
    wait_for(lambda: answers(user), "the service was not started again")
    assert user.get("/api/v1/service")["active"] == ["r"] and user.pids("driver_process run") == drivers, "adopted"

    user.kill(*drivers)
    wait_for(lambda: begun(trace) == 2, "the driver was not started again")
    assert len(user.pids("driver_process run")) == 1

    head = json.loads((user.home / ".recua" / "service.json").read_text())["head"]
    everything = [pid for pid in user.processes() if pid != watching.pid]
    assert len(everything) > 5 and head["pid"] in everything
    user.kill(*everything)
    wait_for(lambda: set(user.processes()) <= {watching.pid}, "something survived a SIGKILL")
    assert load_run(user.store, "r").status == "interrupted"
    assert "it resumes 1 unfinished runs: r" in user.up()
    assert json.loads((user.home / ".recua" / "service.json").read_text())["head"]["mark"] != head["mark"]
    wait_for(lambda: begun(trace) == 3, "the new head did not go on with the run")
    (trace / "go").touch()
    shown = watching.communicate(timeout=120)[0]
    assert watching.returncode == 0, shown
    assert "waiting for it" in shown and "run finished" in shown and "second[0] committed" in shown, shown

    run = load_run(user.store, "r")
    assert run.status == "finished" and run.drivers == 3 and run.result["said"] == "ONE"
    assert (trace / "trace").read_text().split() == ["first"], "a committed step ran once only"
    assert "working_dir_files" in run.result["code"], "the code came through Ray, as on any other node"
    recorded = [key.rpartition("/")[2][:8] for key in user.store.list("runs/r/history")]
    assert len(recorded) >= 2 and "loss 0.5" in shown, "metrics of the first driver and of the last one"

    again = user.recua("run", "flow.py", "--set", f"folder={trace}", "--run", "same")
    same = load_run(user.store, "same")
    assert {step.status for step in same.steps} == {"reused"}, f"content keys are those of `recua run`: {again}"
    kept = [file for file in user.store.local_path("").rglob("*") if file.is_file()]  # type: ignore[union-attr]
    leaks = [file for file in kept if token.encode() in file.read_bytes()]
    leaks += [
        file
        for file in Path(head_folder(user)).rglob("*")
        if file.is_file() and token in file.read_text(errors="replace")
    ]
    assert not leaks, "the token is in no log and not in the store"


def head_folder(user: User) -> str:
    return str(json.loads((user.home / ".recua" / "service.json").read_text())["head"]["folder"])


def answers(user: User) -> bool:
    try:
        return bool(user.get("/healthz")["status"] == "ok")
    except OSError:
        return False


def test_service_on_s3_refuses_asks_cancels_and_goes_down(user: User, trace: Path, s3_url: str) -> None:
    user.environment |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    user.recua("down", code=None)
    with socket.create_server(("127.0.0.1", user.port)):
        taken = f"recua: error: --port: cannot listen on 127.0.0.1:{user.port}: "
        assert user.up(code=2).startswith(taken)
    assert not user.processes()
    assert f"runs in {s3_url}" in user.up("--store", s3_url)
    store = open_store(s3_url)
    refused = user.recua("run", "flow.py", "--set", "folders=1", "--detach", code=2)
    local = user.recua("run", "flow.py", "--set", "folders=1", code=2)
    assert refused == local and "unknown setting folders; did you mean folder?" in refused
    for token in ("wrong", user.token()[:-1]):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            user.get("/api/v1/runs", token=token)

    submit(user, trace, "stopped", "--set", "ask=true")
    shutil.rmtree(user.project / "helpers")
    (user.project / "flow.py").unlink()  # all that the run needs is in the store from here on
    asks = "/api/v1/runs/stopped/steps"
    wait_for(lambda: "waiting-for-approval" in str(user.get(asks)), "the run never asked")
    user.get("/api/v1/runs/stopped/approve", body={"id": "ship", "approve": True})
    wait_for(lambda: begun(trace) == 1, "the run never came to its second step")
    workers = user.pids("ray::second")
    assert workers and [run["run_id"] for run in user.get("/api/v1/runs")] == ["stopped"]
    assert "run stopped is cancelled" in user.recua("cancel", "stopped")
    wait_for(lambda: not set(workers) & set(user.pids("ray::second")), "the cancelled step still runs")
    assert "cancelled" in user.recua("watch", "stopped", code=130)
    assert user.recua("watch", "nope", code=2).startswith("recua: error: no run 'nope'")

    assert "the service resumes run stopped" in user.recua("resume", "stopped", "--detach")
    wait_for(lambda: begun(trace) == 2, "a cancelled run goes on when it is resumed, from its package")
    watching = user.start("watch", "stopped")
    assert watching.stdout is not None and "run stopped of flow:toy" in watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    assert "the run continues" in watching.communicate(timeout=60)[0] and watching.returncode == 130
    output = user.recua("down")
    assert "1 unfinished runs were interrupted; the next `recua up` resumes them: stopped" in output
    assert load_run(store, "stopped").status == "interrupted"
    wait_for(lambda: not user.processes(), f"left behind: {user.processes()}")
    assert not (user.home / ".recua" / "service.json").exists()
    assert "no driver" in user.recua("watch", "stopped", "--store", s3_url, code=1)
    assert "no service is up here" in user.recua("down", code=2)

    assert "it resumes 1 unfinished runs: stopped" in user.up("--store", s3_url)
    wait_for(lambda: begun(trace) == 3, "an interrupted run goes on with the next service")
    output = user.recua("down", "--cancel")
    assert "cancelling stopped" in output and "unfinished" not in output and "not ended" not in output
    assert load_run(store, "stopped").status == "cancelled"
    wait_for(lambda: not user.processes(), f"left behind: {user.processes()}")
