"""What fails under a driver in the middle of a run: its observers, its store, its own bookkeeping. Without Ray."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.errors import StepError, StoreError
from infra.storage import open_store
from workflows.driver import attempts, session
from workflows.driver.ray_tasks import Done
from workflows.driver.session import Observer, RunResult
from workflows.driver.settings import RunSettings
from workflows.graph import StepOptions, step, workflow
from workflows.runs.events import Event
from workflows.runs.signals import read_signal, signal_key
from workflows.runs.status import StatusFile
from workflows.worker.failures import describe

DEADLINE_S = 60.0


class Bodies:
    """A placement that runs no body: each one ends with 7, when `gate` is open, or with `error`."""

    is_local = True

    def __init__(self, error: BaseException | None = None) -> None:
        self.gate = threading.Event()
        self.begun = threading.Event()
        self.closed = 0
        self._outcome: dict[str, Any] = {"ok": True, "result": 7}
        if error is not None:
            self._outcome = {"ok": False, "error": describe(error)}

    def __call__(self, *settings: Any) -> "Bodies":
        return self

    def nodes(self) -> list[dict[str, float]]:
        return [{"CPU": 1.0}]

    def is_lost(self) -> bool:
        return False

    def at_once(self, options: StepOptions) -> int:
        return 1

    def submit(self, call_id: str, step: str, options: StepOptions, text: bytes, done: Done) -> object:
        threading.Thread(target=self._run, args=(text, done)).start()
        return object()

    def _run(self, text: bytes, done: Done) -> None:
        self.begun.set()
        assert self.gate.wait(DEADLINE_S)
        outcome = {"started": time.time(), "seconds": 0.001, "node": "n", "pid": 1, **self._outcome}
        done(json.dumps([outcome] * len(json.loads(text)["calls"])).encode(), None)

    def close(self) -> None:
        self.closed += 1

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: "127.0.0.1" if name == "start" else None


@step
def seven() -> int:
    raise AssertionError("its body never runs here")


@workflow
def one() -> int:
    return seven().result()


@workflow
def two() -> int:
    return seven().result() + seven().result()


Run = Callable[..., RunResult]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a workflow; no thread of it may be left."""
    before = set(threading.enumerate())

    def begin(bodies: Bodies, *observers: Observer, flow: Any = one) -> RunResult:
        monkeypatch.setattr(attempts, "RayTasks", bodies)
        settings = RunSettings(store=str(tmp_path / "store"), lease_s=1, backoff_s=0.001)
        return session.run(flow, settings=settings, observers=observers)

    yield begin
    deadline = time.monotonic() + DEADLINE_S
    while left := [each.name for each in set(threading.enumerate()) - before if each.name.startswith("recua")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def opened(error: BaseException | None = None) -> Bodies:
    bodies = Bodies(error)
    bodies.gate.set()
    return bodies


@pytest.mark.parametrize("kind", ["run-started", "committed"])
def test_an_observer_that_exits_ends_the_run_and_nothing_holds_its_lease(run: Run, kind: str) -> None:
    """A heartbeat that was left behind would keep every other driver away."""

    def leave(event: Event) -> None:
        if event.kind == kind:
            raise SystemExit(3)

    with pytest.raises(SystemExit):
        run(opened(), leave)
    assert run(opened()).value == 7


def test_an_observer_whose_terminal_is_gone_is_dropped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be said of it meets the same closed pipe."""

    class Gone:
        def write(self, text: str) -> None:
            raise BrokenPipeError("nobody reads")

        flush = write

    def show(event: Event) -> None:
        raise BrokenPipeError("nobody reads")

    monkeypatch.setattr("sys.stdout", Gone())
    monkeypatch.setattr("sys.stderr", Gone())
    assert run(opened(), show).value == 7


def test_a_store_that_is_removed_under_a_run_is_named_as_that(run: Run, tmp_path: Path) -> None:
    """Not as another driver, which nobody would find."""
    bodies = Bodies()

    def remove(event: Event) -> None:
        if event.kind == "committed":
            (tmp_path / "store" / "runs").rename(tmp_path / "elsewhere")
            bodies.gate.clear()

    bodies.gate.set()
    with pytest.raises(StoreError, match="has vanished from it while it ran"):
        run(bodies, remove, flow=two)
    bodies.gate.set()


def test_what_fails_at_the_end_keeps_neither_the_lease_nor_ray(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: StatusFile) -> None:
        raise RuntimeError("no status")

    def break_status(event: Event) -> None:
        monkeypatch.setattr(StatusFile, "write", fail)

    bodies = opened()
    with pytest.raises(RuntimeError, match="no status"):
        run(bodies, break_status)
    assert bodies.closed == 1


def test_a_damaged_answer_is_named_with_its_object(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    key = signal_key("r", "approval[x]")
    store.put(key, b"{half")
    with pytest.raises(StoreError, match=f"{key} is damaged .*: remove it, and answer again"):
        read_signal(store, key)


def test_an_error_class_of_the_users_is_not_taken_for_ours_by_its_name(run: Run) -> None:
    class FencedError(Exception):
        pass

    with pytest.raises(StepError, match="FencedError: the garden's"):
        run(opened(FencedError("the garden's")))


def test_an_error_that_interrupts_when_it_is_shown_is_told_all_the_same() -> None:
    class Interrupts(Exception):
        def __str__(self) -> str:
            raise KeyboardInterrupt

    record = describe(Interrupts())
    assert record["type"] == "Interrupts" and "KeyboardInterrupt in its __str__" in record["message"]
