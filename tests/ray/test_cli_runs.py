"""`recua` as a user meets it: real processes, real Ray, exit codes, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

FLOW = '''
import json, time
from pathlib import Path
from infra.config import Settings
from workflows.cli import run_script
from workflows.graph import context, step, workflow

class Toy(Settings):
    folder: str
    """Where the marker lies."""
    fail: bool = False
    """Whether the second step fails."""

RECIPE = Toy

def on_finish(result):
    print("on_finish", result.value["evaluation"]["accuracy"])

@step
def train(folder: str) -> dict:
    print("training")
    context().progress(1, 2, loss=1.5)
    (Path(folder) / "begun").touch()
    while not (Path(folder) / "go").exists():
        time.sleep(0.05)
    out = context().artifact("model")
    (out.path / "metrics.jsonl").write_text(json.dumps({"stage": "sft", "step": 1, "loss": 1.5}) + "\\n")
    (out.path / "config.json").write_text("{}")
    (out.path / "model.safetensors").write_text("w")
    return {"model": out.seal()}

@step
def evaluate(model: dict, fail: bool) -> dict:
    if fail:
        raise ValueError("no such answer; password=hunter2222")
    return {"stage": "sft", "n": 4, "accuracy": 0.75, "accuracy_ci": [0.5, 1.0]}

@workflow
def toy(recipe: Toy) -> dict:
    made = train(recipe.folder)
    return {"evaluation": evaluate(made, recipe.fail).result(), "model": made.result()["model"]}

if __name__ == "__main__":
    run_script(__file__)
'''

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.py").write_text(FLOW)
    return folder


@pytest.fixture(scope="module")
def mark() -> str:
    """In the environment of every process of this module, so that a leftover is found."""
    return f"recua-test-{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def start(folder: Path, mark: str) -> Start:
    def begin(*command: str) -> "subprocess.Popen[str]":
        environment = {**os.environ, "HOME": str(folder), "RECUA_TEST_MARK": mark}
        environment.pop("RAY_ADDRESS", None)
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return begin


def _recua(*arguments: str) -> list[str]:
    return ["-m", "workflows.cli", *arguments]


def _finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def _marked(mark: str) -> list[str]:
    """Command lines of living processes that carry the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
            except OSError:
                continue
    return [line for line in found if line]


def _wait(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_interrupted_then_resumed_then_shown(folder: Path, start: Start, mark: str) -> None:
    process = start(*_recua("run", "toy.py", "--set", f"folder={folder}", "--run", "one"))
    _wait(lambda: (folder / "begun").exists() or process.poll() is not None, 200, "the step never began")
    process.send_signal(signal.SIGINT)
    code, out, err = _finish(process)
    assert code == 130, out + err
    assert err.strip().splitlines()[-1] == "recua: interrupted; run the same command again to resume"
    assert "Traceback" not in err
    _wait(lambda: not _marked(mark), 30, f"left behind: {_marked(mark)}")

    (folder / "go").touch()
    code, out, err = _finish(start(*_recua("resume", "one")))
    assert code == 0, out + err
    assert "train[0] committed" in out and "on_finish 0.75" in out and "75.0%" in out
    assert f"report: {folder}/runs/one/report.html" in out
    summary = json.loads((folder / "runs/one/report.json").read_text())
    assert [stage["status"] for stage in summary["stages"]] == ["committed", "committed"]
    assert summary["eval"]["sft"]["accuracy"] == 0.75 and summary["status"] == "finished"
    page = (folder / "runs/one/report.html").read_text()
    assert '"title":"Evaluation"' in page and '"name":"loss"' in page

    code, out, err = _finish(start("toy.py", "--set", f"folder={folder}", "--run", "one"))
    assert code == 0 and "run one has already finished" in out, out + err
    _wait(lambda: not _marked(mark), 30, f"left behind: {_marked(mark)}")

    shown = json.loads(_finish(start(*_recua("show", "one", "--json")))[1])
    assert [step["call_id"] for step in shown["steps"]] == ["train[0]", "evaluate[0]"]
    assert "training" in _finish(start(*_recua("logs", "one", "train")))[1]
    assert "one  finished" in _finish(start(*_recua("runs")))[1]


def test_a_failing_step_shows_the_users_traceback_first(folder: Path, start: Start, mark: str) -> None:
    (folder / "go").touch()
    code, out, err = _finish(start("toy.py", "--set", f"folder={folder}", "--set", "fail=true", "--run", "two"))
    assert code == 1, out + err
    lines = err.strip().splitlines()
    assert lines[0].startswith("Traceback") and "toy.py" in lines[1]
    assert lines[-1] == "recua: error: evaluate[0]: ValueError: no such answer; password=[redacted]"
    assert "hunter2222" not in out + err
    code, out, _ = _finish(start(*_recua("show", "two")))
    assert code == 0 and "failed" in out and "password=[redacted]" in out
    _wait(lambda: not _marked(mark), 30, f"left behind: {_marked(mark)}")
