"""Journals replayed step by step, for readers that ask again and again: each slot is read once.

A Replay keeps one small row per call and remembers in which slot the row last changed, so that "what is new since slot
N" is quick with 10,000 calls. Whole records (arguments, results, tracebacks) stay in the store; `records(call)` reads
them again. RunCache holds the replays of the runs that were looked at last. Both may be used from several threads.
"""

import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from infra.errors import StoreError
from infra.storage import Store
from infra.telemetry import redact, shorten
from workflows.journal import FORMAT, JournalState, Record, slot_key
from workflows.runs import load_metadata, run_status
from workflows.values import artifact_records

Row = dict[str, Any]
OPEN = ("running", "waiting")
"""Statuses of calls that a driver works on; without a driver they are "interrupted". A call that waits for somebody
outside goes on waiting: the answer may come before the next driver."""
MESSAGE_LETTERS = 300
WAITS = {"workflows.waits:approval": "waiting-for-approval", "workflows.waits:event": "waiting-for-event"}


class Replay:
    """One run's journal as far as it has been read.

    `rows`: call id -> {id, step, status, and where known: started, ended, seconds, attempts, node, needs, reused_from,
    message}, in the order in which calls first appeared. `producers`: artifact digest -> call that returned it first.
    `locations`: call -> where the artifacts in its result lie. `names`: digest -> what its maker called it.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self.store = store
        self.run_id = run_id
        self.head = JournalState()
        self.rows: dict[str, Row] = {}
        self.producers: dict[str, str] = {}
        self.locations: dict[str, list[str]] = {}
        self.names: dict[str, str] = {}
        self.status = "interrupted"
        self._changed: dict[str, int] = {}
        self._slots: dict[str, list[int]] = {}
        self._lock = threading.Lock()

    def refresh(self) -> "Replay":
        """Read the slots that are new, and what the run is doing now.

        Raises:
            StoreError: a slot is damaged or the store fails.
        """
        with self._lock:
            for slot, blob in self._new_slots():
                self._apply(slot, _records(self.store, self.run_id, slot, blob))
            self.status = run_status(self.store, self.run_id, self.head)
        return self

    @property
    def live(self) -> bool:
        """Whether a driver works on the run."""
        return self.status == "running"

    def since(self, slot: int) -> list[Row]:
        """The rows that changed after `slot`, as they are to be shown now."""
        with self._lock:
            return [self.shown(self.rows[call]) for call, changed in self._changed.items() if changed > slot]

    def shown(self, row: Row) -> Row:
        """A row with the status that it has in a run without a driver."""
        return row if self.live or row["status"] not in OPEN else {**row, "status": "interrupted"}

    def counts(self) -> dict[str, int]:
        """Calls by status."""
        with self._lock:
            counted = Counter(row["status"] for row in self.rows.values())
        if not self.live:
            for status in OPEN:
                counted["interrupted"] += counted.pop(status, 0)
        return {status: number for status, number in counted.items() if number}

    def records(self, call_id: str) -> list[Record]:
        """Everything that the journal says of one call, in order."""
        found: list[Record] = []
        for slot in dict.fromkeys(self._slots.get(call_id, ())):
            blob = self.store.get(slot_key(self.run_id, slot))
            if blob is None:
                raise StoreError(f"--store {self.store.url}: run {self.run_id}: journal slot {slot} is missing")
            found += [r for r in _records(self.store, self.run_id, slot, blob) if r.get("call") == call_id]
        return found

    def commit(self, call_id: str) -> Record | None:
        """The commit record of one call."""
        return next((record for record in self.records(call_id) if record["type"] == "commit"), None)

    def _new_slots(self) -> Iterator[tuple[int, bytes]]:
        """A folder is asked for the next slot until there is none; a remote store is listed first where much may be
        new, and read by many hands."""
        slot = self.head.slot + 1
        if slot == 1 and self.store.local_path("runs") is None:
            keys = list(self.store.list(f"runs/{self.run_id}/journal"))
            with ThreadPoolExecutor(min(16, max(1, len(keys)))) as pool:
                for key, blob in zip(keys, pool.map(self.store.get, keys), strict=True):
                    if blob is None or key != slot_key(self.run_id, slot):
                        raise StoreError(f"--store {self.store.url}: run {self.run_id}: journal slot {slot} is missing")
                    yield slot, blob
                    slot += 1
        while (blob := self.store.get(slot_key(self.run_id, slot))) is not None:
            yield slot, blob
            slot += 1

    def _apply(self, slot: int, records: Iterable[Record]) -> None:
        self.head.slot = slot
        for record in records:
            kind = record["type"]
            if kind == "lease":
                self.head.lease, self.head.lease_slot, self.head.end = record, slot, None
                self.head.drivers += 1
                self._touch_open(slot)
            elif kind == "end":
                self.head.end = record
                self._touch_open(slot)
            elif "call" in record:
                self._on_call(slot, kind, record)

    def _on_call(self, slot: int, kind: str, record: Record) -> None:
        call = record["call"]
        row = self.rows.get(call)
        if row is None:
            row = self.rows[call] = {"id": call, "step": record["step"], "status": "running"}
        self._changed[call] = slot
        self._slots.setdefault(call, []).append(slot)
        if needs := record.get("needs"):
            row["needs"] = list(dict.fromkeys(needs))
        if kind == "start":
            row["status"] = "running"
            row["attempts"] = row.get("attempts", 0) + 1
            row["started"] = record["time"]
            row.pop("ended", None)
        elif kind == "attempt-failed":
            row["status"] = "failed" if record["final"] else "waiting"
            row["ended"] = record["time"]
            row["message"] = _line(f"{record['error']['type']}: {record['error']['message']}")
        elif kind == "wait":
            row["status"] = WAITS.get(record["step"], "waiting-for-event")
            row["started"] = record["time"]
            row["message"] = _line(record.get("message") or "")
        elif kind == "commit":
            self._on_commit(row, record)

    def _on_commit(self, row: Row, record: Record) -> None:
        reused = record.get("reused_from")
        row["status"] = "reused" if reused else "committed"
        row |= {name: record[name] for name in ("started", "ended", "seconds")}
        row.pop("message", None)
        if record["node"]:
            row["node"] = record["node"]
        if reused:
            row["reused_from"] = reused
        if "needs" not in row and (needs := self._needs_of(record.get("arguments"))):
            row["needs"] = needs
        for entry in artifact_records(record["result"]):
            self.producers.setdefault(entry["digest"], record["call"])
            self.locations.setdefault(record["call"], []).append(entry["location"])
            self.names.setdefault(entry["digest"], entry["name"])

    def _needs_of(self, arguments: Any) -> list[str]:
        """Edges of a record that names none: who made the artifacts among its arguments."""
        return list(dict.fromkeys(self.producers[d] for d in artifact_digests(arguments) if d in self.producers))

    def _touch_open(self, slot: int) -> None:
        """What was running belongs to a driver that is no more: readers must see these rows again."""
        for call, row in self.rows.items():
            if row["status"] in OPEN:
                self._changed[call] = slot


class RunCache:
    """The replays of the runs that were asked for last, and small facts that never change (by key)."""

    def __init__(self, runs: int = 16, facts: int = 4096) -> None:
        self._replays: OrderedDict[tuple[str, str, float], Replay] = OrderedDict()
        self._facts: OrderedDict[str, Any] = OrderedDict()
        self._most_runs = runs
        self._most_facts = facts
        self._lock = threading.Lock()

    def replay(self, store: Store, run_id: str, created: float) -> Replay:
        """A run's replay, up to date. `created` tells a run from an earlier one of the same name."""
        key = (store.url, run_id, created)
        with self._lock:
            replay = self._replays.setdefault(key, Replay(store, run_id))
            self._replays.move_to_end(key)
            while len(self._replays) > self._most_runs:
                self._replays.popitem(last=False)
        return replay.refresh()

    def fact(self, key: str, read: Callable[[], Any]) -> Any:
        """What `read()` once said under `key`."""
        with self._lock:
            if key in self._facts:
                self._facts.move_to_end(key)
                return self._facts[key]
        value = read()
        with self._lock:
            self._facts[key] = value
            while len(self._facts) > self._most_facts:
                self._facts.popitem(last=False)
        return value


