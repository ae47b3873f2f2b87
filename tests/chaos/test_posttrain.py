"""The real post-training recipe in miniature, broken on purpose: Ray, DeepSpeed and vLLM, with its runs on S3."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.storage import Store, open_store
from tests.helpers.posttrain_mini import miniature
from workflows.graph.artifacts import sha256_file
from workflows.graph.values import digest
from workflows.runs.catalog import load_run

SECRET = "KIA-not-to-be-seen-7f3a"
DETERMINISTIC = ["build_problems[0]", "build_corpus[0]", "train_tokenizer[0]", "tokenize[0]", "pretrain[0]"]
STAGES = [
    *DETERMINISTIC,
    "fine_tune[sft]",
    "evaluate[evaluate-sft]",
    "sample_preferences[0]",
    "train_reward[reward-helpfulness]",
    "train_reward[reward-safety]",
    "rejection_sample[0]",
    "fine_tune[rejection]",
    "evaluate[evaluate-rejection]",
    "optimise_preferences[dpo]",
    "evaluate[evaluate-dpo]",
    "optimise_policy[ppo]",
    "evaluate[evaluate-ppo]",
    "deploy[0]",
]


def wait_for(condition: Callable[[], Any], what: Callable[[], str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


class Runs:
    """Drivers of one recipe: their output, their processes, what they committed."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder, self._repository = folder, repository
        self._mark = f"recua-test-{uuid.uuid4().hex}"
        self._drivers: list[subprocess.Popen[bytes]] = []

    def start(self, store: str, faults: str = "", settings: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """`recua run` of the miniature in a new process group; its output goes to `output()`."""
        command = [sys.executable, "-m", "workflows.cli", "run", "workflows/llama3_posttrain.py", *miniature(*settings)]
        command += ["--store", store, "--run", "r", "--reports", str(self.folder / "reports")]
        environment = {**os.environ, "HOME": str(self.folder), "RECUA_TEST_MARK": self._mark, "RECUA_FAULTS": faults}
        environment.pop("RAY_ADDRESS", None)
        with (self.folder / f"out-{len(self._drivers)}").open("wb") as out:
            pipes = {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
            driver = subprocess.Popen(command, cwd=self._repository, env=environment, **pipes)  # type: ignore[call-overload]
        self._drivers.append(driver)
        return driver

    def output(self) -> str:
        """What the newest driver has printed."""
        return (self.folder / f"out-{len(self._drivers) - 1}").read_text()

    def processes(self) -> dict[int, str]:
        """Living processes of any driver, children in other sessions included."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"RECUA_TEST_MARK={self._mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:100]
            except OSError:
                continue
        return found

    def until(self, driver: subprocess.Popen[bytes], text: str, patience_s: float = 600) -> None:
        """Wait until the driver has printed `text`."""
        over: Callable[[], bool] = lambda: text in self.output() or driver.poll() is not None  # noqa: E731
        wait_for(over, lambda: f"no {text}: {self.output()}", patience_s)
        assert driver.poll() is None, self.output()

    def kill(self, driver: subprocess.Popen[bytes], victim: Sequence[str]) -> None:
        """SIGKILL to a server or an agent of the driver's own Ray: its child, or its raylet's."""
        there = psutil.Process(driver.pid).children(recursive=True)
        (found,) = [each for each in there if any(part in " ".join(each.cmdline())[:300] for part in victim)]
        found.kill()

    def end(self, driver: subprocess.Popen[bytes], code: int, patience_s: float = 600) -> None:
        """Wait for the driver's end: this exit code, and no process left behind.

        After a SIGKILL Ray's workers notice within about 12 s on a quiet machine that their raylet is gone.
        """
        assert driver.wait(patience_s) == code, self.output()
        wait_for(lambda: not self.processes(), lambda: f"left behind: {self.processes()}", 120)

    def close(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for driver in self._drivers:
            driver.wait()


@pytest.fixture
def runs(tmp_path: Path, repository: Path) -> Any:
    made = Runs(tmp_path, repository)
    yield made
    made.close()


def commits(store: Store) -> list[dict[str, Any]]:
    """Every commit record in the run's journal."""
    found = []
    for key in store.list("runs/r/journal"):
        found += [record for record in json.loads(store.get(key) or b"")["records"] if record["type"] == "commit"]
    return found


def committed(store: Store) -> dict[str, str]:
    """Call id -> digest of its committed result; each call has one commit record."""
    records = commits(store)
    assert not records or max(Counter(record["call"] for record in records).values()) == 1
    return {record["call"]: digest(record["result"]) for record in records}


def contents(result: Any) -> list[str]:
    """Digests of the artifacts in a result, metrics (which hold times) apart."""
    if isinstance(result, list):
        return [found for item in result for found in contents(item)]
    if not isinstance(result, dict):
        return []
    if "$artifact" in result:
        artifact = result["$artifact"]
        return [] if "metrics" in artifact["name"] else [artifact["digest"]]
    return [found for item in result.values() for found in contents(item)]


@pytest.mark.timeout(1800)
def test_a_post_training_run_survives_an_interrupt_and_a_kill_on_s3(
    runs: Runs, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    store = open_store(s3_url)

    driver = runs.start(s3_url)
    runs.until(driver, "fine_tune[sft] committed")
    wait_for(lambda: any("vllm.process" in line for line in runs.processes().values()), lambda: "no vLLM engine", 300)
    os.killpg(driver.pid, signal.SIGINT)
    runs.end(driver, 130)
    assert "recua: interrupted; run the same command again to resume" in runs.output()
    assert load_run(store, "r").status == "cancelled"
    seen = committed(store)
    assert "fine_tune[sft]" in seen

    damaged = damage_cached_model(tmp_path)
    driver = runs.start(s3_url)
    runs.until(driver, "optimise_policy[ppo] started")
    driver.kill()
    runs.end(driver, -signal.SIGKILL)
    assert sha256_file(damaged[0]) == damaged[1], "a damaged file in the cache is fetched again"
    now = committed(store)
    assert seen.items() <= now.items() and "optimise_preferences[dpo]" in now and "optimise_policy[ppo]" not in now
    seen = now

    runs.end(runs.start(s3_url), 0)
    now = committed(store)
    assert seen.items() <= now.items() and set(STAGES) <= now.keys()
    run = load_run(store, "r")
    assert run.status == "finished" and run.drivers == 3
    report = json.loads((tmp_path / "reports/r/report.json").read_text())
    assert sorted(stage["name"] for stage in report["stages"]) == sorted(now)
    assert all(stage["status"] == "committed" for stage in report["stages"])
    assert report["served"]["grpc"] is True and report["served"]["openai"] is True
    assert store.get("runs/r/report.json") == (tmp_path / "reports/r/report.json").read_bytes()

    assert not [key for key in store.list("") if SECRET.encode() in (store.get(key) or b"")]
    assert not [file for file in tmp_path.glob("out-*") if SECRET in file.read_text()]
    compare_with_a_quiet_run(runs, store, tmp_path / "quiet")


def damage_cached_model(folder: Path) -> tuple[Path, str]:
    """Flip one byte of a model in the artifact cache; (the file, what it held)."""
    files = sorted((folder / ".recua").rglob("*.safetensors"))
    newest = max(files, key=lambda file: file.stat().st_mtime)
    before = sha256_file(newest)
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(bytes(content))
    return newest, before


def compare_with_a_quiet_run(runs: Runs, store: Store, quiet: Path) -> None:
    """The same recipe in a folder, without faults, as far as its stages are deterministic."""
    driver = runs.start(str(quiet))
    runs.until(driver, "fine_tune[sft] committed")
    os.killpg(driver.pid, signal.SIGINT)
    runs.end(driver, 130)
    expected = {record["call"]: contents(record["result"]) for record in commits(open_store(quiet))}
    found = {record["call"]: contents(record["result"]) for record in commits(store)}
    for call in (*DETERMINISTIC, "fine_tune[sft]"):
        assert found[call] == expected[call] and found[call], f"{call} differs from the fault-free run"


VICTIMS = {
    "raylet": ("/raylet --",),
    "GCS": ("/gcs_server --",),
    "dashboard agent": ("/dashboard/agent.py", "ray::DashboardAgent"),
    "runtime-env agent": ("/runtime_env/agent/main.py", "ray::RuntimeEnvAgent"),
}
"""How the command lines of Ray's processes begin; an agent changes its own when its imports are done."""


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "victims",
    [
        ("dashboard agent", "GCS", "runtime-env agent"),
        ("GCS", "raylet", "GCS"),
        ("raylet", "dashboard agent", "raylet"),
        ("runtime-env agent", "runtime-env agent", "dashboard agent"),
    ],
)
def test_a_post_training_run_outlives_its_own_ray(runs: Runs, tmp_path: Path, victims: Sequence[str]) -> None:
    """One driver, and nothing that was committed is done again."""
    url = str(tmp_path / "store")
    driver = runs.start(url, settings=("pretrain.steps=400",))
    calls = ("pretrain[0]", "optimise_preferences[dpo]", "deploy[0]")
    for number, (call, victim) in enumerate(zip(calls, victims, strict=True), start=1):
        runs.until(driver, f"{call} started", patience_s=1200)
        if call == "pretrain[0]":  # in the middle: its snapshots in shared memory outlive Ray
            runs.until(driver, "/400 ", patience_s=1200)
        runs.kill(driver, VICTIMS[victim])
        runs.until(driver, f"starting another one (start {number} of local_ray_restarts=3)")
        runs.until(driver, f"{call} started (attempt 2)", patience_s=1200)
    runs.end(driver, 0, patience_s=1800)
    output = runs.output()
    assert output.count("the local Ray of this run is gone") == 3 and "no single node" not in output, output
    assert "restore from host memory" in output and "no step was lost" in output, output
    store = open_store(url)
    assert set(STAGES) <= committed(store).keys()
    run = load_run(store, "r")
    assert run.status == "finished" and run.drivers == 1
    report = json.loads((tmp_path / "reports/r/report.json").read_text())
    assert report["served"]["grpc"] is True and report["served"]["openai"] is True
