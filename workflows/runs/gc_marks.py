"""The marks of data that `recua gc` will delete, and the drivers' acknowledgements.

`recua gc` deletes artifacts that no run refers to. A run may start to refer to one at any moment: its driver finds an
equal call in the index and later commits a record that names that call's artifacts. One object, `gc/marks.json` =
{"epoch", "marks": {location: time}}, and one number in every heartbeat make this safe.

1. gc writes the marks with a new epoch N, and withdraws the index entries that lead to them.
2. A driver reads the marks at every heartbeat. A lookup is labelled, before it reads the index, with the epoch that the
   driver has read by then, and takes no result that is marked in it. A lookup labelled N or later therefore never leads
   to a reference to data that epoch N marks: marks stay until they are lifted or their data is deleted.
3. The heartbeat carries the lowest label of the undecided lookups: a lookup is undecided until it finds nothing, or
until
   the slot with its commit is written.
4. gc deletes only after it has accounted for every run that has not ended: its heartbeat says N or more, or its driver
is
   known to be dead, or gc has taken its lease, after which that driver can write no commit. A run that starts later
   reads the marks before its first lookup.
5. Then gc reads all journals again. Every commit from a lookup labelled below N was written before the heartbeat of 4
and
   is seen now; its artifacts are unmarked. No other reference to marked data can arise, so that data that is still
   unreferenced can be deleted, however slow, stopped or cut off any driver is.

The additional grace period is for users, and for work without a lease, such as an import.
"""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.errors import StoreError
from infra.storage import Store
from workflows.graph.values import artifact_records

FORMAT = 1
MARKS_KEY = "gc/marks.json"


@dataclass(frozen=True)
class RemovalMarks:
    """`marks`: key of an artifact, an attempt or another object -> when it was first marked, in seconds."""

    epoch: int = 0
    marks: Mapping[str, float] = field(default_factory=dict)

    def cover(self, location: str) -> bool:
        """Whether an artifact at `location`, or the attempt that it lies in, is marked."""
        return location in self.marks or location.rpartition("/")[0] in self.marks


def read_marks(store: Store) -> RemovalMarks:
    """The marks of the last `recua gc`; none if it never ran.

    Raises:
        StoreError: the object is damaged.
    """
    raw = store.get(MARKS_KEY)
    if raw is None:
        return RemovalMarks()
    try:
        tree = json.loads(raw)
        return RemovalMarks(int(tree["epoch"]), {str(key): float(value) for key, value in tree["marks"].items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StoreError(f"--store {store.url}: {MARKS_KEY} is damaged") from None


def write_marks(store: Store, marks: RemovalMarks) -> None:
    store.put(MARKS_KEY, json.dumps({"format": FORMAT, "epoch": marks.epoch, "marks": dict(marks.marks)}).encode())


class DriverMarks:
    """A driver's side: the marks that were read last, and the undecided lookups. Safe on any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._marks = read_marks(store)
        self._labels: dict[str, int] = {}

    def begin(self, call_id: str) -> None:
        """A lookup for this call is about to read the index."""
        with self._lock:
            self._labels[call_id] = self._marks.epoch

    def end(self, call_id: str) -> None:
        """The lookup is decided: it found nothing, or its commit is written. Does nothing without a lookup."""
        with self._lock:
            self._labels.pop(call_id, None)

    def allow(self, result: Any) -> bool:
        """Whether an encoded result may be reused: none of its artifacts is marked."""
        with self._lock:
            marks = self._marks
        return not marks.marks or not any(marks.cover(record["location"]) for record in artifact_records(result))

    def acknowledge(self) -> int:
        """Read the marks again; returns the epoch that all undecided and later lookups respect."""
        fresh = read_marks(self._store)
        with self._lock:
            self._marks = fresh
            return min(self._labels.values(), default=fresh.epoch)
