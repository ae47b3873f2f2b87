"""Drives submitted runs to their ends: one driver process per run, restarted if it dies before its run has ended.

One thread checks every active run about once a second; HTTP threads add and stop runs. While the driver lives, a check
only looks at its process; the store is read if it has died, or to see whether it still makes progress. A run whose
lease another driver holds (on another machine, or started by `recua resume`) is watched and gets no second driver.
"""

import json
import shutil
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from infra.errors import RecuaError, RunBusy, StoreError, UserError
from infra.processes import this_machine
from infra.storage import Store
from infra.telemetry import redact
from workflows.runs.catalog import ask_to_stop, run_status, submission_key
from workflows.runs.fold import JournalState
from workflows.runs.journal import Journal, driver_is_gone, lease_key, read_journal
from workflows.runs.records import End, Lease
from workflows.service.drivers import packages, processes, records
from workflows.service.drivers.logs import DriverLog
from workflows.service.drivers.processes import Process, Record
from workflows.service.schemas import Submission

SYNC_PERIOD_S = 3.0
BEAT_PERIOD_S = 5.0
SILENT_LEASES = 3.0
"""A live driver whose heartbeat has not changed for this many lease times is stopped or stuck, and is killed."""
QUICK_DEATH_S = 60.0
QUICK_DEATHS = 5
"""A driver that dies this often, each time within the time above and without a commit, is not restarted."""
LONGEST_PAUSE_S = 60.0
LEAVING_S = 60.0


@dataclass
class Driven:
    """This process's state of an active run, which a restart can rebuild. Times are monotonic.

    `after`: ends up to this journal slot are old ones. `process`: its driver, alive or just found dead. `committed`:
    calls that were committed when the driver started. `deaths`: early deaths in a row. `beat`: key and content of the
    heartbeat; `beat_at`: its last change; `ttl_s`: the lease's duration. `leaving`: the driver of an earlier end, which
    may still be cleaning up. `withdrawn`: the run must be cancelled.
    """

    run_id: str
    after: int
    process: Process | None = None
    log: DriverLog | None = None
    started: float = 0.0
    committed: int = 0
    deaths: int = 0
    not_before: float = 0.0
    beat: tuple[str, bytes | None] = ("", None)
    beat_at: float = 0.0
    ttl_s: float = 0.0
    leaving: Process | None = None
    looked: float = 0.0
    withdrawn: bool = False


