"""`recua gc`: remove only what no run needs. workflows.runs.gc_marks explains why no run can lose anything.

    plan = plan_gc(store, policy)      what would be removed, what stays and why; changes nothing
    result = collect(store, policy)    removes the runs that the policy names, marks what no run refers to, and deletes
                                       what has been marked for the grace period

A run is closed for good before it is removed: an object `gc/removed/<run>.json` is written, then its lease is taken, so
no driver of it writes another record and its id is never used again. Its artifacts stay while other runs refer to them.
A run that stays loses only the attempts that lost, and only after it has ended.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from infra.errors import StoreError, UserError
from infra.processes import process_start, this_machine
from infra.storage import Store
from infra.storage.files import TEMPORARY_PREFIX
from workflows.graph.values import artifact_records
from workflows.runs.gc_marks import RemovalMarks, read_marks, write_marks
from workflows.runs.journal import Journal, driver_is_gone, lease_key, read_journal, removed_key
from workflows.runs.records import Lease
from workflows.runs.references import Reference, StoreContents, StoredRun, store_contents

LOCK_KEY = "gc/lock.json"
FENCE_TTL_S = 2.0
WRITING_S = 60.0
"""A younger temporary file is kept, however short the grace: a live process may be writing it."""
POLL_S = 0.2
THREADS = 8


@dataclass(frozen=True)
class Policy:
    """Which whole runs are removed: those named, and of the ended ones all but the newest `keep_runs` and those active
    in the last `keep_days`; no run if none of the three is set. `grace_s`: seconds from a mark to the deletion.
    `patience_s`: seconds to wait for the drivers of unfinished runs."""

    runs: tuple[str, ...] = ()
    keep_runs: int | None = None
    keep_days: float | None = None
    grace_s: float = 3600.0
    patience_s: float = 30.0


@dataclass(frozen=True)
class Item:
    """Something that may be removed: a key, or a folder of keys (`key` + "/")."""

    kind: str
    key: str
    size: int


@dataclass(frozen=True)
class Kept:
    """An artifact of a removed run, and the runs that still need it."""

    location: str
    by: tuple[Reference, ...]


@dataclass
class GcPlan:
    """`runs` are removed whole. No run refers to `items`; `due` are those whose grace is over."""

    runs: list[str] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    due: set[str] = field(default_factory=set)
    kept: list[Kept] = field(default_factory=list)


@dataclass
class GcResult:
    """The outcome. `waiting`: runs whose drivers have not acknowledged the marks; if there are any, nothing that is due
    was deleted."""

    removed_runs: list[str]
    deleted: list[Item]
    marked: list[Item]
    kept: list[Kept]
    waiting: list[str]


def plan_gc(store: Store, policy: Policy, now: float | None = None) -> GcPlan:
    """What `collect` would do; changes nothing.

    Raises:
        UserError: a named run does not exist or is running.
        StoreError: an object cannot be read.
    """
    now = time.time() if now is None else now
    chosen = _choose(store_contents(store), policy, now)
    found = store_contents(store, frozenset(chosen))
    plan = GcPlan(chosen)
    marks = read_marks(store)
    for item in _unreferenced(store, found, set(chosen), now - policy.grace_s):
        plan.items.append(item)
        if now - marks.marks.get(item.key, now) >= policy.grace_s:
            plan.due.add(item.key)
    plan.kept = list(_kept(store, found, set(chosen)))
    return plan


def collect(store: Store, policy: Policy) -> GcResult:
    """Remove the policy's runs and the objects that are due; mark others.

    Raises:
        UserError: a named run does not exist or is running, or another gc is running.
        StoreError: an object cannot be read; nothing was deleted.
    """
    with _lock(store):
        plan = plan_gc(store, policy)
        removed = [run_id for run_id in plan.runs if _take_down(store, run_id)]
        now = time.time()
        found = store_contents(store)
        items = {item.key: item for item in _unreferenced(store, found, set(), now - policy.grace_s)}
        before = read_marks(store)
        marks = {key: before.marks.get(key, now) for key in items}
        epoch = before.epoch + 1
        write_marks(store, RemovalMarks(epoch, marks))
        _withdraw(store, items)
        due = {key for key, since in marks.items() if now - since >= policy.grace_s}
        waiting = _unaware(store, epoch, policy) if due else []
        deleted = [] if waiting else _delete(store, [items[key] for key in due], now - policy.grace_s)
        gone = {item.key for item in deleted}
        final = store_contents(store)
        marks = {key: since for key, since in marks.items() if key not in gone and not final.is_referenced(key)}
        write_marks(store, RemovalMarks(epoch, marks))
        kept = list(_kept(store, final, set()))
        return GcResult(removed, deleted, [items[key] for key in marks if key in items], kept, waiting)


def explain(store: Store, digest: str) -> list[str]:
    """Which runs refer to the artifacts whose digest begins with `digest`, and whether they may go; one line each.

    Raises:
        UserError: no run refers to such an artifact.
    """
    found, marks = store_contents(store), read_marks(store)
    locations: dict[str, str] = {}
    for run in found.runs.values():
        for commit in run.state.commits.values():
            for record in artifact_records(commit.result):
                if record["digest"].startswith(digest):
                    locations[record["location"]] = f"{record['name']} {record['digest'][:12]}"
    if not locations:
        raise UserError(f"no run refers to an artifact {digest}: `recua gc` may remove it, or has")
    lines = []
    for location, what in sorted(locations.items()):
        by = [f"run {each.run_id} ({each.call_id or 'its recipe or result'})" for each in found.references[location]]
        lines.append(f"{what} in {location} is needed by {', '.join(by)}")
        lines += [f"{what} is marked, and will be unmarked"] if marks.cover(location) else []
    return lines


# --- what is removed ---


def _choose(found: StoreContents, policy: Policy, now: float) -> list[str]:
    """The runs that the policy removes."""
    for run_id in policy.runs:
        run = found.runs.get(run_id)
        if run is None or not run.is_run:
            raise UserError(f"--run {run_id}: no such run")
        if run.status in ("running", "submitted"):
            raise UserError(f"--run {run_id}: it is {run.status}; `recua cancel {run_id}` first")
    chosen = dict.fromkeys(policy.runs)
    if policy.keep_runs is None and policy.keep_days is None:
        return list(chosen)
    runs = sorted((run for run in found.runs.values() if run.is_run), key=lambda run: run.created, reverse=True)
    for place, run in enumerate(runs):
        newest = policy.keep_runs is not None and place < policy.keep_runs
        recent = policy.keep_days is not None and now - run.last_active < policy.keep_days * 86_400
        if run.state.end is not None and not newest and not recent:
            chosen[run.run_id] = None
    return list(chosen)


def _unreferenced(store: Store, found: StoreContents, leaving: set[str], before: float) -> Iterator[Item]:
    """Everything that no run refers to. `leaving`: runs that count as removed. `before`: only older temporary files."""
    for run in found.runs.values():
        gone = not run.is_run or run.run_id in leaving
        if gone or run.state.end is not None:
            yield from _of_run(store, found, run, gone)
    ended = all(run.state.end is not None for run in found.runs.values() if run.is_run and run.run_id not in leaving)
    for key, size in store.sizes("code"):
        name = key.rpartition("/")[2].removesuffix(".json")
        if ended and name.partition(".")[0] not in found.codes:  # CODE or CODE.STEP, for parameters that count
            yield Item("code records", key, size)
    for key, size in store.sizes("packages"):
        if key.rpartition("/")[2].removesuffix(".zip") not in found.packages:
            yield Item("code packages", key, size)
    for key, size in store.sizes("probe"):
        yield Item("probe files", key, size)
    yield from _temporary(store, min(before, time.time() - WRITING_S))


def _of_run(store: Store, found: StoreContents, run: StoredRun, gone: bool) -> Iterator[Item]:
    """Of a run that ended: attempts that lost and saved states. Of a removed run: all that no other run refers to."""
    base = f"runs/{run.run_id}"
    won = {commit.attempt_id for commit in run.state.commits.values()}
    finished = run.state.end is not None and run.state.end.status == "finished"
    sizes: dict[tuple[str, str], int] = {}
    for key, size in store.sizes(base):
        parts = key.removeprefix(f"{base}/").split("/")
        if parts[0] == "attempts" and len(parts) > 2:
            attempt = f"{base}/attempts/{parts[1]}"
            location = f"{attempt}/{parts[2]}"
            if gone and not found.is_referenced(location):
                unit = ("of removed runs", location if found.is_referenced(attempt) else attempt)
            elif not gone and parts[1] not in won and not found.is_referenced(attempt):
                if not finished and len(parts) == 3:
                    continue  # keep the log of a failure
                unit = ("attempts that lost", attempt if finished else location)
            else:
                continue
        elif gone and parts[0] != "journal":
            unit = ("of removed runs", f"{base}/{parts[0]}")
        elif gone:
            unit = ("of removed runs", f"{base}/journal")
        elif parts[0] == "state" and finished:
            unit = ("saved states", f"{base}/state")
        else:
            continue
        sizes[unit] = sizes.get(unit, 0) + size
    for (kind, key), size in sizes.items():
        yield Item(kind, key, size)


def _temporary(store: Store, before: float) -> Iterator[Item]:
    """Temporary files of writers that died; only folder stores have them. Files inside artifacts do not count."""
    root = store.local_path("")
    if root is None:
        return
    for folder, folders, files in os.walk(root):
        if re.fullmatch(r"runs/[^/]+/attempts/[^/]+/[^/]+/data", os.path.relpath(folder, root)):
            folders.clear()
            continue
        for name in files:
            if name.startswith(TEMPORARY_PREFIX):
                with contextlib.suppress(FileNotFoundError):
                    path = os.path.join(folder, name)
                    status = os.stat(path)
                    if status.st_mtime < before:
                        yield Item("temporary files", os.path.relpath(path, root), status.st_size)


def _kept(store: Store, found: StoreContents, leaving: set[str]) -> Iterator[Kept]:
    for location, by in sorted(found.references.items()):
        owner = location.split("/")[1] if location.startswith("runs/") else ""
        run = found.runs.get(owner)
        if run is not None and (not run.is_run or owner in leaving):
            yield Kept(location, tuple(by))


# --- removing ---


def _take_down(store: Store, run_id: str) -> bool:
    """Close a run for good; False if a driver turned out to be alive."""
    store.put_if_absent(removed_key(run_id), json.dumps({"run": run_id, "time": time.time()}).encode())
    state = read_journal(store, run_id)
    if state.lease is not None and state.end is None:
        try:
            _fence(store, run_id)
        except BaseException as error:  # Ctrl-C while it waits for a driver that may be alive
            store.delete(removed_key(run_id))
            if not isinstance(error, UserError):
                raise
            return False
    store.delete(f"runs/{run_id}/run.json")
    return True


def _fence(store: Store, run_id: str) -> None:
    """Take the run's lease, so that its last driver can commit nothing more. Raises UserError if that driver is
    alive."""
    Journal.acquire(store, run_id, FENCE_TTL_S, of_removed=True)


def _withdraw(store: Store, items: dict[str, Item]) -> None:
    """Delete index entries that lead to a marked object or a removed run."""
    runs: dict[str, bool] = {}

    def is_stale(key: str) -> bool:
        raw = store.get(key)
        try:
            entry = json.loads(raw or b"{}")
            locations = [record["location"] for record in artifact_records(entry["result"])]
            run_id = entry["run"]
        except (ValueError, KeyError, TypeError):
            return True  # a damaged entry: an index may lose any of its entries
        if run_id not in runs:
            runs[run_id] = store.exists(f"runs/{run_id}/run.json")
        marked = any(each in items or each.rpartition("/")[0] in items for each in locations)
        return marked or not runs[run_id]

    def check(key: str) -> None:
        if is_stale(key):
            store.delete(key)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(check, list(store.list("index"))):
            pass


def _unaware(store: Store, epoch: int, policy: Policy) -> list[str]:
    """Runs that may still start to refer to marked objects; waits up to `patience_s` for their drivers."""
    deadline = time.monotonic() + policy.patience_s
    while True:
        waiting = [run_id for run_id in store.folders("runs") if not _is_aware(store, run_id, epoch, policy)]
        if not waiting or time.monotonic() > deadline:
            return waiting
        time.sleep(POLL_S)


def _is_aware(store: Store, run_id: str, epoch: int, policy: Policy) -> bool:
    if not store.exists(f"runs/{run_id}/run.json"):
        return True  # removed: its driver's records no longer count
    state = read_journal(store, run_id)
    if state.lease is None or state.end is not None or driver_is_gone(state.lease):
        return True
    raw = store.get(lease_key(run_id, state.lease_slot))
    beat = json.loads(raw) if raw is not None else {}
    if beat.get("marks", -1) >= epoch:
        return True
    heard = float(beat.get("time") or state.lease.time)
    if time.time() - heard < max(policy.grace_s, 2 * state.lease.ttl_s):
        return False
    try:
        _fence(store, run_id)
    except UserError:
        return False
    return True


def _delete(store: Store, due: list[Item], before: float) -> list[Item]:
    """Read all journals again, and delete what is still unreferenced."""
    found = store_contents(store)
    still = {item.key: item for item in _unreferenced(store, found, set(), before)}
    deleted = [still[item.key] for item in due if item.key in still]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda item: _remove(store, item.key), deleted):
            pass
    for run in found.runs.values():
        if run.removed:
            _remove_empty(store, f"runs/{run.run_id}")
    return deleted


def _remove(store: Store, key: str) -> None:
    """An object or a folder of objects; an artifact's manifest first, so that a partial one never looks whole."""
    folder = store.local_path(key)
    if folder is not None:
        if folder.is_dir():
            for manifest in [folder / "manifest.json", *folder.glob("*/manifest.json")]:
                manifest.unlink(missing_ok=True)
            shutil.rmtree(folder)
        else:
            store.delete(key)
        return
    keys = list(store.list(key))
    for each in sorted(keys, key=lambda name: not name.endswith("/manifest.json")):
        store.delete(each)
    store.delete(key)


