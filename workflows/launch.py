"""From a workflow file and a recipe to a run: what `recua run`, `recua resume` and a script's own start have in common.

A workflow file has one @workflow function. It may define

    RECIPE = SomeSettings           the recipe's schema; the workflow gets one argument of it. Without it, the recipe's
                                    top-level keys are the workflow's arguments, checked against their annotations
                                    (workflows.keywords)
    RECIPE_FILE = "recipes/x.toml"  the recipe when none is named, relative to the root of the file's packages
    def preflight(recipe): ...      raises a UserError (infra.machine has checks) before anything is started
    def check_cluster(recipe, nodes): ...   the same, with what each node has ({"CPU": 2.0, "GPU": 1.0, ...})
    def on_finish(result): ...      called with the RunResult of a finished run, before its report is written
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from infra.config import Settings, build, read_tree
from infra.errors import UserError
from infra.machine import local_resources, require_ray
from infra.storage import Store, open_store
from workflows.config import RunSettings
from workflows.graph import Workflow
from workflows.keywords import arguments_of
from workflows.names import canonical_module, load_name, module_of_file
from workflows.progress import Display, open_display

if TYPE_CHECKING:
    from workflows.session import RunResult

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """A workflow with its arguments, ready to be planned or run."""

    module: ModuleType
    workflow: Workflow[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def preflight(self) -> None:
        """The workflow file's own checks."""
        check = getattr(self.module, "preflight", None)
        if check is not None:
            check(*self.args, **self.kwargs)

    def check_cluster(self, nodes: list[dict[str, float]]) -> None:
        """The workflow file's own check of what the cluster has."""
        check = getattr(self.module, "check_cluster", None)
        if check is not None:
            check(*self.args, nodes=nodes, **self.kwargs)


def load_workflow_file(file: Path) -> ModuleType:
    """Import a workflow file under its canonical name, so that a script, `recua run` and a job mean the same module.

    Raises:
        UserError: no such file, it belongs to another copy of recua, or it cannot be imported.
    """
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"workflow {file}: no such Python file")
    name, root = module_of_file(file)
    _import_from(root, file.resolve().parent)
    main = sys.modules["__main__"]
    if Path(getattr(main, "__file__", None) or "").resolve() == file.resolve() and canonical_module("__main__") == name:
        _check_package(name, root, file)
        return main
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"workflow {file}: {error}") from error
    if Path(module.__file__ or "").resolve() != file.resolve():
        raise UserError(f"workflow {file}: {name} is already loaded from {module.__file__}; use the recua of that copy")
    return module


def prepare(file: Path, recipe: str | None, overrides: Sequence[str]) -> Launch:
    """Load the file, find its workflow, validate the recipe.

    Raises:
        UserError: what is wrong, naming file or setting.
    """
    module = load_workflow_file(file)
    if recipe is None and (default := getattr(module, "RECIPE_FILE", None)):
        recipe = str(module_of_file(file)[1] / default)
    return with_recipe(module, file, read_tree(recipe), recipe or "recipe", overrides)


def with_recipe(
    module: ModuleType, file: Path, tree: dict[str, Any], source: str, overrides: Sequence[str] = ()
) -> Launch:
    """The file's workflow with a recipe that was read from `source`, and overrides; validates both.

    Raises:
        UserError: what is wrong, naming file or setting.
    """
    workflow = find_workflow(module, file)
    schema = getattr(module, "RECIPE", None)
    if schema is None:
        return Launch(module, workflow, *arguments_of(workflow, tree, source, overrides))
    assert isinstance(schema, type) and issubclass(schema, Settings), "RECIPE must be a class of settings"
    return Launch(module, workflow, (build(tree, schema, source, overrides),), {})


def find_workflow(module: ModuleType, file: Path) -> Workflow[..., Any]:
    """The one @workflow function that the file itself defines."""
    found = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, Workflow) and value.fn.__module__ == module.__name__
    }
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise UserError(f"workflow {file}: expected one @workflow function, found {names}")
    return next(iter(found.values()))


def is_finished(launch: Launch, store: Store, settings: RunSettings) -> bool:
    """Whether `run` would only show a result."""
    from workflows.journal import read_journal
    from workflows.session import find_run
    from workflows.values import encode

    tree = encode({"args": list(launch.args), "kwargs": launch.kwargs}, "the recipe")
    fresh = settings.new or bool(settings.rerun)
    run_id = settings.run_id or find_run(store, launch.workflow, tree, fresh)
    end = read_journal(store, run_id).end
    return end is not None and end["status"] == "finished"


