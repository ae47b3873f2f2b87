"""The journal of a run: numbered slots, each written once by a conditional put.

The driver that writes slot n+1 first owns the run. It takes the lease by writing the next slot, and every batch of
records is the next slot. If a slot already exists, another driver has taken over: FencedError, stop. A driver that
slept past its lease can therefore commit nothing, on a folder and on S3 alike.

Who waits for whom: the executor passes records to GroupCommit and does not wait; GroupCommit's one thread writes the
next slot and then notifies the executor. While a slot is being written, more records gather for the next one, which
keeps the request rate of a slow store low. Heartbeat keeps the lease alive by an object that other drivers watch.

workflows.runs.records defines the records, workflows.runs.fold their meaning.
"""

import json
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from infra.errors import FencedError, RunBusy, StoreError, UserError
from infra.processes import process_start, this_machine
from infra.storage import Store
from workflows.runs.fold import FORMAT, JournalState, read_slot, uncollected
from workflows.runs.records import Lease, Record

Entry = tuple[Record, Callable[[], None] | None]
"""A record, and the function to call when it is written."""


def slot_key(run_id: str, slot: int) -> str:
    return f"runs/{run_id}/journal/{slot:08d}.json"


def lease_key(run_id: str, slot: int) -> str:
    return f"runs/{run_id}/lease/{slot:08d}.json"


def read_journal(store: Store, run_id: str) -> JournalState:
    """Replay a run's slots; the empty state if there are none.

    Raises:
        StoreError: a slot is missing in the middle or cannot be read.
    """
    keys = _listed(store, run_id)
    state = JournalState()
    if store.local_path("runs") is not None:
        blobs: Iterable[bytes | None] = map(store.get, keys)
        _replay(state, store, run_id, keys, blobs)
    elif keys:
        with ThreadPoolExecutor(min(16, len(keys))) as pool:
            _replay(state, store, run_id, keys, pool.map(store.get, keys))
    return state


def _listed(store: Store, run_id: str) -> list[str]:
    """A listing is not atomic: it may have a slot that is written meanwhile, but lack an earlier one."""
    keys: list[str] = []
    for _ in range(3):
        keys = list(store.list(f"runs/{run_id}/journal"))
        if not keys or keys[-1] == slot_key(run_id, len(keys)):
            break
    return keys


def _replay(state: JournalState, store: Store, run_id: str, keys: list[str], blobs: Iterable[bytes | None]) -> None:
    with uncollected():
        for number, (key, blob) in enumerate(zip(keys, blobs, strict=True), start=1):
            if key != slot_key(run_id, number) or blob is None:
                raise StoreError(f"--store {store.url}: run {run_id}: journal slot {number} is missing")
            state.apply(number, read_slot(f"--store {store.url}: {key}", blob))


def driver_is_gone(lease: Lease) -> bool:
    """Whether the lease's driver ran on this machine and its process has ended."""
    return lease.machine == this_machine() and process_start(lease.pid) != lease.process_start


