"""A workflow as a Ray job: a real head with token authentication, a driver that is killed and submitted again."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.storage import open_store
from tests.helpers.ports import free_ports
from workflows.runs.catalog import load_run

PACKAGES = ("infra", "workflows")

FLOW = """
import os, time
from pathlib import Path
import ray
from helpers.words import shout
from workflows.cli import run_script
from workflows.graph import context, step, workflow

@step(num_cpus=0.5)
def first(folder: str) -> dict:
    with (Path(folder) / "trace").open("a") as trace:
        trace.write("first\\n")
    out = context().artifact("text")
    (out.path / "text.txt").write_text(shout("one"))
    return {"text": out.seal(), "node": ray.get_runtime_context().get_node_id(), "code": __file__}

@step(num_cpus=0.5)
def second(folder: str, made: dict) -> str:
    (Path(folder) / "begun").touch()
    while not (Path(folder) / "go").exists():
        time.sleep(0.05)
    return (made["text"].path() / "text.txt").read_text()

@workflow
def toy(folder: str) -> dict:
    made = first(folder)
    return {"said": second(folder, made).result(), "node": made.result()["node"], "code": made.result()["code"]}

if __name__ == "__main__":
    run_script(__file__)
"""


@pytest.fixture(scope="module")
def mark() -> str:
    """In the environment of every process of this module, so that a leftover is found."""
    return f"recua-test-{uuid.uuid4().hex}"


def marked(mark: str) -> dict[int, str]:
    """Living processes that carry the mark."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"RECUA_TEST_MARK={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def environment(mark: str) -> dict[str, str]:
    """Nothing of this checkout is on the path: a job runs from its own copy."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    return {**kept, "RECUA_TEST_MARK": mark, "RAY_AUTH_MODE": "token"}


@pytest.fixture(scope="module")
def head(mark: str, environment: dict[str, str]) -> Iterator[str]:
    """`ray start --head` on ports and folders of its own; gives the dashboard's address."""
    temporary = Path("/tmp") / f"rj-{mark[-8:]}"  # sockets lie under it: their paths must be short
    port, dashboard, client, agent = free_ports(4)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "2"]
    command += ["--node-ip-address", "127.0.0.1", "--port", str(port), "--dashboard-port", str(dashboard)]
    command += ["--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent)]
    command += ["--temp-dir", str(temporary)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)  # type: ignore[call-overload]
    address = f"http://127.0.0.1:{dashboard}"
    wait_for(lambda: process.poll() is not None or "running" in ray_job(environment, "list", address), "no head")
    yield address
    process.terminate()  # --block ends the processes of its node with it
    process.wait(60)
    for pid in marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(temporary, ignore_errors=True)


def ray_job(environment: dict[str, str], command: str, address: str, *arguments: str) -> str:
    """The output of `ray job COMMAND`."""
    call = [sys.executable, "-m", "ray.scripts.scripts", "job", command, "--address", address, *arguments]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr + ("" if done.returncode else "\nrunning")


@pytest.fixture
def working_dir(tmp_path: Path, repository: Path) -> Path:
    """What a user submits: our packages, a workflow file, and a package of the user's own."""
    folder = tmp_path / "submitted"
    for package in PACKAGES:
        shutil.copytree(repository / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "helpers").mkdir()
    (folder / "helpers" / "__init__.py").touch()
    (folder / "helpers" / "words.py").write_text("def shout(word):\n    return word.upper()\n")
    (folder / "flow.py").write_text(FLOW)
    return folder


def test_a_killed_job_submitted_again_goes_on(
    head: str, environment: dict[str, str], mark: str, working_dir: Path, tmp_path: Path
) -> None:
    folder, store = tmp_path / "trace", tmp_path / "store"
    folder.mkdir()
    entrypoint = [sys.executable, "flow.py", "--set", f"folder={folder}", "--store", str(store), "--run", "r"]

    def submit(identity: str, *options: str) -> str:
        where = ["--working-dir", str(working_dir), "--submission-id", identity]
        return ray_job(environment, "submit", head, *where, *options, "--", *entrypoint)

    submit("one", "--no-wait")
    wait_for((folder / "begun").exists, "the job never came to its second step")
    drivers = [
        pid for pid, line in marked(mark).items() if re.search(r"python\S* flow\.py", line) and "sh -c" not in line
    ]
    assert len(drivers) == 1
    raylets = [line for line in marked(mark).values() if "/raylet " in line]
    assert len(raylets) == 1, "the driver joined the cluster and started no local Ray"
    os.kill(drivers[0], signal.SIGKILL)
    wait_for(lambda: "Job 'one' failed" in ray_job(environment, "status", head, "one"), "the job did not end")
    assert load_run(open_store(store), "r").steps[0].status == "committed"

    (folder / "go").touch()
    output = submit("two")
    assert "first[0] resumed" in output and "Job 'two' succeeded" in output, output
    run = load_run(open_store(store), "r")
    assert run.status == "finished" and run.drivers == 2 and run.result["said"] == "ONE"
    assert (folder / "trace").read_text().split() == ["first"], "a committed step ran once only"
    assert "working_dir_files" in run.result["code"], "workers ran the submitted copy, not an installed one"
    assert json.loads((store / "runs/r/report.json").read_text())["status"] == "finished"
