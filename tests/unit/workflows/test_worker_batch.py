"""One task's batch, in a worker process of its own without Ray: what it tells, hands back and returns."""

import importlib.util
import itertools
import json
import os
import queue
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.processes import adopt_orphans, process_state
from workflows.driver.pace import ENOUGH_SEEN, MOST, SHORT_S, TOGETHER_S, Pace, may_share
from workflows.graph import Gang, StepOptions
from workflows.graph.values import encode
from workflows.worker import isolation
from workflows.worker.batch import ENDED, HANDED_BACK
from workflows.worker.channel import Listener

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
from workflows.worker.batch import run_batch
run, *batches = [line for line in sys.stdin.buffer]
for batch in batches:  # the first one imports the step
    print(run_batch(run.decode(), batch).decode(), flush=True)
"""


@contextmanager
def task(folder: Path, *batches: list[tuple[str, Any]]) -> Iterator[tuple["subprocess.Popen[str]", "queue.Queue[Any]"]]:
    """Run (step, argument) pairs as batches 7, 8 and so on, after a batch of one; the process, and what it tells its
    driver."""
    told: queue.Queue[Any] = queue.Queue()
    listener = Listener("127.0.0.1", told.put)
    run = {"run": "r", "lease_slot": 0, "store": str(folder / "store"), "cache": str(folder)}
    run |= {"channel": listener.address, "driver_pid": os.getpid()}
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}"}
    command = [sys.executable, "-c", PROGRAM]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(
            "\n".join([json.dumps(run), batch(0, [("plain", 0)]), *map(batch, itertools.count(7), batches)])
        )
        process.stdin.close()
        assert process.stdout.readline()
        yield process, told
    finally:
        process.kill()
        process.wait()
        listener.close()


def batch(number: int, calls: list[tuple[str, Any]]) -> str:
    parts = [
        {"call": f"{step}[{place}]", "step": f"batch_steps:{step}", "attempt": 1, "attempt_id": f"a{number}-{place}"}
        | {"arguments": encode({"args": [argument], "kwargs": {}}, "arguments"), "timeout": None, "lease_until": 1e12}
        for place, (step, argument) in enumerate(calls)
    ]
    return json.dumps({"batch": number, "calls": parts})


def results(process: "subprocess.Popen[str]") -> list[Any]:
    """What the task returned: each call's result, None where it was handed back."""
    assert process.stdout is not None
    while "[" not in (line := process.stdout.readline()):  # a thread that was left may print before and after it
        assert line, "the task ended without an answer"
    outcomes, _ = json.JSONDecoder().raw_decode(line[line.index("[") :])
    assert all(outcome is None or outcome["ok"] for outcome in outcomes), [
        each and each.get("error") for each in outcomes
    ]
    return [outcome and outcome["result"] for outcome in outcomes]


def news(told: "queue.Queue[Any]", number: int) -> dict[str, Any]:
    """The first `number` messages on calls that have ended or were handed back."""
    found: dict[str, Any] = {}
    while len(found) < number:
        message = told.get(timeout=60)
        if message["kind"] in (ENDED, HANDED_BACK):
            assert message["batch"] == 7 and message["call"] not in found
            found[message["call"]] = message
    return found