class Journal:
    """The writing side, held by one driver. `acquire` is the only way to get one."""

    def __init__(self, store: Store, run_id: str, owner: str, state: JournalState, ttl_s: float) -> None:
        self.store = store
        self.run_id = run_id
        self.owner = owner
        self.state = state
        self.lease_slot = state.slot
        self.ttl_s = ttl_s
        self.watchers: list[Callable[[int, Sequence[Record]], None]] = []
        """Called with every slot that was written, on the writer's thread."""
        self._next = state.slot + 1

    @classmethod
    def acquire(cls, store: Store, run_id: str, ttl_s: float = 15.0, of_removed: bool = False) -> "Journal":
        """Take the lease: at once if the last driver ended or is known to be dead, else after its heartbeat has not
        changed for the lease's time. `of_removed`: also for a run that is being removed, so that no other driver has
        it.

        Raises:
            RunBusy: another driver is alive.
            UserError: the run was removed.
            StoreError: the store fails.
        """
        owner = uuid.uuid4().hex
        while True:
            state = read_journal(store, run_id)
            if state.lease is not None and state.end is None:
                _wait_for_silence(store, run_id, state.lease, state.lease_slot)
            pid = os.getpid()
            process = (socket.gethostname(), this_machine(), pid, process_start(pid))
            lease = Lease(owner, *process, time=time.time(), ttl_s=ttl_s)
            if store.put_if_absent(slot_key(run_id, state.slot + 1), _slot(owner, [lease])):
                if not of_removed and store.exists(removed_key(run_id)):
                    raise removed(run_id)
                state.apply(state.slot + 1, [lease])
                return cls(store, run_id, owner, state, ttl_s)

    def is_lost(self) -> bool:
        """Whether another driver has taken over; False if the store cannot be read."""
        try:
            return latest_lease(self.store, self.run_id) > self.lease_slot
        except StoreError:
            return False

    def append(self, records: Sequence[Record]) -> None:
        """Write the next slot, durably. Only one thread may call this.

        Raises:
            FencedError: the slot is taken: another driver owns the run.
        """
        if not self.store.put_if_absent(slot_key(self.run_id, self._next), _slot(self.owner, records)):
            raise fenced(self.run_id)
        for watch in self.watchers:
            watch(self._next, records)
        self._next += 1


def removed_key(run_id: str) -> str:
    """The object that marks a run as removed; its id is never used again."""
    return f"gc/removed/{run_id}.json"


def removed(run_id: str) -> UserError:
    return UserError(f"run {run_id} was removed by `recua gc`; give another --run, or `recua import` it")


def fenced(run_id: str) -> FencedError:
    return FencedError(f"run {run_id}: another driver has taken over; this one stops and commits nothing more")


def _slot(owner: str, records: Sequence[Record]) -> bytes:
    tree = {"format": FORMAT, "owner": owner, "records": [record.to_json() for record in records]}
    return json.dumps(tree, separators=(",", ":")).encode()


def _wait_for_silence(store: Store, run_id: str, lease: Lease, slot: int) -> None:
    """Return when the last driver may be replaced. Only changes count, because clocks differ between machines."""
    if driver_is_gone(lease):
        return
    seen = store.get(lease_key(run_id, slot))
    deadline = time.monotonic() + lease.ttl_s
    while time.monotonic() < deadline:
        time.sleep(min(0.2, lease.ttl_s / 10))
        if store.get(lease_key(run_id, slot)) != seen:
            raise RunBusy(
                f"run {run_id} is being driven by process {lease.pid} on {lease.host}; wait for it, "
                f"`recua cancel {run_id}`, or start another run with --new"
            )
        if driver_is_gone(lease):
            return


class Heartbeat:
    """Keeps a lease alive, and notices a cancel request or a successor even while nothing is committed.

    `on_cancel()` and `on_error(error)` are called from its thread, once; `on_beat()` after every beat.
    `acknowledge()` gives a beat's answer to the marks of `recua gc` (workflows.runs.gc_marks).
    `valid_until()` is the wall-clock time until which no other driver can have taken over: an attempt that begins later
    must check the store first.
    """

    def __init__(
        self,
        journal: Journal,
        on_cancel: Callable[[], None],
        on_error: Callable[[BaseException], None],
        on_beat: Callable[[], None] = lambda: None,
        acknowledge: Callable[[], int] = lambda: 0,
    ) -> None:
        self._journal = journal
        self._on_cancel = on_cancel
        self._on_error = on_error
        self._on_beat = on_beat
        self._acknowledge = acknowledge
        self._stop = threading.Event()
        self._valid_until = 0.0
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="recua-lease", daemon=True)
        self._thread.start()

    def valid_until(self) -> float:
        return self._valid_until

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _beat(self, number: int) -> None:
        journal = self._journal
        began = time.time()
        beat = json.dumps({"beat": number, "time": began, "marks": self._acknowledge()}).encode()
        journal.store.put(lease_key(journal.run_id, journal.lease_slot), beat, durable=False)
        self._valid_until = began + 0.8 * journal.ttl_s
        self._on_beat()

    def _run(self) -> None:
        journal, number, told = self._journal, 0, False
        try:
            while not self._stop.wait(journal.ttl_s / 5):
                number += 1
                check_lease(journal.store, journal.run_id, journal.lease_slot)
                self._beat(number)
                if not told and journal.store.exists(cancel_key(journal.run_id, journal.lease_slot)):
                    told = True
                    self._on_cancel()  # keep beating: the lease's holder must still end running attempts
        except BaseException as error:
            self._on_error(error)


