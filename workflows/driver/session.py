"""Running a workflow from start to end: the choice of the run, the lease, the display, and the clean-up."""

import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from infra.errors import FencedError, NonDeterminismError, StoreError, UserError
from infra.fault_injection import FaultSchedule
from infra.storage import Store, open_store
from infra.telemetry import hide_secrets_in_logs
from workflows.driver.call import ClusterCheck, RunContext
from workflows.driver.executor import Cancelled
from workflows.driver.reuse import ReuseLookup
from workflows.driver.runtime import WorkflowRuntime
from workflows.driver.settings import RunSettings
from workflows.graph.artifacts import ArtifactSource
from workflows.graph.inputs import IDENTITY
from workflows.graph.steps import Workflow, running
from workflows.graph.values import decode, differences, earlier_identity, encode, identity, named_arguments
from workflows.identity.keys import canonical
from workflows.runs.catalog import RUN_ID, find_metadata
from workflows.runs.events import Event
from workflows.runs.history import Recorder
from workflows.runs.journal import Journal, fenced, read_journal, removed, removed_key
from workflows.runs.records import End, Json
from workflows.worker.failures import describe

FORMAT = 1
Observer = Callable[[Event], None]


@dataclass(frozen=True)
class RunResult:
    """The result of a run. `already_finished`: it had finished before, and nothing ran now."""

    run_id: str
    store: str
    value: Any
    already_finished: bool


def run(
    workflow: Workflow[..., Any],
    *args: Any,
    settings: RunSettings | None = None,
    observers: Sequence[Observer] = (),
    on_end: Sequence[Callable[[], None]] = (),
    on_cluster: Sequence[ClusterCheck] = (),
    term_cancels: bool = True,
    **kwargs: Any,
) -> RunResult:
    """Run `workflow(*args, **kwargs)`, resume its run, or return the result of its finished run.

    `observers` get every Event, on the driver's loop thread. `on_end` hooks are called at every end of the run.
    `on_cluster` checks see the cluster's nodes before the first step starts, and may refuse them. SIGTERM acts as
    Ctrl-C; without `term_cancels` it ends this process, and the run stays open for another driver.

    Raises:
        StepError, UserError, SystemFault: the error that ended the run; committed steps stay, and the next start
            resumes the run.
        FencedError: another driver has taken over.
        StoreError: the store failed.
        KeyboardInterrupt: Ctrl-C; running steps are killed first, and the run can be resumed.
    """
    hide_secrets_in_logs()
    settings = settings or RunSettings()
    store = open_store(settings.store)
    store.check()
    run_id, metadata = open_run(store, workflow, {"args": list(args), "kwargs": kwargs}, settings)
    source = ArtifactSource(store.url, settings.cache)
    state = read_journal(store, run_id)
    if state.end is not None and state.end.status == "finished":
        return RunResult(run_id, store.url, decode(state.end.result, source), True)
    del state  # it is large for a long run
    journal = Journal.acquire(store, run_id, settings.lease_s)
    with closing(Recorder(store, run_id, journal.lease_slot)) as recorder:
        emit = _emitter([*observers, recorder])
        faults = FaultSchedule.parse(settings.faults) if settings.faults else FaultSchedule.from_environment()
        lookup = ReuseLookup(store, journal.state.commits, metadata["reuse"], tuple(metadata["rerun"]), _warner(emit))
        context = RunContext(journal, settings, faults, emit, tuple(on_cluster))
        runtime = WorkflowRuntime(context, lookup)
        for hook in on_end:
            runtime.on_end(hook)
        data = {"run_id": run_id, "workflow": workflow.name, "store": store.url, "resumed": len(lookup.commits)}
        with _on_term(_interrupt if term_cancels else _leave):
            tree = _drive(runtime, workflow, args, kwargs, Event("run-started", data=data), emit, recorder)
        for message in lookup.not_rerun():
            emit(Event("warning", data={"message": message}))
    return RunResult(run_id, store.url, decode(tree, source), False)


def recipe_hash(workflow: Workflow[..., Any], arguments: Any) -> str:
    """The identity of a run: the workflow's name and its arguments."""
    return _hash(workflow, identity(arguments))


def _earlier_hash(workflow: Workflow[..., Any], arguments: Any) -> str:
    """The same as earlier versions computed it; usually equal."""
    return _hash(workflow, earlier_identity(arguments))


def _hash(workflow: Workflow[..., Any], reduced: Any) -> str:
    recipe = hashlib.sha256(canonical(reduced)).hexdigest()
    return hashlib.sha256(canonical([workflow.name, recipe])).hexdigest()[:10]


def chosen_run(store: Store, workflow: Workflow[..., Any], arguments: Any, settings: RunSettings) -> str:
    """The run of these settings: the one that they name, or as `find_run`.

    Raises:
        UserError: an invalid name.
    """
    fresh = settings.new or bool(settings.rerun)
    run_id = find_run(store, workflow, arguments, fresh) if settings.run_id is None else settings.run_id
    if not re.fullmatch(RUN_ID, run_id):
        raise UserError(f"run id {run_id!r}: use letters, digits, dot, dash and underscore, at most 128, in --run")
    return run_id


def find_run(store: Store, workflow: Workflow[..., Any], arguments: Any, fresh: bool) -> str:
    """The newest run id of this workflow and recipe, or the next one if `fresh`."""
    name = plain_name(workflow.short_name)
    base, earlier = (f"{name}-{made(workflow, arguments)}" for made in (recipe_hash, _earlier_hash))
    if earlier != base and (begun := find_metadata(store, earlier)) and "identity" not in begun:
        base = earlier  # a run that an earlier version began keeps its name
    taken, gone = [0], [0]
    for names, numbers in ((store.folders("runs"), taken), (removed_runs(store), gone)):
        for each in names:
            if match := re.fullmatch(re.escape(base) + r"(?:-(\d+))?", each):
                numbers.append(int(match.group(1) or 1))
    newest = max(*taken, *gone)
    number = newest + 1 if fresh or newest in gone else newest
    return base if number == 1 else f"{base}-{number}"