def _remove_empty(store: Store, key: str) -> None:
    """Remove folders without a file, below and including `key`."""
    folder = store.local_path(key)
    if folder is None:
        return
    for path, _, _ in sorted(os.walk(folder), reverse=True):
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(path)


@contextlib.contextmanager
def _lock(store: Store) -> Iterator[None]:
    """One gc at a time: the marks have one writer."""
    mine = {"host": socket.gethostname(), "machine": this_machine(), "pid": os.getpid()}
    blob = json.dumps({**mine, "process_start": process_start(os.getpid()), "time": time.time()}).encode()
    while not store.put_if_absent(LOCK_KEY, blob):
        raw = store.get(LOCK_KEY)
        if raw is None:
            continue
        try:
            tree = json.loads(raw)
            holder = Lease(**{name: tree[name] for name in ("host", "machine", "pid", "process_start")})
        except (ValueError, KeyError, TypeError):
            raise StoreError(f"--store {store.url}: {LOCK_KEY} is damaged; delete it if no gc is at work") from None
        if not driver_is_gone(holder):
            raise UserError(
                f"another `recua gc` is at work: process {holder.pid} on {holder.host}; if that is no more, "
                f"delete {LOCK_KEY} from {store.url}"
            )
        store.delete(LOCK_KEY)
    try:
        yield
    finally:
        store.delete(LOCK_KEY)
