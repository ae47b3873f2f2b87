"""`serve_forever` in a process of its own, as `recua serve` runs it, and `chat_loop` against it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving_toy import save_toy_model

from serving.console import chat_loop

SCRIPT = """
import sys
from pathlib import Path
from infra.errors import RecuaError
from serving.config import ServingEngineSettings, ServingSettings
from serving.console import serve_forever

engine = ServingEngineSettings(kv_cache_gib=0.25)
settings = ServingSettings(grpc_port=0, http_port=0, drain_timeout_s=2.0, engine=engine)
say = lambda text: print(text, flush=True)
try:
    serve_forever(Path(sys.argv[1]), settings, local_ray_restarts=int(sys.argv[2]), say=say)
except RecuaError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class Server:
    """`recua serve`, what it says, and every process that it starts."""

    def __init__(self, folder: Path, restarts: int, repository: Path) -> None:
        command = [sys.executable, "-c", SCRIPT, str(folder), str(restarts)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, cwd=repository, start_new_session=True, **pipes)
        self.family: set[psutil.Process] = set()

    def read_until(self, words: str) -> str:
        assert self.process.stdout is not None
        said = ""
        while words not in said:
            line = self.process.stdout.readline()
            assert line, f"the server ended: {said}"
            said += line
        self.family.update(psutil.Process(self.process.pid).children(recursive=True))
        return said

    def kill(self, name: str) -> None:
        """SIGKILL to one of the processes of its Ray."""
        self.find(name).kill()

    def find(self, name: str) -> psutil.Process:
        """One of the processes of its Ray, as soon as it is there."""
        deadline = time.monotonic() + 120
        while not (found := [each for each in self._family_now() if _name(each) == name]):
            assert time.monotonic() < deadline, f"it has no {name}"
            time.sleep(0.05)
        return found[0]

    def end(self) -> str:
        """What it still says. Nothing of it is left."""
        assert self.process.stdout is not None
        rest = self.process.stdout.read()
        self.process.wait(60)
        _, alive = psutil.wait_procs(self.family, timeout=120)
        assert not alive, [process.name() for process in alive]
        return rest

    def _family_now(self) -> set[psutil.Process]:
        now = set(psutil.Process(self.process.pid).children(recursive=True))
        self.family.update(now)
        return now


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture
def serve(tmp_path: Path, repository: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(restarts: int) -> Server:
        servers.append(Server(save_toy_model(tmp_path / "model"), restarts, repository))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)


def test_serve_prints_lines_that_work_outlives_its_ray_and_ctrl_c_leaves_nothing(serve: Callable[..., Server]) -> None:
    server = serve(restarts=3)
    said = server.read_until("Ctrl-C")
    (address,) = re.findall(r"recua chat (\S+)", said)
    (url, body) = re.findall(r"curl (\S+) .* -d '(.*)'", said)[0]
    assert "warning" not in said
    reply = httpx.post(url, json=json.loads(body) | {"max_tokens": 3}, timeout=60, trust_env=False).json()
    assert reply["usage"]["completion_tokens"] == 3

    shown: list[str] = []
    lines = ["hello", "/new", "", "and again", "/exit", "never said"]
    assert chat_loop(address, max_tokens=4, temperature=0.0, lines=lines, say=lambda t, **_: shown.append(t)) == 2
    assert shown[0].startswith("recua, weight version ")
    assert len(server.family) > 3

    server.kill("raylet")
    again = server.read_until("Ctrl-C")
    assert "the local Ray of this endpoint is gone (its raylet was killed by SIGKILL); starting another one" in again
    assert address in again and url in again
    assert chat_loop(address, max_tokens=4, temperature=0.0, lines=["hello"], say=lambda *_, **__: None) == 1

    os.killpg(server.process.pid, signal.SIGINT)  # what a terminal sends: to everyone in the foreground
    rest = server.end()
    assert server.process.returncode == 0
    assert "draining" in rest
    assert rest.rstrip().endswith("stopped")


def test_a_ray_that_dies_while_the_model_is_loaded_is_named_and_bounded(serve: Callable[..., Server]) -> None:
    server = serve(restarts=1)
    server.read_until("loading")
    server.find("ray::deploy")
    server.kill("gcs_server")
    said = server.read_until("loading")
    assert "is gone (its GCS was killed by SIGKILL); starting another one (start 1 of local_ray_restarts=1)" in said
    server.kill("raylet")
    rest = server.end()
    assert server.process.returncode == 1
    assert rest.startswith(
        "SystemFault: the local Ray of this endpoint is gone (its raylet was killed by SIGKILL), and "
    )
    assert "Serve it again, with --local-ray-restarts for more" in rest and rest.count("\n") == 1, rest
