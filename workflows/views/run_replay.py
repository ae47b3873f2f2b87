"""Journals replayed incrementally, for readers that poll: each slot is read once.

A Replay keeps the state of each call and the slot of its last change, so that "changes since slot N" is fast with
10,000 calls. Whole records (arguments, results, tracebacks) stay in the store; `records(call)` reads them again.
RunCache holds the replays of the runs that were read last. Both may be used from several threads.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from infra.errors import StoreError
from infra.storage import Store
from infra.telemetry import redact, shorten
from workflows.graph.values import artifact_records
from workflows.runs.catalog import load_metadata, run_status
from workflows.runs.fold import OPEN, CallState, Head, read_slot
from workflows.runs.journal import slot_key
from workflows.runs.records import CallRecord, Commit, Failed, Json, Record, Wait

MESSAGE_LETTERS = 300


class Replay:
    """One run's journal as far as it has been read.

    `calls`: by id, in order of their first appearance. `producers`: artifact digest -> the first call that returned it.
    `locations`: call -> locations of the artifacts in its result. `names`: digest -> the name that its producer gave
    it.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self.store = store
        self.run_id = run_id
        self.head = Head()
        self.calls: dict[str, CallState] = {}
        self.producers: dict[str, str] = {}
        self.locations: dict[str, list[str]] = {}
        self.names: dict[str, str] = {}
        self.status = "interrupted"
        self._changed: dict[str, int] = {}
        self._slots: dict[str, list[int]] = {}
        self._lock = threading.Lock()

    def refresh(self) -> "Replay":
        """Read the new slots and the run's present status.

        Raises:
            StoreError: a slot is damaged or the store fails.
        """
        with self._lock:
            for slot, blob in self._new_slots():
                self._apply(slot, self._read(slot, blob))
            self.status = run_status(self.store, self.run_id, self.head)
        return self

    @property
    def live(self) -> bool:
        """Whether a driver works on the run."""
        return self.status == "running"

    def since(self, slot: int) -> list[Json]:
        """The rows of the calls that changed after `slot`."""
        with self._lock:
            return [self.row(self.calls[call]) for call, changed in self._changed.items() if changed > slot]

    def row(self, call: CallState) -> Json:
        """{id, step, status, and if known: started, ended, seconds, attempts, node, needs, reused_from, message}."""
        row: Json = {"id": call.id, "step": call.step, "status": call.shown_status(self.live)}
        for name in ("started", "ended", "seconds", "reused_from"):
            if (value := getattr(call, name)) is not None:
                row[name] = value
        if call.attempts:
            row["attempts"] = call.attempts
        if call.node:
            row["node"] = call.node
        if call.needs:
            row["needs"] = list(call.needs)
        if call.error is not None:
            row["message"] = call.error["message"]
        elif call.status.startswith("waiting-for"):
            row["message"] = call.message
        return row

    def counts(self) -> dict[str, int]:
        """Calls by status."""
        with self._lock:
            return dict(Counter(call.shown_status(self.live) for call in self.calls.values()))

    def records(self, call_id: str) -> list[CallRecord]:
        """All journal records of one call, in order."""
        found: list[CallRecord] = []
        for slot in dict.fromkeys(self._slots.get(call_id, ())):
            blob = self.store.get(slot_key(self.run_id, slot))
            if blob is None:
                raise StoreError(f"--store {self.store.url}: run {self.run_id}: journal slot {slot} is missing")
            records = self._read(slot, blob)
            found += [each for each in records if isinstance(each, CallRecord) and each.call == call_id]
        return found

    def commit(self, call_id: str) -> Commit | None:
        """The commit record of one call."""
        return commit_of(self.records(call_id))

    def _new_slots(self) -> Iterator[tuple[int, bytes]]:
        """Read slots one by one until there is none in a folder. A remote store is listed first if many may be new, and
        read by several threads."""
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

    def _read(self, slot: int, blob: bytes) -> list[Record]:
        return read_slot(f"--store {self.store.url}: run {self.run_id}: journal slot {slot}", blob)

    def _apply(self, slot: int, records: Iterable[Record]) -> None:
        before = self.head.lease_slot, self.head.end
        for record in self.head.apply(slot, records):
            call = self.calls.get(record.call)
            if call is None:
                call = self.calls[record.call] = CallState(record.call, record.step)
            call.apply(_light(record))
            self._changed[record.call] = slot
            self._slots.setdefault(record.call, []).append(slot)
            if isinstance(record, Commit):
                self._on_commit(call, record)
        if before != (self.head.lease_slot, self.head.end):
            self._touch_open(slot)

    def _on_commit(self, call: CallState, record: Commit) -> None:
        if not call.needs:  # the record names none: use the producers of the artifacts among its arguments
            digests = artifact_digests(record.arguments)
            call.needs = tuple(dict.fromkeys(self.producers[each] for each in digests if each in self.producers))
        for entry in artifact_records(record.result):
            self.producers.setdefault(entry["digest"], record.call)
            self.locations.setdefault(record.call, []).append(entry["location"])
            self.names.setdefault(entry["digest"], entry["name"])

    def _touch_open(self, slot: int) -> None:
        """Mark running calls as changed: their driver has died, and readers must see these rows again."""
        for call in self.calls.values():
            if call.status in OPEN:
                self._changed[call.id] = slot


class RunCache:
    """The replays of the runs that were read last, and small constant values by key."""

    def __init__(self, runs: int = 16, facts: int = 4096) -> None:
        self._replays: OrderedDict[tuple[str, str, float], Replay] = OrderedDict()
        self._facts: OrderedDict[str, Any] = OrderedDict()
        self._most_runs = runs
        self._most_facts = facts
        self._lock = threading.Lock()

    def replay(self, store: Store, run_id: str, created: float) -> Replay:
        """A run's replay, up to date. `created` distinguishes a run from an earlier one of the same name."""
        key = (store.url, run_id, created)
        with self._lock:
            replay = self._replays.setdefault(key, Replay(store, run_id))
            self._replays.move_to_end(key)
            while len(self._replays) > self._most_runs:
                self._replays.popitem(last=False)
        return replay.refresh()

    def fact(self, key: str, read: Callable[[], Any]) -> Any:
        """The value of the first `read()` under `key`."""
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


def open_run(cache: RunCache, store: Store, run_id: str) -> tuple[Json, Replay]:
    """A run's metadata and its replay, up to date.

    Raises:
        UserError: there is no such run.
    """
    metadata = load_metadata(store, run_id)
    return metadata, cache.replay(store, run_id, metadata["created"])


def artifact_digests(tree: Any) -> Iterator[str]:
    """The digests of the artifacts in an encoded value, or in its identity (where an artifact is its digest)."""
    for found in artifact_records(tree):
        yield found if isinstance(found, str) else found["digest"]


def commit_of(records: list[CallRecord]) -> Commit | None:
    """The commit among the records of one call."""
    return next((record for record in records if isinstance(record, Commit)), None)


def _light(record: CallRecord) -> CallRecord:
    """The record with its texts shortened to the length that a row shows."""
    if isinstance(record, Failed):
        error = record.error or {}
        return replace(record, error={"message": _line(f"{error.get('type')}: {error.get('message')}")})
    return replace(record, message=_line(record.message)) if isinstance(record, Wait) else record


def _line(text: str) -> str:
    text = redact(shorten(text.strip().partition("\n")[0], 100 * MESSAGE_LETTERS))
    return text if len(text) <= MESSAGE_LETTERS else f"{text[: MESSAGE_LETTERS - 3]}..."