def run(
    launch: Launch, settings: RunSettings, reports: Path, display: Display | None = None, watched: bool = False
) -> Path | None:
    """Run to the end with a live display, then write the report; returns the page's path, None where that failed: what
    comes after a run's end is told as a warning, and changes nothing of how the run ended.

    `watched`: the caller ends the process when its cluster is gone, which may also come back, and starts another when
    it is told to end; otherwise an address where no Ray answers is refused, and SIGTERM cancels the run.

    Raises:
        RecuaError, KeyboardInterrupt: as workflows.session.run.
    """
    from workflows import session

    store = open_store(settings.store)
    store.check()
    if not is_finished(launch, store, settings):
        launch.preflight()
        if not watched:
            require_ray(settings.ray_address or os.environ.get("RAY_ADDRESS"), "--address (or RAY_ADDRESS)")
        if not (settings.ray_address or os.environ.get("RAY_ADDRESS") or settings.ray_options):
            launch.check_cluster([local_resources()])  # the cluster will be this machine: refuse before a run is made
    with display or open_display() as shown:
        result = session.run(
            launch.workflow,
            *launch.args,
            settings=settings,
            observers=[shown.on_event],
            on_cluster=[launch.check_cluster],
            term_cancels=not watched,
            **launch.kwargs,
        )
    if result.already_finished:
        shown.say(f"run {result.run_id} has finished already; nothing ran (--new starts another)")
    finish = getattr(launch.module, "on_finish", None)
    if finish is not None:
        _after_the_end(shown, f"on_finish of {launch.module.__name__}", lambda: finish(result))
    else:
        _after_the_end(shown, "showing its result", lambda: _show_result(shown, result))
    again = f"the report (write it with `recua report {result.run_id}`)"
    return _after_the_end(shown, again, lambda: _report(store, result.run_id, reports, shown))


def _after_the_end(shown: Display, what: str, work: Callable[[], T]) -> T | None:
    """A run that has finished stays finished, whatever fails when it is told of."""
    try:
        return work()
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        shown.say(f"warning: the run has finished, but {what} failed: {type(error).__name__}: {error}")
        return None


def _show_result(shown: Display, result: "RunResult") -> None:
    from workflows.values import encode, one_line

    if text := one_line(encode(result.value, "the workflow's result")):
        shown.say(f"result: {text}")


def _report(store: Store, run_id: str, reports: Path, shown: Display) -> Path:
    from workflows import report
    from workflows.runs import load_run

    record = report.read_run(store, load_run(store, run_id))
    page = report.write(record, reports / run_id)
    for name in ("report.html", "report.json"):  # a job's own folder may vanish with its cluster; the store does not
        store.put(f"runs/{run_id}/{name}", (page.parent / name).read_bytes())
    for line in report.table_lines(report.summarise(record)):
        shown.say(line)
    shown.say(f"report: {page.absolute()}")
    return page


def resume(store: Store, run_id: str, settings: RunSettings, reports: Path) -> Path | None:
    """Go on with a run by its id alone: workflow and recipe are in the store.

    Raises:
        UserError: no such run, or its workflow can no longer be imported.
    """
    import json

    from workflows.artifacts import ArtifactSource
    from workflows.runs import load_run
    from workflows.values import decode

    load_run(store, run_id)
    _import_from(Path.cwd(), None)
    metadata = json.loads(store.get(f"runs/{run_id}/run.json") or b"{}")
    workflow = load_name(metadata["workflow"])
    if not isinstance(workflow, Workflow):
        raise UserError(f"run {run_id}: {metadata['workflow']} is no @workflow any more")
    arguments = decode(metadata["recipe"], ArtifactSource(store.url, settings.cache))
    module = sys.modules.get(workflow.fn.__module__) or importlib.import_module(workflow.fn.__module__)
    launch = Launch(module, workflow, tuple(arguments["args"]), arguments["kwargs"])
    return run(launch, settings.model_copy(update={"run_id": run_id}), reports)


def import_code(name: str) -> Any:
    """The object behind `module:name`, as a command that was given no file finds it: from the working folder.

    Raises:
        UserError: there is none.
    """
    _import_from(Path.cwd(), None)
    return load_name(name)


def _check_package(name: str, root: Path, file: Path) -> None:
    """A script inside a package must not run with another copy's package (an editable install of another clone)."""
    package = name.rpartition(".")[0].partition(".")[0]
    loaded = Path(sys.modules[package].__file__ or "").resolve().parent if package in sys.modules else root / package
    if loaded != root / package:
        raise UserError(
            f"workflow {file}: package {package} came from {loaded}; set PYTHONPATH={root}, or use that copy"
        )


def _import_from(root: Path, script_folder: Path | None) -> None:
    """Put `root` first on sys.path. A script's own folder, which Python put there, would shadow packages: take it out
    where it is inside a package."""
    if script_folder is not None and (script_folder / "__init__.py").exists():
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != script_folder]
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
