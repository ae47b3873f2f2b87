"""The driver without Ray: who does what on which thread, and what a workflow's thread is handed."""

import functools
import json
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.errors import StepError, UserError
from workflows.driver import attempts, executor, session
from workflows.driver.call import Call
from workflows.driver.ends import Ends
from workflows.driver.loop import Loop
from workflows.driver.ray_tasks import Done
from workflows.driver.settings import RunSettings
from workflows.graph import StepOptions, step, workflow

DEADLINE_S = 60.0
LOOP, WORKFLOW = "recua-loop", threading.main_thread().name


class Answering:
    """A placement that runs nothing: a thread of its own answers every call with its first argument, or with the error
    that this names."""

    is_local = True

    def __init__(self, *given: Any) -> None:
        self._submitted: queue.SimpleQueue[tuple[bytes, Done]] = queue.SimpleQueue()
        threading.Thread(target=self._answer, daemon=True).start()

    def nodes(self) -> list[dict[str, float]]:
        return [{"CPU": 2.0}]

    def at_once(self, options: StepOptions) -> int:
        return 2

    def submit(self, call_id: str, step: str, options: StepOptions, text: bytes, done: Done) -> object:
        self._submitted.put((text, done))
        return object()

    def _answer(self) -> None:
        while True:
            text, done = self._submitted.get()
            done(json.dumps([self._outcome(call) for call in json.loads(text)["calls"]]).encode(), None)

    def _outcome(self, call: dict[str, Any]) -> dict[str, Any]:
        value = call["arguments"]["args"][0]
        outcome = {"ok": True, "result": value, "started": 0.0, "seconds": 0.001, "node": "n", "pid": 1}
        if value == "fails":
            error = {"kind": "user", "type": "ValueError", "message": "told to fail", "traceback": ""}
            return {**outcome, "ok": False, "error": error}
        return outcome

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: {"start": "127.0.0.1"}.get(name)


@step
def same(x: Any) -> Any:
    raise AssertionError("its body never runs here")


@workflow
def mixed() -> list[Any]:
    """A chain, a map over a result, and a failure that the workflow handles."""
    first = same(same([1, 2]))
    many = same.map(first)
    with pytest.raises(StepError, match="told to fail"):
        same.options(may_fail=True)("fails").result()
    return [*many.result(), same(3).result()]


@workflow
def unseen_failure() -> None:
    same("fails")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSettings:
    monkeypatch.setattr(attempts, "RayTasks", Answering)
    return RunSettings(store=str(tmp_path / "store"), backoff_s=0.001)


def test_only_the_loops_thread_touches_what_the_loop_owns(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any, **more: Any) -> Any:
            seen.setdefault(name, set()).add(threading.current_thread().name)
            return method(*arguments, **more)

        return call

    for owner in (executor.Executor, attempts.Attempts):
        for name, method in list(vars(owner).items()):
            if callable(method) and name != "__init__":
                monkeypatch.setattr(owner, name, watched(f"{owner.__name__}.{name}", method))
    assert session.run(mixed, settings=settings).value == [1, 2, 3]
    any_thread = {"Executor.begin", "Executor.abort", "Attempts.crowded"}
    closing = {"Executor.check_path", "Executor.stop", "Executor.leave"}
    closing |= {"Attempts.wait_until_none_runs", "Attempts.close"}
    assert {name for name, threads in seen.items() if threads != {LOOP}} <= any_thread | closing
    assert all(seen[name] == {WORKFLOW} for name in closing)
    assert {"Executor._on_map", "Executor._on_committed", "Executor._fail", "Attempts._on_outcome"} <= seen.keys()


def test_a_failure_that_nobody_asked_for_ends_the_run(settings: RunSettings) -> None:
    with pytest.raises(StepError, match=r"same\[0\]: ValueError: told to fail"):
        session.run(unseen_failure, settings=settings)


def made(call_id: str, **options: Any) -> Call:
    return Call(call_id, same, StepOptions(**options), {}, (), {})


def waits(work: Callable[[], None]) -> Callable[[], BaseException | None]:
    """Start `work` on another thread; the result waits for its end and gives what it raised."""
    raised: list[BaseException | None] = [None]

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised[0] = error

    thread = threading.Thread(target=run)
    thread.start()

    def join() -> BaseException | None:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        return raised[0]

    return join


def test_a_waiting_thread_hears_of_its_call_of_a_failure_and_of_the_end_of_the_run() -> None:
    ends, first, second, handled = Ends(), made("a"), made("b"), made("c", may_fail=True)
    for call in (first, second, handled):
        ends.opened(call)
    join = waits(lambda: ends.wait_for(first))
    ends.ended(first)
    assert join() is None and first.awaited == 0
    handled.error = UserError("handled")
    ends.ended(handled)
    join = waits(ends.wait_for_all)
    second.error = UserError("unhandled")
    ends.ended(second)
    assert join() is second.error, "and not the one that the workflow handles itself"
    ends.wait_for_all()  # it is told once
    ends.opened(first)
    join, error = waits(ends.wait_for_all), RuntimeError("the store is gone")
    ends.abort(error)
    ends.abort(RuntimeError("a later one"))
    assert join() is error and ends.fatal is error


def test_a_question_to_the_loop_is_answered_on_its_thread() -> None:
    errors: list[BaseException] = []
    loop = Loop(errors.append, lambda: 0.0)
    loop.start()
    order: list[int] = []
    for number in range(3):
        loop.post(order.append, number)
    assert loop.ask(lambda x: (x, list(order), threading.current_thread().name), 7) == (7, [0, 1, 2], LOOP)
    with pytest.raises(UserError, match="no"):
        loop.ask(_refuse)
    assert not errors, "what a question raises is its answer, and no fault of the loop"
    loop.close()


def _refuse() -> None:
    raise UserError("no")