class Supervisor:
    """The Control of the HTTP service. `address`: the cluster's, for drivers. `nodes()`: each node's resources."""

    def __init__(
        self, store: Store, address: str, folder: Path, nodes: Callable[[], list[dict[str, float]]], period_s: float = 1
    ) -> None:
        self.store = store
        self._address = address
        self._folder = folder
        self._nodes = nodes
        self._period_s = period_s
        self._lock = threading.RLock()
        self._submitting = threading.Lock()
        self._runs: dict[str, Driven] = {}
        self._synced = float("-inf")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="recua-supervisor", daemon=True)

    def start(self) -> list[str]:
        """Find the active runs and start to drive them; returns their ids."""
        self._sync()
        self._thread.start()
        return sorted(self._runs)

    def close(self) -> list[str]:
        """Stop, and end the service's drivers without an end record: the runs stay active for the next service. Returns
        their ids."""
        self._stop.set()
        self._thread.join(timeout=30)
        with self._lock:
            for driven in list(self._runs.values()):
                if self._has_ended(driven, read_journal(self.store, driven.run_id)):
                    records.deactivate(self.store, driven.run_id)  # its driver may still write the report
                    del self._runs[driven.run_id]
                elif (found := processes.started(self._folder / driven.run_id)) and found[0] == driven.process:
                    driven.process.kill()  # a driver that a user started in a terminal is left alone
                if driven.log is not None:
                    driven.log.send(final=True)
            return sorted(self._runs)

    def alive(self) -> bool:
        return self._thread.is_alive()

    # --- what clients ask for ---

    def has_package(self, sha256: str) -> bool:
        return self.store.exists(packages.package_key(sha256))

    async def put_package(self, sha256: str, content: AsyncIterator[bytes]) -> None:
        await packages.receive(self.store, sha256, content)

    def submit(self, submission: Submission) -> Record:
        """Check a submission as `recua run` would, store it, and start its driver.

        Raises:
            UserError: `recua run` would refuse it (with the same message), or the store lacks its package.
        """
        if not self.has_package(submission.package):
            raise UserError(f"package {submission.package[:12]} is not in the store: send it first")
        self._folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="check-", dir=self._folder))
        try:
            task = {"store": self.store.url, "submission": submission.model_dump(), "nodes": self._nodes()}
            processes.fill(scratch, self.store, submission.package, task)
            with self._submitting:  # the number of a new run is counted, then taken
                outcome = processes.check(scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if "run_id" not in outcome:
            raise _as_error(outcome, submission)
        run_id = str(outcome["run_id"])
        record = {"format": records.FORMAT, "submitted": time.time(), **submission.model_dump(), "run_id": run_id}
        return {"run_id": run_id, "status": self._accept(run_id, record)}

    def _accept(self, run_id: str, record: Record) -> str:
        with self._lock:
            state = read_journal(self.store, run_id)
            status = run_status(self.store, run_id, state)
            if status not in ("finished", "running"):
                self.store.put(submission_key(run_id), json.dumps(record).encode())
                records.activate(self.store, run_id, state.slot)
                driven = self._adopted(run_id, state.slot)
                if state.end is not None:
                    driven.leaving, driven.process = driven.process, None
                self._runs[run_id] = driven
                status = "submitted"
            return status

    def cancel(self, run_id: str) -> str:
        status = ask_to_stop(self.store, run_id)
        with self._lock:
            if (driven := self._runs.get(run_id)) is not None:
                driven.withdrawn = True
        return "cancelling" if status == "running" else status

    def resume(self, run_id: str) -> str:
        record = records.read_submission(self.store, run_id)
        return self._accept(run_id, record)

    def is_active(self, run_id: str) -> bool:
        """Whether this service resumes the run if its driver dies."""
        return run_id in self._runs

    def active(self) -> list[str]:
        return sorted(self._runs)

    # --- the thread ---

    def _loop(self) -> None:
        while not self._stop.wait(self._period_s):
            try:
                if time.monotonic() - self._synced > SYNC_PERIOD_S:
                    self._sync()
            except StoreError as error:
                _say(f"the list of active runs cannot be read: {error}")
                continue
            for driven in list(self._runs.values()):
                self._guarded(driven)

    def _guarded(self, driven: Driven) -> None:
        """Check one run; its errors must not affect other runs."""
        try:
            with self._lock:
                try:
                    self._look(driven)
                except (RunBusy, StoreError):
                    raise
                except Exception as error:
                    _say(f"run {driven.run_id}: {traceback.format_exc()}")
                    driven.deaths += 1
                    self._die(driven, f"the service cannot start its driver: {error}")
        except RunBusy:
            driven.not_before = time.monotonic() + SYNC_PERIOD_S  # another driver was faster: watch it
        except StoreError as error:
            _say(f"run {driven.run_id}: {error}")
            driven.not_before = time.monotonic() + SYNC_PERIOD_S

    def _sync(self) -> None:
        """Add runs that another process activated, and drop those that it deactivated."""
        listed = set(records.active_runs(self.store))
        self._synced = time.monotonic()
        with self._lock:
            for run_id in listed - self._runs.keys():
                after = records.active_after(self.store, run_id)
                if after is not None:  # else it has ended since the list was made
                    self._runs[run_id] = self._adopted(run_id, after)
            for run_id in self._runs.keys() - listed:
                self._runs[run_id].withdrawn = records.active_after(self.store, run_id) is None

    def _look(self, driven: Driven) -> None:
        now = time.monotonic()
        if driven.process is not None and driven.process.alive():
            if driven.log is not None:
                driven.log.send()
            if now - driven.looked > (BEAT_PERIOD_S if not driven.withdrawn else 0.0):
                driven.looked = now
                self._check_living(driven, driven.process)
            return
        if now < driven.not_before:
            return
        state = read_journal(self.store, driven.run_id)
        lease = state.lease if state.end is None else None
        if self._has_ended(driven, state):
            self._forget(driven)
        elif lease is not None and not driver_is_gone(lease):
            self._watch_other(driven, lease, state.lease_slot)
        elif driven.withdrawn:
            self._end(driven, "cancelled", {"kind": "cancelled", "type": "Cancelled", "message": "cancelled"})
        elif driven.process is not None:
            self._died(driven, len(state.commits))
        elif driven.leaving is None or not driven.leaving.alive() or now - driven.started > LEAVING_S:
            self._start(driven, len(state.commits))

    def _has_ended(self, driven: Driven, state: JournalState) -> bool:
        """Whether the run has ended; an older end, which a resume must replace, does not count."""
        return state.end is not None and (state.end.status == "finished" or state.lease_slot > driven.after)

    def _start(self, driven: Driven, committed: int) -> None:
        run_id, folder = driven.run_id, self._folder / driven.run_id
        submission = records.read_submission(self.store, run_id)
        task = {"store": self.store.url, "run_id": run_id, "address": self._address, "submission": submission}
        processes.fill(folder, self.store, submission["package"], task)
        number = len(list(self.store.list(f"runs/{run_id}/driver"))) + 1
        driven.log = DriverLog(self.store, run_id, number, folder)
        driven.process = processes.start(folder, driven.log.file, number)
        driven.started = driven.looked = driven.beat_at = time.monotonic()
        driven.beat, driven.committed = ("", None), committed
        _say(f"run {run_id}: driver {number} is process {driven.process.pid}")

    def _died(self, driven: Driven, committed: int) -> None:
        """Handle a driver that died before its run ended."""
        outcome = processes.read(self._folder / driven.run_id / "outcome.json") or {}
        if outcome.get("kind") == "user":
            self._end(driven, "failed", {"kind": "refused", "type": "UserError", "message": str(outcome["error"])})
            return
        quick = time.monotonic() - driven.started < QUICK_DEATH_S and committed == driven.committed
        driven.deaths = driven.deaths + 1 if quick and outcome.get("kind") != "busy" else 0
        self._die(driven, str(outcome.get("error") or "it was killed"))

    def _die(self, driven: Driven, why: str) -> None:
        driven.process = None
        if driven.log is not None:
            driven.log.send(final=True)
        if driven.deaths >= QUICK_DEATHS:
            message = f"its driver died {driven.deaths} times soon after its start, the last time: {why}"
            error = {
                "kind": "system",
                "type": "SystemFault",
                "message": message,
                "traceback": driven.log.tail() if driven.log else "",
            }
            self._end(driven, "failed", error)
            return
        pause = min(LONGEST_PAUSE_S, 2.0 ** (driven.deaths - 1)) if driven.deaths else 0.0
        driven.not_before = time.monotonic() + pause
        _say(f"run {driven.run_id}: its driver died ({why}); restarting it in {pause:g} s")

    def _watch_other(self, driven: Driven, lease: Lease, slot: int) -> None:
        """Handle a run that another driver works on. If its process is on this machine, adopt it."""
        process = _process(lease)
        if process is not None:
            driven.process, driven.beat = process, ("", None)
            driven.started = driven.looked = time.monotonic()
        elif self._still_for(driven, lease_key(driven.run_id, slot)) > lease.ttl_s:
            driven.process = None
            self._start(driven, 0)  # the journal makes it wait once more before it takes the lease
        else:
            driven.not_before = time.monotonic() + min(SYNC_PERIOD_S, lease.ttl_s / 5)

    def _check_living(self, driven: Driven, process: Process) -> None:
        """Pass on a cancellation; kill a driver whose heartbeat does not change, because it blocks its run."""
        if not driven.beat[0]:
            state = read_journal(self.store, driven.run_id)
            if state.lease is not None and process == _process(state.lease):
                driven.beat, driven.beat_at = (lease_key(driven.run_id, state.lease_slot), None), time.monotonic()
                driven.ttl_s = state.lease.ttl_s
        if driven.withdrawn and driven.beat[0]:
            ask_to_stop(self.store, driven.run_id)
        elif driven.withdrawn:
            process.kill()  # it was only starting
        if driven.beat[0] and self._still_for(driven, driven.beat[0]) > SILENT_LEASES * driven.ttl_s:
            _say(f"run {driven.run_id}: killing driver {process.pid}, whose heartbeat has stopped")
            process.kill()

    def _still_for(self, driven: Driven, key: str) -> float:
        """Seconds since this process last saw the heartbeat change."""
        content = self.store.get(key)
        if (key, content) != driven.beat:
            driven.beat, driven.beat_at = (key, content), time.monotonic()
        return time.monotonic() - driven.beat_at

    def _end(self, driven: Driven, status: str, error: Record) -> None:
        """Write the end of a run that no driver will end. Raises RunBusy if a driver works on it after all."""
        journal = Journal.acquire(self.store, driven.run_id)
        journal.append([End(status, time.time(), error=error)])
        _say(f"run {driven.run_id} is {status}: {error['message']}")
        self._forget(driven)

    def _forget(self, driven: Driven) -> None:
        if driven.log is not None:
            driven.log.send(final=True)
        shutil.rmtree(self._folder / driven.run_id, ignore_errors=True)
        records.deactivate(self.store, driven.run_id)
        self._runs.pop(driven.run_id, None)

    def _adopted(self, run_id: str, after: int) -> Driven:
        """A run's state with the live driver, if any, that an earlier service on this machine started."""
        folder = self._folder / run_id
        driven = Driven(run_id, after)
        driven.started = driven.beat_at = time.monotonic()
        found = processes.started(folder)
        if found is not None and found[0].alive():
            driven.process, number = found
            driven.log = DriverLog(self.store, run_id, number, folder)
        return driven


def _process(lease: Lease) -> Process | None:
    return Process(lease.pid, lease.process_start or "") if lease.machine == this_machine() else None


def _as_error(outcome: Record, submission: Submission) -> RecuaError:
    """The error for the client of a submission whose check failed."""
    text = str(outcome.get("error", "unknown"))
    if outcome.get("kind") == "store":
        return StoreError(text)
    if outcome.get("kind") in ("user", "busy"):
        return UserError(text)
    return UserError(f"workflow {submission.workflow_file}: {text}")


def _say(text: str) -> None:
    print(f"recua service on {socket.gethostname()}: {redact(text)}", flush=True)
