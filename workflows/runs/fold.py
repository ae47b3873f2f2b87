"""The journal of a run, folded slot by slot: the only code that interprets a sequence of records.

`Head` is the run's driver, `CallState` the state of one call. JournalState also keeps every record, for readers that
need results; workflows.views.run_replay keeps only the states.
"""

import contextlib
import gc
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from infra.errors import StoreError
from workflows.runs.records import CallRecord, Commit, End, Failed, Json, Lease, Record, Start, Wait, from_json

FORMAT = 1
OPEN = ("running", "waiting")
"""Statuses of calls that a driver works on. A call that waits for an outside answer also waits without a driver: the
answer may come before the next driver."""


@dataclass
class Head:
    """A run's driver. `replaced`: leases of drivers that were replaced, oldest first."""

    slot: int = 0
    lease: Lease | None = None
    lease_slot: int = 0
    end: End | None = None
    drivers: int = 0
    replaced: list[Lease] = field(default_factory=list)

    def apply(self, slot: int, records: Iterable[Record]) -> list[CallRecord]:
        """Fold the next slot; returns its records of calls."""
        self.slot = slot
        of_calls: list[CallRecord] = []
        for record in records:
            if isinstance(record, CallRecord):
                of_calls.append(record)
            elif isinstance(record, Lease):
                if self.lease is not None and self.end is None:
                    self.replaced.append(self.lease)
                self.lease, self.lease_slot, self.end = record, slot, None
                self.drivers += 1
            elif isinstance(record, End):
                self.end = record
        return of_calls


@dataclass(slots=True)
class CallState:
    """The state of one call. Times are seconds since the epoch; None if not reached yet.

    `status`: running, waiting (its last attempt failed and another is due), failed, waiting-for-approval,
    waiting-for-event, committed, reused. `began`: its first record; `started`: its last attempt. `message`: the
    question of a wait; `error`: that of the last failed attempt, until there is a result.
    """

    id: str
    step: str
    status: str = "running"
    began: float = 0.0
    started: float | None = None
    ended: float | None = None
    seconds: float | None = None
    attempts: int = 0
    node: str = ""
    needs: tuple[str, ...] = ()
    reused_from: str | None = None
    message: str = ""
    error: Json | None = None

    @classmethod
    def of(cls, records: list[CallRecord]) -> "CallState":
        """The state after all records of one call."""
        state = cls(records[0].call, records[0].step)
        for record in records:
            state.apply(record)
        return state

    def apply(self, record: CallRecord) -> None:
        """Fold the next record of this call."""
        self.status = record.status
        if record.needs:
            self.needs = tuple(dict.fromkeys(record.needs))
        if isinstance(record, Commit):
            self.started, self.ended, self.seconds = record.started, record.ended, record.seconds
            self.node, self.reused_from, self.error = record.node, record.reused_from, None
        elif isinstance(record, Failed):
            self.ended, self.error = record.time, record.error
        elif isinstance(record, Start):
            self.started, self.ended = record.time, None
            self.attempts += 1
        elif isinstance(record, Wait):
            self.started, self.message = record.time, record.message
        self.began = self.began or self.started or 0.0

    def shown_status(self, live: bool) -> str:
        """The status in a run with (`live`) or without a driver."""
        return self.status if live or self.status not in OPEN else "interrupted"


@dataclass
class JournalState(Head):
    """The content of all slots. `calls`: the records of each call, in order."""

    calls: dict[str, list[CallRecord]] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    waits: dict[str, Wait] = field(default_factory=dict)

    @property
    def starts(self) -> dict[str, list[Start]]:
        """By call, of those that have any."""
        found = {call: [each for each in records if isinstance(each, Start)] for call, records in self.calls.items()}
        return {call: starts for call, starts in found.items() if starts}

    @property
    def failures(self) -> dict[str, list[Failed]]:
        """By call, of those that have any."""
        found = {call: [each for each in records if isinstance(each, Failed)] for call, records in self.calls.items()}
        return {call: failures for call, failures in found.items() if failures}

    def forget(self) -> None:
        """Drop the records of single calls, so that a driver's memory does not grow with earlier work."""
        self.calls, self.commits = {}, {}

    def apply(self, slot: int, records: Iterable[Record]) -> list[CallRecord]:
        of_calls = super().apply(slot, records)
        for record in of_calls:
            self.calls.setdefault(record.call, []).append(record)
            if isinstance(record, Commit):
                assert record.call not in self.commits, f"two commit records for {record.call}"
                self.commits[record.call] = record
            elif isinstance(record, Wait):
                self.waits[record.call] = record
        return of_calls


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Pause garbage collection while many slots are read: their records have no cycles, and searching for some takes as
    long as reading."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def read_slot(where: str, blob: bytes) -> list[Record]:
    """The records in a slot, without types that only newer versions know. `where`: for messages.

    Raises:
        StoreError: the slot is damaged, or has another format.
    """
    try:
        tree = json.loads(blob)
        if tree["format"] != FORMAT:
            raise StoreError(f"{where} has format {tree['format']}, this recua reads {FORMAT}")
        found = [from_json(record) for record in tree["records"]]
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{where} is damaged") from None
    return [record for record in found if record is not None]
