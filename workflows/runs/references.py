"""All data of a store and the references between them, for `recua gc` and `recua export`."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from infra.errors import StoreError
from infra.storage import Store
from workflows.graph.values import artifact_records
from workflows.runs.catalog import find_metadata, run_status
from workflows.runs.fold import JournalState
from workflows.runs.journal import read_journal, removed_key
from workflows.runs.records import Json

THREADS = 8


@dataclass(frozen=True)
class StoredRun:
    """One folder under `runs/`. `metadata` None: without a run.json it is not (or no longer) a run. `removed`: `recua
    gc` has removed it, and it cannot be opened again. `submission`: the submission to a service, if there was one."""

    run_id: str
    metadata: Json | None
    state: JournalState
    status: str
    removed: bool
    submission: Json | None = None

    @property
    def created(self) -> float:
        return float(self.metadata["created"]) if self.metadata else 0.0

    @property
    def last_active(self) -> float:
        """When it ended, else its last driver's start, else its creation."""
        end, lease = self.state.end, self.state.lease
        return end.time if end else lease.time if lease else self.created

    @property
    def is_run(self) -> bool:
        return self.metadata is not None and not self.removed


@dataclass(frozen=True)
class Reference:
    """A reference to an artifact: from a call of a run, or from the run's recipe or own result (`call` "")."""

    run_id: str
    call_id: str


@dataclass
class StoreContents:
    """All runs, and the references of those that count: location of an artifact -> its references. `attempts`: those
    with such an artifact. `codes` and `packages`: digests of code records and packages in use."""

    runs: dict[str, StoredRun] = field(default_factory=dict)
    references: dict[str, list[Reference]] = field(default_factory=dict)
    attempts: set[str] = field(default_factory=set)
    codes: set[str] = field(default_factory=set)
    packages: set[str] = field(default_factory=set)

    def is_referenced(self, location: str) -> bool:
        """Whether a run refers to the artifact at `location`, or to one inside the attempt at `location`."""
        return location in self.references or location in self.attempts


def store_contents(store: Store, without: frozenset[str] = frozenset()) -> StoreContents:
    """Read every journal of the store. The references of the runs in `without` do not count.

    Raises:
        StoreError: something is unreadable or damaged, so that no data is known to be unreferenced.
    """
    names = list(store.folders("runs"))
    with ThreadPoolExecutor(THREADS) as pool:
        runs = list(pool.map(lambda name: read_run(store, name), names))
    found = StoreContents()
    for run in runs:
        found.runs[run.run_id] = run
        if run.is_run and run.run_id not in without:
            _count(found, run)
    return found


def read_run(store: Store, run_id: str) -> StoredRun:
    """One folder under `runs/`.

    Raises:
        StoreError: its run.json or its journal is damaged.
    """
    removed = store.exists(removed_key(run_id))
    metadata = find_metadata(store, run_id)
    if metadata is None or removed:
        return StoredRun(run_id, None, JournalState(), "removed" if removed else "no run", removed)
    state = read_journal(store, run_id)
    status = run_status(store, run_id, state)
    return StoredRun(run_id, metadata, state, status, removed, _submission(store, run_id))


def references_of(run: StoredRun) -> Iterator[tuple[Json, Reference]]:
    """Every artifact record that a run refers to, with its place."""
    assert run.metadata is not None
    for record in artifact_records(run.metadata.get("recipe")):
        yield record, Reference(run.run_id, "")
    for call, commit in run.state.commits.items():
        for record in artifact_records(commit.result):
            yield record, Reference(run.run_id, call)
    if run.state.end is not None:
        for record in artifact_records(run.state.end.result):
            yield record, Reference(run.run_id, "")


def packages_of(run: StoredRun) -> set[str]:
    """The sha256 of the code package that a service needs to resume a run, if it was submitted to one."""
    return set() if run.submission is None else {run.submission["package"]}


def _submission(store: Store, run_id: str) -> Json | None:
    raw = store.get(f"runs/{run_id}/submission.json")
    try:
        submission: Json | None = None if raw is None else json.loads(raw)
        assert submission is None or isinstance(submission["package"], str)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise StoreError(f"--store {store.url}: runs/{run_id}/submission.json is damaged") from None
    return submission


def _count(found: StoreContents, run: StoredRun) -> None:
    for record, reference in references_of(run):
        found.references.setdefault(record["location"], []).append(reference)
        found.attempts.add(record["location"].rpartition("/")[0])
    for commit in run.state.commits.values():
        found.codes |= {commit.code, commit.libraries}
    found.packages |= packages_of(run)
