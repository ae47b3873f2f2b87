"""Waiting for people and events: real drivers (threads and processes) on a folder and on S3, and no Ray at all."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import waiting_program as program
from click.testing import CliRunner

from infra.errors import Denied, NonDeterminismError, StepTimeout, UserError
from infra.storage import Store, open_store
from workflows.cli import main
from workflows.driver import session
from workflows.driver.settings import RunSettings
from workflows.graph import StepOptions
from workflows.graph.values import encode
from workflows.launch import plan as planning
from workflows.launch.display import PlainDisplay
from workflows.runs.catalog import find_steps, load_run
from workflows.runs.events import Event
from workflows.runs.journal import read_journal
from workflows.runs.signals import reply, send, wait_record, waiting_calls

YES = {"approve": True, "comment": ""}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def wait_for(condition: Callable[[], Any], what: str = "it did not come to that", seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def wait_for_question(store: Store, run_id: str, call: str) -> None:
    wait_for(lambda: call in [record["call"] for record in waiting_calls(read_journal(store, run_id))], call)


class Driver:
    """A run in a thread of this process."""

    def __init__(self, store: Store, workflow: Any, *args: Any) -> None:
        self.events: list[Event] = []
        self._store, self._workflow, self._args = store, workflow, args
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(self._run)

    def _run(self) -> Any:
        settings = RunSettings(store=self._store.url, run_id="r")
        return session.run(self._workflow, *self._args, settings=settings, observers=[self.events.append]).value

    def result(self) -> Any:
        return self._future.result(timeout=60)


def drive(store: Store, workflow: str, *args: Any) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    command = [sys.executable, program.__file__, store.url, "r", workflow, json.dumps(args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def type_in(*words: str, store: Store) -> tuple[int, str]:
    """What a command prints, and its exit code."""
    runner = CliRunner()
    result = runner.invoke(main.main_group, [*words, "--store", store.url])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return 2, str(result.exception)
    return result.exit_code, result.output


def test_dynamic_a_driver_killed_while_it_waits_goes_on_with_what_was_answered_meanwhile(store: Store) -> None:
    first = drive(store, "deploying", "Ship it?")
    wait_for_question(store, "r", "event[score]")
    first.kill()
    first.wait()
    code, said = type_in("send", "r", "score", '{"loss": 0.5}', store=store)
    assert code == 0 and said.startswith("event[score] is answered by ")
    second = drive(store, "deploying", "Ship it?")
    wait_for_question(store, "r", "approval[deploy]")
    shown = type_in("show", "r", store=store)[1]
    assert "waiting-for-approval" in shown and "Ship it?" in shown
    assert f"recua approve r deploy --store {store.url}" in shown, "what to type"
    assert find_steps(load_run(store, "r"), "approval[deploy]")[0].needs == ("event[score]",)
    second.kill()
    second.wait()
    assert type_in("approve", "r", "approval[deploy]", "--comment", "go", store=store)[0] == 0
    third = drive(store, "deploying", "Ship it?")
    value = json.loads(third.communicate(timeout=60)[0])
    assert value["score"] == {"loss": 0.5} and value["comment"] == "go" and "@" in value["who"]
    state = read_journal(store, "r")
    assert list(state.commits) == ["event[score]", "approval[deploy]"] and state.drivers == 3
    assert state.waits["approval[deploy]"]["show"] == {"score": {"loss": 0.5}}
    assert not state.starts, "nothing ran on a cluster"


def test_dynamic_of_two_answers_the_first_wins_and_the_second_is_told(store: Store) -> None:
    driver = Driver(store, program.careful, 600)
    wait_for_question(store, "r", "approval[ask]")
    barrier = threading.Barrier(2)

    def answer(who: str) -> tuple[str, str]:
        barrier.wait()
        try:
            return who, reply(store, "r", "ask", "approval", YES, who)
        except UserError as error:
            return who, f"refused: {error}"

    with ThreadPoolExecutor(2) as pool:
        told = dict(pool.map(answer, ["ana", "ben"]))
    (loser,) = (who for who, text in told.items() if text.startswith("refused"))
    (winner,) = told.keys() - {loser}
    assert told[winner].startswith(f"approval[ask] is approved by {winner}")
    assert f"approval[ask] was already approved by {winner} at " in told[loser]
    assert driver.result() == f"yes from {winner}"
    code, text = type_in("approve", "r", "ask", "--deny", store=store)
    assert code == 2 and f"was already approved by {winner}" in text, "also when the run is over"


def test_dynamic_a_denial_is_a_named_error_and_stays_one(store: Store) -> None:
    driver = Driver(store, program.careful, 600)
    wait_for_question(store, "r", "approval[ask]")
    assert type_in("approve", "r", "ask", "--deny", "--comment", "not today", store=store)[0] == 0
    text = driver.result()
    assert text.startswith("approval[ask]: denied by ") and text.endswith(": not today")
    unhandled = open_store(Path(store.url) / "other")
    driver = Driver(unhandled, program.deploying, "Ship it?")
    wait_for_question(unhandled, "r", "event[score]")
    send(unhandled, "r", "event[score]", 1, "x")
    wait_for_question(unhandled, "r", "approval[deploy]")
    send(unhandled, "r", "approval[deploy]", {"approve": False, "comment": ""}, "ben")
    with pytest.raises(Denied, match=r"^approval\[deploy\]: denied by ben$"):
        driver.result()
    [step] = find_steps(load_run(unhandled, "r"), "approval[deploy]")
    assert step.status == "failed" and step.error is not None and step.error["type"] == "Denied"
    with pytest.raises(Denied):
        Driver(unhandled, program.deploying, "Ship it?").result()


def test_dynamic_a_deadline_counts_from_the_question_through_every_driver(store: Store) -> None:
    began = time.time()
    first = drive(store, "hasty", 2.0)
    wait_for_question(store, "r", "event[late]")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    deadline = read_journal(store, "r").waits["event[late]"]["deadline"]
    assert began < deadline
    wait_for(lambda: time.time() > deadline, "")
    with pytest.raises(StepTimeout, match=r"^event\[late\]: no answer within 2 s"):
        Driver(store, program.hasty, 2.0).result()
    assert read_journal(store, "r").waits["event[late]"]["deadline"] == deadline
    reply(store, "r", "late", "event", 5, "x")
    assert Driver(store, program.hasty, 2.0).result() == 5, "a late answer is taken where the run had failed"


def test_dynamic_a_deadline_that_the_workflow_handles_is_final(store: Store) -> None:
    assert Driver(store, program.careful, 0.2).result().startswith("late: approval[ask]: no answer within 0.2 s")
    with pytest.raises(UserError, match=r"was already given up .*no answer came in time"):
        reply(store, "r", "ask", "approval", YES, "ben")


def test_dynamic_another_question_under_an_old_name_is_refused(store: Store) -> None:
    first = drive(store, "deploying", "Ship it?")
    wait_for_question(store, "r", "event[score]")
    send(store, "r", "event[score]", 1, "x")
    wait_for_question(store, "r", "approval[deploy]")
    first.kill()
    first.wait()
    send(store, "r", "approval[deploy]", YES, "ben")
    metadata = json.loads(store.get("runs/r/run.json") or b"")
    other = open_store(Path(store.url) / "copy")
    for key in store.list("runs/r"):
        other.put(key, store.get(key) or b"")
    metadata |= {"recipe": {"args": ["Sink it?"], "kwargs": {}}}
    metadata["recipe_hash"] = session.recipe_hash(program.deploying, metadata["recipe"])
    other.put("runs/r/run.json", json.dumps(metadata).encode())
    with pytest.raises(NonDeterminismError, match=r"approval\[deploy\] asked 'Ship it\?' before.* asks 'Sink it\?'"):
        Driver(other, program.deploying, "Sink it?").result()


def test_dynamic_the_command_line_names_what_waits(store: Store) -> None:
    driver = Driver(store, program.many, 3)
    wait_for(lambda: len(waiting_calls(read_journal(store, "r"))) == 3)
    assert type_in("send", "r", "e9", "1", store=store) == (2, "nothing in run r waits as 'e9'; did you mean e2?")
    assert "waiting: event[e0], event[e1], event[e2]" in type_in("send", "r", "zz", "1", store=store)[1]
    assert type_in("approve", "r", "e1", store=store) == (2, "event[e1] is not an approval: answer it with recua send")
    assert "needs its own quotes" in type_in("send", "r", "e1", "text", store=store)[1]
    assert "no run 'q'" in type_in("send", "q", "e1", "1", store=store)[1]
    for index in range(3):
        assert type_in("send", "r", f"event[e{index}]", json.dumps({"$n": index}), store=store)[0] == 0
    assert driver.result() == [{"$n": 0}, {"$n": 1}, {"$n": 2}]


def test_dynamic_a_plan_knows_waits(store: Store) -> None:
    settings = RunSettings(store=store.url, run_id="r")
    plan = planning.plan(program.deploying, "Ship it?", settings=settings)
    assert [(call.call_id, call.status) for call in plan.calls] == [
        ("event[score]", "would wait"),
        ("approval[deploy]", "would wait"),
    ]
    assert plan.unknown_after == "approval[deploy]" and plan.calls[1].needs == ("event[score]",)


def test_dynamic_a_thousand_waits_are_one_listing(store: Store) -> None:
    driver = Driver(store, program.many, 1000)
    wait_for(lambda: len(waiting_calls(read_journal(store, "r"))) == 1000)
    assert sum(thread.name == "recua-waits" for thread in threading.enumerate()) == 1
    for index in reversed(range(1000)):
        send(store, "r", f"event[e{index}]", index, "x")
    assert driver.result() == list(range(1000))


def test_dynamic_waits_on_s3(s3_url: str) -> None:
    store = open_store(s3_url)
    driver = Driver(store, program.deploying, "Ship it?")
    wait_for_question(store, "r", "event[score]")
    send(store, "r", "event[score]", 3, "x")
    wait_for_question(store, "r", "approval[deploy]")
    assert send(store, "r", "approval[deploy]", YES, "ana")[0] and not send(store, "r", "approval[deploy]", YES, "b")[0]
    assert driver.result() == {"score": 3, "who": "ana", "comment": ""}


def test_dynamic_the_display_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    display = PlainDisplay()
    data = {"message": "Ship it?", "deadline": None, "command": "recua approve r deploy"}
    display.on_event(Event("waiting", "approval[deploy]", "approval", data))
    assert "approval[deploy] waits: Ship it?: recua approve r deploy" in capsys.readouterr().out
    assert display.steps["approval[deploy]"].status == "waiting"


def test_dynamic_a_question_that_is_no_valid_unicode_is_shown_with_escapes() -> None:
    arguments = encode({"args": [os.fsdecode(b"ship caf\xe9?"), None]})
    record = wait_record("approval[a]", "workflows.waits:approval", (), StepOptions(), arguments, "")
    assert record["message"] == r"ship caf\udce9?"
