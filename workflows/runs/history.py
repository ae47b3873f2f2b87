"""Progress and metrics of a run in the store: live curves for observers, which remain after the end.

A driver's Recorder gets every event and writes the new ones about every two seconds as
`runs/<run>/history/<lease slot>-<n>.json`, where n is the number of the last point inside. After some batches, one file
with all points so far replaces them. Curves are thinned as they grow (every second point is dropped, and only every
second new one is kept), so that the history of a long run stays small.

    {"format": 1, "curves": [{"call": "sft[0]", "rows": [[number, time, done, total, {metric: value}]]}],
     "texts": [[number, time, kind, call, message]]}
"""

import contextlib
import json
import math
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from infra.errors import StoreError
from infra.storage import Store
from workflows.runs.events import Event

FORMAT = 1
PERIOD_S = 2.0
CURVE_POINTS = 2000
RUN_POINTS = 20_000
TEXTS = 300
TEXT_LENGTH = 500
BATCHES = 32
BATCH_POINTS = 10
"""Most points of one call in one batch: a body reports at most five per second."""

Row = list[Any]
Record = dict[str, Any]


@dataclass
class Curve:
    """The points of one call; one of every `stride` points is kept, and always the last one."""

    rows: list[Row] = field(default_factory=list)
    stride: int = 1
    _pending: int = 0

    def add(self, row: Row, most: int = CURVE_POINTS) -> None:
        if self._pending:
            self.rows[-1] = row  # keep the newest point until the next one that is due
        else:
            self.rows.append(row)
        self._pending = (self._pending + 1) % self.stride
        if len(self.rows) > most:
            self.halve()

    def halve(self) -> None:
        """Keep every second point, and the last."""
        last = self.rows[-1]
        self.rows = self.rows[::2]
        if self.rows[-1] is not last:
            self.rows.append(last)
        self.stride *= 2
        self._pending = 0


class Recorder:
    """An observer of one run. `flush` writes new points at once, `close` the remaining ones. A failing store costs
    points, never the run; other errors of its thread are raised at the next event, so that the observer is dropped."""

    def __init__(self, store: Store, run_id: str, lease_slot: int, period_s: float = PERIOD_S) -> None:
        self._store = store
        self._folder = f"runs/{run_id}/history"
        self._slot = lease_slot
        self._period_s = period_s
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._number = 0
        self._points = 0
        self._curves: dict[str, Curve] = {}
        self._texts: deque[Row] = deque(maxlen=TEXTS)
        self._fresh: dict[str, Curve] = {}
        self._fresh_texts: deque[Row] = deque(maxlen=TEXTS)
        self._keys: list[str] = []
        self._behind = False
        self._failure: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recua-history", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        if self._failure is not None:
            raise self._failure
        data = event.data
        with self._lock:
            if event.kind == "progress":
                self._number += 1
                metrics = {name: _finite(value) for name, value in data["metrics"].items()}
                row = [self._number, event.time, _finite(data["done"]), _finite(data["total"]), metrics]
                self._add(event.call_id, row)
            elif event.kind in ("log", "warning"):
                self._number += 1
                text = [self._number, event.time, event.kind, event.call_id, str(data["message"])[:TEXT_LENGTH]]
                self._texts.append(text)
                self._fresh_texts.append(text)

    def flush(self) -> None:
        self._save(everything=False)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def _add(self, call_id: str, row: Row) -> None:
        self._fresh.setdefault(call_id, Curve()).add(row, BATCH_POINTS)
        curve = self._curves.setdefault(call_id, Curve())
        before = len(curve.rows)
        curve.add(row)
        self._points += len(curve.rows) - before
        if self._points > RUN_POINTS:
            self._shrink()

    def _shrink(self) -> None:
        """Halve the long curves; if there are only short ones, drop those of the oldest calls."""
        mean = self._points / len(self._curves)
        for call_id, curve in list(self._curves.items()):
            if len(curve.rows) >= max(mean, 4):
                curve.halve()
            elif mean < 4 and len(self._curves) > RUN_POINTS // 4:
                del self._curves[call_id]
        self._points = sum(len(curve.rows) for curve in self._curves.values())

    def _run(self) -> None:
        over = False
        while not over:
            over = self._stop.wait(self._period_s)
            self._save(over)

    def _save(self, everything: bool) -> None:
        with contextlib.suppress(StoreError), self._writing:
            everything = everything or self._behind or len(self._keys) >= BATCHES
            self._behind = True  # the next file of all points includes these
            try:
                self._write(everything)
            except StoreError:
                raise
            except Exception as error:
                self._failure = error
                return
            self._behind = False

    def _write(self, everything: bool) -> None:
        with self._lock:
            fresh = bool(self._fresh or self._fresh_texts)
            if not fresh and not (everything and len(self._keys) > 1):
                return
            curves = self._curves if everything else self._fresh
            texts = self._texts if everything else self._fresh_texts
            tree = {
                "format": FORMAT,
                "curves": [{"call": call, "rows": curve.rows} for call, curve in curves.items()],
                "texts": list(texts),
            }
            data = json.dumps(tree, separators=(",", ":")).encode()
            key = f"{self._folder}/{self._slot:08d}-{self._number:010d}.json"
            self._fresh, self._fresh_texts = {}, deque(maxlen=TEXTS)
        self._store.put(key, data, durable=False)
        if everything:
            for old in self._keys:
                if old != key:
                    self._store.delete(old)
            self._keys = []
        self._keys.append(key)


def read_history(store: Store, run_id: str, after: str = "") -> tuple[list[Record], str]:
    """The events since the cursor `after` (empty: all stored ones), in order, and the new cursor.

    An event is {"kind": "progress", "call", "time", "done", "total", "metrics"} (None for what JSON has no number for),
    or {"kind": "log" | "warning", "call", "time", "message"}.
    """
    start = parse_cursor(after)
    found: dict[tuple[int, int], Record] = {}
    for _ in range(2):  # retry if a batch was replaced between listing and reading
        whole = True
        for key in store.list(f"runs/{run_id}/history"):
            name = key.rpartition("/")[2].removesuffix(".json")
            slot, last = (int(part) for part in name.split("-"))
            if (slot, last) <= start:
                continue
            raw = store.get(key)
            whole &= raw is not None
            if raw is not None:
                found.update(_events(slot, json.loads(raw), start))
        if whole:
            break
    end = max(found, default=start)
    return [found[number] for number in sorted(found)], f"{end[0]}:{end[1]}"


def parse_cursor(text: str) -> tuple[int, int]:
    """(lease slot, number) of a cursor; the beginning for any other text."""
    slot, _, number = text.partition(":")
    return (int(slot), int(number)) if slot.isdigit() and number.isdigit() else (0, 0)


def _events(slot: int, tree: Record, start: tuple[int, int]) -> dict[tuple[int, int], Record]:
    found: dict[tuple[int, int], Record] = {}
    for curve in tree["curves"]:
        for number, when, done, total, metrics in curve["rows"]:
            if (slot, number) > start and _finite(done) is not None:
                event = {"kind": "progress", "call": curve["call"], "time": when}
                event |= {"done": done, "total": _finite(total)}
                found[slot, number] = {**event, "metrics": {name: _finite(value) for name, value in metrics.items()}}
    for number, when, kind, call, message in tree["texts"]:
        if (slot, number) > start:
            found[slot, number] = {"kind": kind, "call": call, "time": when, "message": message}
    return found


def _finite(value: Any) -> float | None:
    """A finite number, or None."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
