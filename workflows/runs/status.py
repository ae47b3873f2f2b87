"""A run's status in one small object beside its journal, so that a list of runs need not replay journals.

The driver writes `runs/<run>/status.json` at every heartbeat and at the end:

    {"format", "status", "time", "slot", "lease_slot", "driver", "counts", "ended"}

`slot` is the last journal slot that it counts: if the journal has a later one, the object is stale and the journal is
replayed. The journal is authoritative; this object may be missing or wrong.
"""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from infra.errors import StoreError
from infra.storage import Store, open_store
from workflows.runs.fold import JournalState
from workflows.runs.journal import Journal, removed_key, slot_key
from workflows.runs.records import CallRecord, Commit, End, Json, Record

FORMAT = 1
COUNTED = ("committed", "reused", "running", "failed", "waiting")
DRIVER = ("host", "pid", "machine", "process_start", "ttl_s")
"""The fields of the driver's lease in the object."""


@dataclass
class Counts:
    """The number of calls in each state. Memory grows only with calls that are not committed."""

    committed: int = 0
    reused: int = 0
    open: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, state: JournalState) -> "Counts":
        """The counts of a replayed journal."""
        counts = cls()
        counts.apply(records[-1] for records in state.calls.values())
        return counts

    def apply(self, records: Iterable[Record]) -> None:
        """Count records, in the journal's order."""
        for record in records:
            if not isinstance(record, CallRecord):
                continue
            if isinstance(record, Commit):
                self.open.pop(record.call, None)
                self.committed += record.status == "committed"
                self.reused += record.status == "reused"
            else:
                self.open[record.call] = record.status

    def numbers(self, alive: bool) -> dict[str, int]:
        """By state; in a run without a driver no call is running."""
        states = Counter(self.open.values())
        waiting = len(self.open) - states["running"] - states["failed"]
        counted = (self.committed, self.reused, states["running"] if alive else 0, states["failed"], waiting)
        return dict(zip(COUNTED, counted, strict=True))


class StatusFile:
    """The driver's side: counts the journal's new records, and writes the object on request. Safe on any thread."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._slot = journal.state.slot
        self._counts = Counts.of(journal.state)
        self._counts.open = {call: what for call, what in self._counts.open.items() if what != "running"}
        self._end: End | None = None
        lease = journal.state.lease
        assert lease is not None
        self._driver = {name: getattr(lease, name) for name in DRIVER}
        journal.watchers.append(self._on_slot)

    def write(self) -> None:
        """Write the object; if that fails, the next beat writes it."""
        with self._lock:
            tree = {
                "format": FORMAT,
                "status": self._end.status if self._end else "running",
                "time": time.time(),
                "slot": self._slot,
                "lease_slot": self._journal.lease_slot,
                "driver": self._driver,
                "counts": self._counts.numbers(alive=self._end is None),
                "ended": self._end.time if self._end else None,
            }
        with contextlib.suppress(StoreError):
            self._journal.store.put(status_key(self._journal.run_id), json.dumps(tree).encode(), durable=False)

    def _on_slot(self, slot: int, records: Sequence[Record]) -> None:
        with self._lock:
            self._slot = slot
            self._counts.apply(records)
            self._end = next((record for record in records if isinstance(record, End)), self._end)


def status_key(run_id: str) -> str:
    return f"runs/{run_id}/status.json"


def read_status(store: Store, run_id: str) -> Json | None:
    """The object; None if it is missing, damaged or older than the journal."""
    raw = store.get(status_key(run_id))
    try:
        tree: Json = json.loads(raw or b"null") or {}
        if tree.get("format") != FORMAT or store.exists(slot_key(run_id, tree["slot"] + 1)):
            return None
    except (ValueError, KeyError, AttributeError):
        return None
    return tree


def standing(store_url: str, run_id: str) -> Literal["open", "stopped", "over"]:
    """A run's standing, for processes that it left behind: "open": it runs, or has lost its driver; "stopped": it has
    ended and may be resumed; "over": it is finished or removed. Cheap enough to call every second.

    Raises:
        StoreError: the store fails.
    """
    store = open_store(store_url)
    if store.exists(removed_key(run_id)):
        return "over"
    status = read_status(store, run_id)
    if status is None or status["ended"] is None:
        return "open"
    return "over" if status["status"] == "finished" else "stopped"