def latest_lease(store: Store, run_id: str) -> int:
    """The slot of the newest lease that has a heartbeat."""
    keys = list(store.list(f"runs/{run_id}/lease"))
    return max((int(key.rsplit("/", 1)[-1].removesuffix(".json")) for key in keys), default=0)


def check_lease(store: Store, run_id: str, slot: int) -> None:
    """Check that the run still belongs to the driver whose lease is in this slot and which has a heartbeat.

    Raises:
        FencedError: another driver has taken over.
        StoreError: the driver's objects are gone.
    """
    newest = latest_lease(store, run_id)
    if newest > slot:
        raise fenced(run_id)
    if newest < slot:
        raise StoreError(f"--store {store.url}: run {run_id} has vanished from it while it ran: removed, or unmounted?")


def cancel_key(run_id: str, lease_slot: int) -> str:
    return f"runs/{run_id}/cancel/{lease_slot:08d}"


class GroupCommit:
    """One thread that writes records in batches, in the order in which they came.

    `commit(record, then)`: written as soon as possible, then `then()` is called on the writer's thread. "As soon as
    possible" is `gather()` seconds after the first record of a batch. `note(record)`: written with the next slot, or
    alone after `idle_s`. The first failure is kept in `failure` and passed to `on_error`, and nothing is written after
    it: if an answer was lost for good, the slot may exist.
    """

    def __init__(
        self,
        journal: Journal,
        on_error: Callable[[BaseException], None],
        gather: Callable[[], float] = lambda: 0.0,
        idle_s: float = 0.5,
        written: Callable[[], None] = lambda: None,
    ) -> None:
        self._journal = journal
        self._on_error = on_error
        self._gather_s = gather
        self._idle_s = idle_s
        self._written = written
        self._queue: queue.SimpleQueue[tuple[Record | None, Callable[[], None] | None]] = queue.SimpleQueue()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="recua-journal", daemon=True)
        self._thread.start()

    def commit(self, record: Record, then: Callable[[], None]) -> None:
        self._queue.put((record, then))

    def note(self, record: Record) -> None:
        self._queue.put((record, None))

    def close(self) -> None:
        """Write the remaining records and end the thread."""
        self._queue.put((None, None))
        self._thread.join()

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:
            self.failure = error
            self._on_error(error)

    def _write(self) -> None:
        closing = False
        while not closing:
            batch, closing = self._gather()
            if batch:
                self._journal.append([record for record, _ in batch])
            done = [then for _, then in batch if then is not None]
            if done:
                self._written()
            for then in done:
                then()

    def _gather(self) -> tuple[list[Entry], bool]:
        """The next batch, after a commit (or after notes have waited for `idle_s`), and whether it is the last."""
        batch: list[Entry] = []
        deadline: float | None = None
        while True:
            taken, closing = self._take(deadline)
            batch += taken
            idle = deadline is not None and time.monotonic() >= deadline
            if closing or idle or any(then is not None for _, then in taken):
                return batch, closing
            deadline = deadline or time.monotonic() + self._idle_s

    def _take(self, deadline: float | None) -> tuple[list[Entry], bool]:
        """The records that arrive within `gather()` seconds of the first; empty if the deadline passes first. Later
        records do not wake the thread: a wake-up per record would cost more than writing it."""
        taken: list[Entry] = []
        try:
            record, then = self._queue.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            time.sleep(self._gather_s())
            while record is not None:
                taken.append((record, then))
                record, then = self._queue.get_nowait()
        except queue.Empty:
            return taken, False
        return taken, True