def test_engine_a_slow_body_lets_go_of_all_others_while_it_goes_on(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    calls = [("plain", 1), ("gated", str(gate)), ("plain", 3), ("plain", 4)]
    for _ in range(8):  # on a loaded machine the first body may be the slow one
        with task(tmp_path, calls) as (process, told):
            found = news(told, 3)
            assert found["plain[2]"]["kind"] == found["plain[3]"]["kind"] == HANDED_BACK
            assert found["plain[3]"]["attempt_id"] == "a7-3"
            if "gated[1]" in found:
                assert results(process) == [2, None, None, None]
                continue
            assert found["plain[0]"]["kind"] == ENDED and json.loads(found["plain[0]"]["outcome"])["result"] == 2
            gate.touch()
            assert results(process) == [2, "open", None, None], "the others were known before the slow body ended"
            return
    pytest.fail("the first body was always slow")


def test_engine_a_batch_gives_no_more_at_once_than_a_message_holds(tmp_path: Path) -> None:
    with task(tmp_path, [("large", 1), ("plain", 2)]) as (process, _):
        large, handed_back = results(process)
        assert len(large) == 100 << 10 and handed_back is None


def log(folder: Path, attempt_id: str) -> str:
    file = folder / "store" / "runs" / "r" / "attempts" / attempt_id / "log.txt"
    return file.read_text() if file.exists() else ""


def test_engine_what_a_body_does_to_its_process_does_not_meet_the_next_one(tmp_path: Path) -> None:
    calls = [("process_state", 0), ("change_process", str(tmp_path / "gone")), ("process_state", 1), ("draw", 0)]
    with task(tmp_path, *([call] for call in calls)) as (process, _):
        before, seeded, after, drawn = (results(process)[0] for _ in calls)
    assert after == before
    python, numpy = random.Random(1), np.random.RandomState(1)
    draws = [python.random() + float(numpy.random()) for _ in range(2)]
    assert seeded == draws[0] and drawn not in draws, "a body that does not seed draws as in a new process"
    assert log(tmp_path, "a8-0") == "the last words\n"
    assert log(tmp_path, "a7-0") == log(tmp_path, "a9-0") == "still heard\ntoo\n"


def test_engine_a_worker_whose_body_imported_and_changed_something_is_given_up(tmp_path: Path) -> None:
    """Nobody knows which of the two set what torch is like now."""
    with task(tmp_path, [("first_torch", 0), ("plain", 1)]) as (process, _):
        assert results(process) == ["torch.float64", None]


def test_engine_what_a_body_does_to_torch_does_not_meet_the_next_one(tmp_path: Path) -> None:
    calls = [("torch_state", 0), ("change_torch", 0), ("torch_state", 1)]
    with task(tmp_path, *([call] for call in calls)) as (process, _):
        assert [results(process)[0] for _ in calls] == [[False] * 4, None, [False] * 4]


def test_engine_a_worker_whose_body_left_a_thread_is_given_up(tmp_path: Path) -> None:
    """It would print into the next one's log."""
    with task(tmp_path, [("leave_thread", 0), ("plain", 1)]) as (process, _):
        assert results(process) == [0, None]


def test_engine_a_thread_that_a_library_keeps_costs_no_worker(tmp_path: Path) -> None:
    """Such as a progress bar's: every step that shows one would start anew, and import everything again."""
    file = tmp_path / "site-packages" / "bars.py"
    file.parent.mkdir()
    file.write_text(
        "import threading\n"
        "done = threading.Event()\n"
        "class Monitor(threading.Thread):\n"
        "    def run(self): done.wait()\n"
        "def show(): Monitor(daemon=True).start(); threading.Thread(target=lambda: done.wait(), daemon=True).start()\n"
    )
    spec = importlib.util.spec_from_file_location("bars", file)
    assert spec is not None and spec.loader is not None
    bars = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bars)
    adopted = adopt_orphans(False)
    try:
        process = isolation.Isolation()
        with process.around_body([]):
            bars.show()
        assert not process.given_up
    finally:
        bars.done.set()
        adopt_orphans(adopted)


def test_engine_a_worker_is_given_up_where_something_cannot_be_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()
    monkeypatch.setattr(isolation, "PARTS", [isolation.Part("the weather", lambda: next(numbers), print)])
    adopted = adopt_orphans(False)
    try:
        process, said = isolation.Isolation(), list[str]()
        with process.around_body(said):
            pass
    finally:
        adopt_orphans(adopted)
    assert process.given_up and said == ["what it did to the weather cannot be undone: its worker process is given up"]


def test_engine_processes_that_outlive_their_step_are_ended(tmp_path: Path) -> None:
    folder = tmp_path / "said"
    folder.mkdir()
    with task(tmp_path, [("leave_processes", str(folder)), ("plain", 1)]) as (process, _):
        assert process.stdout is not None
        left, handed_back = json.loads(process.stdout.readline())
        assert handed_back is None and left["ok"]
        for name in ("child", "orphan"):
            pid = int((folder / name).read_text())
            assert process_state(pid) == "X" and f"process {pid} (sh -c echo $$" in left["warning"]
        assert "outlived its step and was ended" in left["warning"]
    assert "child\n" in log(tmp_path, "a7-0")


def test_engine_only_steps_that_were_seen_to_be_short_share_a_task() -> None:
    pace = Pace()
    assert pace.together("new") == 1
    for _ in range(ENOUGH_SEEN - 1):
        pace.saw("quick", 0.001)
    assert pace.together("quick") == 1
    pace.saw("quick", 0.001)
    assert pace.together("quick") == round(TOGETHER_S / 0.001)
    pace.saw("quick", 1.0)
    assert pace.together("quick") == 1, "one slow body ends it"
    for _ in range(40):
        pace.saw("quick", 0.0001)
    assert pace.together("quick") == MOST
    for _ in range(40):
        pace.saw("slow", 2 * SHORT_S)
    assert pace.together("slow") == 1


@pytest.mark.parametrize(
    "special", [{"timeout": 9.0}, {"num_gpus": 1}, {"memory": 1}, {"num_cpus": 0}, {"gang": Gang([{"CPU": 1}])}]
)
def test_engine_calls_with_special_wishes_have_a_task_of_their_own(special: dict[str, Any]) -> None:
    assert may_share(StepOptions(retries=3, may_fail=True)) and not may_share(StepOptions(**special))
