"""`--plan`: walk through a workflow without running a step.

Calls are looked up exactly as the executor would. If the workflow needs a result that does not exist yet, the plan ends
there, because later calls depend on it.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.storage import Store, open_store
from workflows.driver.determinism import RecordedPath
from workflows.driver.reuse import Reusable, ReuseLookup
from workflows.driver.session import check_same_recipe, chosen_run
from workflows.driver.settings import RunSettings
from workflows.graph.artifacts import Artifact, ArtifactSource, read_manifest
from workflows.graph.mapping import fan_out
from workflows.graph.steps import Step, StepOptions, Workflow, edges_of, resolve_edges, running
from workflows.graph.values import artifact_records, decode, encode
from workflows.graph.waits import Wait
from workflows.runs.catalog import find_metadata
from workflows.runs.journal import read_journal
from workflows.runs.records import Commit


@dataclass(frozen=True)
class PlannedCall:
    """One call. `status`: committed (in this run), reusable (`reused_from` another run), would run, would wait (for a
    person or an event); of a map "N calls", which follow it, or "known at run time". `seconds`: what it took then."""

    call_id: str
    step: str
    status: str
    num_cpus: float
    num_gpus: float
    memory: int | None
    timeout: float | None
    needs: tuple[str, ...]
    gang: str = ""
    seconds: float | None = None
    reused_from: str | None = None


@dataclass(frozen=True)
class Plan:
    """`unknown_after`: the call whose missing result ended the plan; None if the whole graph is known.
    `stored_bytes`: artifacts of the known calls; `free_bytes`: free space of a folder store, None on S3."""

    run_id: str
    store: str
    calls: tuple[PlannedCall, ...]
    unknown_after: str | None
    warnings: tuple[str, ...]
    stored_bytes: int
    free_bytes: int | None


def plan(workflow: Workflow[..., Any], *args: Any, settings: RunSettings | None = None, **kwargs: Any) -> Plan:
    """The plan of `session.run` with the same arguments. Needs no Ray and writes no run.

    Raises:
        UserError, StoreError: as `run` would before its first step.
    """
    settings = settings or RunSettings()
    store = open_store(settings.store)
    store.check()
    tree = encode({"args": list(args), "kwargs": kwargs}, "the recipe")
    run_id = chosen_run(store, workflow, tree, settings)
    if (metadata := find_metadata(store, run_id)) is not None:
        check_same_recipe(metadata, workflow, tree)
    state = read_journal(store, run_id)
    warnings: list[str] = []
    reuse = settings.reuse and not settings.new
    lookup = ReuseLookup(store, state.commits, reuse, settings.rerun, lambda _, message: warnings.append(message))
    planner = Planner(run_id, store, lookup, ArtifactSource(store.url, settings.cache), RecordedPath(state))
    unknown: str | None = None
    with running(planner):
        try:
            workflow.fn(*args, **kwargs)
        except _Unknown as end:
            unknown = end.call_id
    if unknown is None and all(call.status != "known at run time" for call in planner.calls):
        warnings += lookup.not_rerun()
    free = None if (local := store.local_path("runs")) is None else _free(local)
    return Plan(run_id, store.url, tuple(planner.calls), unknown, tuple(warnings), planner.stored_bytes(), free)


class _Unknown(BaseException):
    """The workflow needs a result that does not exist yet. Not an Exception, so that a workflow cannot catch it."""

    def __init__(self, call_id: str) -> None:
        super().__init__(call_id)
        self.call_id = call_id


class Planner:
    """A Runtime that runs nothing."""

    def __init__(
        self, run_id: str, store: Store, lookup: ReuseLookup, source: ArtifactSource, path: RecordedPath
    ) -> None:
        self.run_id = run_id
        self.calls: list[PlannedCall] = []
        self._store = store
        self._lookup = lookup
        self._source = source
        self._path = path
        self._results: dict[str, Any] = {}

    def call(self, call_id: str, step: Step[..., Any], options: StepOptions, arguments: dict[str, Any]) -> None:
        needs: list[str] = []
        tree = encode(arguments, f"{call_id}: argument", edges_of(self, needs))
        self._plan(call_id, step, options, tree, tuple(needs))

    def _plan(
        self, call_id: str, step: Step[..., Any], options: StepOptions, tree: Any, needs: tuple[str, ...]
    ) -> None:
        record: Commit | Reusable | None = None
        if all(need in self._results for need in needs):
            record = self._look_up(call_id, step, options, tree)
        if record is not None:
            self._results[call_id] = record.result
        pending = "would wait" if isinstance(step, Wait) else "would run"
        status = pending if record is None else "committed" if call_id in self._lookup.commits else "reusable"
        planned = _planned(call_id, step, status, options, needs)
        if record is not None:
            origin = record.run if isinstance(record, Reusable) else record.reused_from
            planned = replace(planned, seconds=record.seconds, reused_from=origin)
        self.calls.append(planned)

    def map(self, call_id: str, step: Step[..., Any], options: StepOptions, items: Any, arguments: Any) -> None:
        fanout = fan_out(self, call_id, items, arguments)
        if any(need not in self._results for need in fanout.waits_for):
            needs = tuple(dict.fromkeys([*fanout.waits_for, *fanout.shared]))
            self.calls.append(_planned(call_id, step, "known at run time", options, needs))
            return
        known = resolve_edges(fanout.items, self._results.__getitem__) if fanout.waits_for else fanout.items
        children = fanout.children(call_id, step.short_name, known)
        self._path.check_map(call_id, len(children))
        status = f"{len(children)} calls"
        nothing = StepOptions(num_cpus=0)
        self.calls.append(_planned(call_id, step, status, nothing, fanout.waits_for))
        for child in children:
            self._plan(child.call_id, step, options, child.arguments, child.needs)
        if all(child.call_id in self._results for child in children):
            self._results[call_id] = [self._results[child.call_id] for child in children]

    def result(self, call_id: str) -> Any:
        if call_id not in self._results:
            raise _Unknown(call_id)
        return decode(self._results[call_id], self._source)

    def done(self, call_id: str) -> bool:
        return call_id in self._results

    def on_end(self, hook: Callable[[], None]) -> None:
        """A plan has no end to clean up after."""

    def stored_bytes(self) -> int:
        """Total size of the artifacts in the known results."""
        records = {entry["digest"]: entry for tree in self._results.values() for entry in artifact_records(tree)}
        artifacts = [Artifact.from_record(entry, self._source) for entry in records.values()]
        return sum(entry.size for artifact in artifacts for entry in read_manifest(self._store, artifact))

    def _look_up(self, call_id: str, step: Step[..., Any], options: StepOptions, tree: Any) -> Commit | Reusable | None:
        arguments = resolve_edges(tree, self._results.__getitem__)
        record = self._lookup.committed(call_id, step, options, arguments)
        if record is not None or not self._lookup.may_reuse(call_id, step, options):
            return record
        return self._lookup.find(step, options, arguments, self._lookup.key(step, options, arguments))


def _planned(
    call_id: str, step: Step[..., Any], status: str, options: StepOptions, needs: tuple[str, ...]
) -> PlannedCall:
    return PlannedCall(
        call_id,
        step.name,
        status,
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        memory=options.memory,
        timeout=options.timeout,
        needs=needs,
        gang="" if options.gang is None else str(options.whole_gang()),
    )


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
