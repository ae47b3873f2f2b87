"""The history of a run: bounded, thinned, live for readers with a cursor, on a folder and on S3."""

import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import StoreError
from infra.storage import FolderStore, Store, open_store
from workflows.runs import history
from workflows.runs.events import Event
from workflows.runs.history import Curve, Recorder, read_history


def progress(number: int, call: str = "a[0]", **metrics: float) -> Event:
    return Event("progress", call, "a", {"done": number, "total": 10, "metrics": metrics}, time=float(number))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path if request.param == "folder" else request.getfixturevalue("s3_url"))


def test_service_history_is_read_live_and_after_the_end(store: Store) -> None:
    recorder = Recorder(store, "r", 3, period_s=0.01)
    recorder(progress(1, loss=0.5, broken=float("nan")))
    wait_for(lambda: bool(read_history(store, "r")[0]))
    events, cursor = read_history(store, "r")
    one = {"kind": "progress", "call": "a[0]", "time": 1.0, "done": 1, "total": 10}
    assert events == [{**one, "metrics": {"loss": 0.5, "broken": None}}] and cursor == "3:1"
    recorder(Event("log", "a[0]", "a", {"message": "x" * 2000}, time=2.0))
    recorder(progress(3))
    recorder.close()
    later, end = read_history(store, "r", cursor)
    assert [event["kind"] for event in later] == ["log", "progress"] and len(later[0]["message"]) == 500
    assert end == "3:3" and read_history(store, "r", end) == ([], end)
    assert len(list(store.list("runs/r/history"))) == 1, "the end leaves one file of everything"
    second = Recorder(store, "r", 7, period_s=60)
    second(progress(9))
    second.close()
    assert [event["time"] for event in read_history(store, "r", end)[0]] == [9.0], "the next driver's points come after"
    assert [event["time"] for event in read_history(store, "r")[0]] == [1.0, 2.0, 3.0, 9.0]


def test_service_history_has_only_numbers_that_json_has(store: Store) -> None:
    """An endless total came into the store once: it is read as an unknown one, and a text as nothing."""
    rows = [[1, 1.0, 1, math.inf, {"loss": 0.5}], [2, 2.0, "3", "10", {"loss": "a"}]]
    tree = {"format": 1, "curves": [{"call": "a[0]", "rows": rows}], "texts": []}
    store.put("runs/r/history/00000001-0000000002.json", json.dumps(tree).encode())
    events = read_history(store, "r")[0]
    assert [(event["done"], event["total"], event["metrics"]) for event in events] == [(1, None, {"loss": 0.5})]
    recorder = Recorder(store, "r", 2, period_s=60)
    recorder(Event("progress", "a[0]", "a", {"done": 2, "total": math.inf, "metrics": {"loss": None}}, time=3.0))
    recorder.close()
    last = read_history(store, "r")[0][-1]
    assert (last["done"], last["total"], last["metrics"]) == (2, None, {"loss": None})
    json.dumps(events, allow_nan=False)


def test_service_a_recorder_that_cannot_write_is_heard_of_and_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(open_store(tmp_path), "r", 1, period_s=60)
    recorder(progress(1))

    def broken(*_: object, **__: object) -> bytes:
        raise TypeError("no JSON")

    monkeypatch.setattr(json, "dumps", broken)
    recorder.flush()
    with pytest.raises(TypeError, match="no JSON"):  # by which whoever watches drops it, with a word
        recorder(progress(2))
    recorder.close()


def test_service_history_of_long_curves_is_small(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    recorder = Recorder(store, "r", 1, period_s=60)
    for number in range(100_000):
        recorder(progress(number, loss=1 / (number + 1), reward=number * 0.37, kl=0.1234567890123))
    recorder.close()
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.json")) < 1 << 20
    times = [event["time"] for event in read_history(store, "r")[0]]
    assert times == sorted(times) and times[0] == 0.0 and times[-1] == 99_999.0 and 900 < len(times) <= 2001
    gaps = {later - earlier for earlier, later in itertools.pairwise(times)}
    assert max(gaps) <= 2 * sorted(gaps)[len(gaps) // 2] + 64, "points lie evenly over the whole curve"


def test_service_history_of_many_calls_is_bounded(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    recorder = Recorder(store, "r", 1, period_s=60)
    for number in range(40_000):
        recorder(progress(number, call=f"a[{number // 2}]"))
        recorder(Event("warning", data={"message": f"warning {number}"}))
    recorder.close()
    events = read_history(store, "r")[0]
    assert len([event for event in events if event["kind"] == "progress"]) <= history.RUN_POINTS
    assert len([event for event in events if event["kind"] == "warning"]) == history.TEXTS
    assert events[-2]["call"] == "a[19999]", "the newest calls are there"


def test_service_history_batches_are_replaced_by_one_file(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    recorder = Recorder(store, "r", 1, period_s=0.001)
    for number in range(history.BATCHES + 10):
        recorder(progress(number))
        wait_for(lambda number=number: read_history(store, "r")[1] == f"1:{number + 1}")  # type: ignore[misc]
        assert len(list(store.list("runs/r/history"))) <= history.BATCHES + 2
    recorder.close()
    assert len(read_history(store, "r")[0]) == history.BATCHES + 10


class Shaky(FolderStore):
    """Refuses the first writes."""

    failures = 2

    def put(self, key: str, data: bytes, durable: bool = True) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreError("down")
        super().put(key, data, durable)


def test_service_history_survives_a_store_that_fails_for_a_while(tmp_path: Path) -> None:
    store = Shaky(tmp_path)
    recorder = Recorder(store, "r", 1, period_s=0.01)
    for number in range(3):
        left = store.failures
        recorder(progress(number))
        wait_for(lambda left=left: store.failures < left or not store.failures)  # type: ignore[misc]
    recorder.close()
    assert [event["time"] for event in read_history(store, "r")[0]] == [0.0, 1.0, 2.0]


def test_service_history_reads_again_where_a_batch_was_replaced_meanwhile(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    row = [[1, 1.0, 1, 2, {}]]
    tree = {"format": 1, "curves": [{"call": "a", "rows": row}], "texts": []}
    key = "runs/r/history/00000001-0000000001.json"
    store.put(key, json.dumps(tree).encode())
    get = store.get

    def replaced(wanted: str) -> bytes | None:
        if wanted == key and store.exists(key):
            store.delete(key)
            tree["curves"] = [{"call": "a", "rows": [*row, [2, 2.0, 2, 2, {}]]}]
            store.put("runs/r/history/00000001-0000000002.json", json.dumps(tree).encode())
        return get(wanted)

    store.get = replaced  # type: ignore[method-assign]
    assert [event["done"] for event in read_history(store, "r")[0]] == [1, 2]


def test_service_history_curve_keeps_its_last_point() -> None:
    curve = Curve()
    for number in range(1000):
        curve.add([number], most=10)
        assert curve.rows[-1] == [number] and curve.rows[0] == [0] and len(curve.rows) <= 11
