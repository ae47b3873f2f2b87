"""`serve_forever` in a process of its own, as `recua serve` runs it, and `chat_loop` against it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from serving_toy import save_toy_model

from serving.console import chat_loop

SCRIPT = """
from pathlib import Path
from serving.config import ServingEngineSettings, ServingSettings
from serving.console import serve_forever

engine = ServingEngineSettings(kv_cache_gib=0.25)
settings = ServingSettings(grpc_port=0, http_port=0, drain_timeout_s=2.0, engine=engine)
serve_forever(Path({folder!r}), settings, say=lambda text: print(text, flush=True))
"""


@pytest.mark.timeout(300)
def test_serve_prints_lines_that_work_and_ctrl_c_leaves_nothing(tmp_path: Path, repository: Path) -> None:
    folder = save_toy_model(tmp_path / "model")
    server = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(folder=str(folder))],
        cwd=repository,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert server.stdout is not None
    try:
        said = ""
        while "Ctrl-C" not in said:
            line = server.stdout.readline()
            assert line, f"the server ended: {said}"
            said += line
        (address,) = re.findall(r"recua chat (\S+)", said)
        (url, body) = re.findall(r"curl (\S+) .* -d '(.*)'", said)[0]
        reply = httpx.post(url, json=json.loads(body) | {"max_tokens": 3}, timeout=60, trust_env=False).json()
        assert reply["usage"]["completion_tokens"] == 3

        shown: list[str] = []
        lines = ["hello", "/new", "", "and again", "/exit", "never said"]
        assert chat_loop(address, max_tokens=4, temperature=0.0, lines=lines, say=lambda t, **_: shown.append(t)) == 2
        assert shown[0].startswith("recua, weight version ")

        family = psutil.Process(server.pid).children(recursive=True)
        assert len(family) > 3
        os.killpg(server.pid, signal.SIGINT)  # what a terminal sends: to everyone in the foreground
        rest = server.stdout.read()
        assert server.wait(60) == 0
        assert "draining" in rest
        assert rest.rstrip().endswith("stopped")
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not alive, [process.name() for process in alive]
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