def open_run(cache: RunCache, store: Store, run_id: str) -> tuple[Record, Replay]:
    """A run's metadata and its replay, up to date.

    Raises:
        UserError: there is no such run.
    """
    metadata = load_metadata(store, run_id)
    return metadata, cache.replay(store, run_id, metadata["created"])


def artifact_digests(tree: Any) -> Iterator[str]:
    """The digests of the artifacts in an encoded value, or in its identity (where an artifact is its digest)."""
    if isinstance(tree, list):
        for item in tree:
            yield from artifact_digests(item)
    elif isinstance(tree, dict):
        if "$artifact" in tree:
            found = tree["$artifact"]
            yield found if isinstance(found, str) else found["digest"]
        else:
            for item in tree.values():
                yield from artifact_digests(item)


def _records(store: Store, run_id: str, slot: int, blob: bytes) -> list[Record]:
    where = f"--store {store.url}: run {run_id}: journal slot {slot}"
    try:
        tree = json.loads(blob)
        if tree["format"] != FORMAT:
            raise StoreError(f"{where} has format {tree['format']}, this recua reads {FORMAT}")
        records: list[Record] = tree["records"]
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{where} is damaged") from None
    return records


def _line(text: str) -> str:
    text = redact(shorten(text.strip().partition("\n")[0], 100 * MESSAGE_LETTERS))
    return text if len(text) <= MESSAGE_LETTERS else f"{text[: MESSAGE_LETTERS - 3]}..."