def plain_name(name: str) -> str:
    """A function's name as part of a run id: `entraîner` gives "entrainer", `_nightly` "nightly"."""
    ascii_letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return ascii_letters.lstrip("_")[:100] or "workflow"


def removed_runs(store: Store) -> Iterator[str]:
    """Ids of the runs that `recua gc` removed."""
    for key in store.list("gc/removed"):
        yield key.rpartition("/")[2].removesuffix(".json")


def open_run(store: Store, workflow: Workflow[..., Any], arguments: Json, settings: RunSettings) -> tuple[str, Json]:
    """The run's id and metadata; writes the metadata if the run is new."""
    tree = encode(arguments, "the recipe")
    fresh = settings.new or bool(settings.rerun)
    run_id = chosen_run(store, workflow, tree, settings)
    if store.exists(removed_key(run_id)):
        raise removed(run_id)
    mine: Json = {
        "format": FORMAT,
        "run_id": run_id,
        "workflow": workflow.name,
        "recipe": tree,
        "recipe_hash": recipe_hash(workflow, tree),
        "identity": IDENTITY,
        "created": time.time(),
        "reuse": settings.reuse and not settings.new,
        "rerun": list(settings.rerun),
    }
    if store.put_if_absent(f"runs/{run_id}/run.json", json.dumps(mine).encode()):
        return run_id, mine
    if fresh:
        raise UserError(f"run {run_id} already exists: --new and --rerun start a run, give another --run or none")
    theirs = find_metadata(store, run_id)
    if theirs is None:
        raise StoreError(f"--store {store.url}: run {run_id} has vanished")
    check_same_recipe(theirs, workflow, tree)
    return run_id, theirs


def check_same_recipe(metadata: Json, workflow: Workflow[..., Any], arguments: Any) -> None:
    """Raises NonDeterminismError, naming the difference, if a run was started with another workflow or recipe."""
    known = [recipe_hash(workflow, arguments)]
    if "identity" not in metadata:
        known.append(_earlier_hash(workflow, arguments))
    if metadata.get("recipe_hash") in known:
        return
    if metadata["workflow"] != workflow.name:
        changes = f"workflow {metadata['workflow']}, now {workflow.name}"
    else:
        before, now = (named_arguments(workflow.fn, identity(tree)) for tree in (metadata["recipe"], arguments))
        changes = "; ".join(differences(before, now))
    raise NonDeterminismError(
        f"run {metadata['run_id']} was started with another recipe ({changes}); give another --run"
    )


def _drive(
    runtime: WorkflowRuntime,
    workflow: Workflow[..., Any],
    args: Sequence[Any],
    kwargs: Json,
    started: Event,
    emit: Observer,
    recorder: Recorder,
) -> Any:
    """Run the workflow function, and always end the run."""
    began = time.monotonic()
    outcome: Json | None = None
    status = "failed"
    try:
        emit(started)
        with running(runtime):
            tree = runtime.finish(workflow.fn(*args, **kwargs))
        recorder.flush()  # before the end, so that readers of the end see all metrics
        status, outcome = "finished", {"result": tree}
        return tree
    except (KeyboardInterrupt, Cancelled) as error:
        cancelled = {"kind": "cancelled", "type": type(error).__name__, "message": str(error)}
        status, outcome = "cancelled", {"error": cancelled}
        raise
    except FencedError:
        status = "fenced"
        raise
    except BaseException as error:
        if runtime.is_lost():  # a driver that slept for long may have failed with any error
            status = "fenced"
            raise fenced(runtime.run_id) from error
        if error is not runtime.fatal or not isinstance(error, StoreError):  # a failing store ends no run
            outcome = {"error": _failure_record(error)}
        raise
    finally:
        with _uninterrupted():
            try:
                runtime.close(None if outcome is None else End(status, time.time(), **outcome))
            except StoreError as error:
                status = "fenced" if isinstance(error, FencedError) else "failed"
                raise
            finally:
                emit(Event("run-ended", data={"status": status, "seconds": time.monotonic() - began}))


def _failure_record(error: BaseException) -> Json:
    """The error of an `end` record."""
    record = describe(error)
    if trace := getattr(error, "user_traceback", ""):
        record["traceback"] = trace
    return record


def _interrupt(number: int, frame: Any) -> None:
    """SIGTERM (from a stopped job, a scheduler) cancels the run like Ctrl-C."""
    raise KeyboardInterrupt


def _leave(number: int, frame: Any) -> None:
    """SIGTERM means that this machine will end; the run stays open."""
    os.write(1, b"recua: SIGTERM ends this driver; the run stays open for the next one\n")
    os._exit(128 + number)


@contextmanager
def _on_term(handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore a second Ctrl-C during the clean-up, which would leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _emitter(observers: Sequence[Observer]) -> Observer:
    """One of several observers. An observer that raises is dropped with a message, because watching a run must not end
    it."""
    active = list(observers)

    def emit(event: Event) -> None:
        for observer in list(active):
            try:
                observer(event)
            except Exception as error:
                with suppress(ValueError):  # it has also failed in another thread
                    active.remove(observer)
                with suppress(OSError, ValueError):
                    print(f"recua: dropping an observer that failed: {error!r}", file=sys.stderr, flush=True)

    return emit


def _warner(emit: Observer) -> Callable[[str, str], None]:
    return lambda call_id, message: emit(Event("warning", call_id, data={"message": message}))
