"""From a workflow file and a recipe to a run, for `recua run`, `recua resume` and a workflow file run as a script.

A workflow file has a @workflow function; if it has several, FILE:NAME names one. It may define

    RECIPE = SomeSettings           the recipe's schema; the workflow gets one argument of it. Without it, the recipe's
                                    top-level keys are the workflow's arguments, checked against their annotations
                                    (workflows.launch.keywords)
    RECIPE_FILE = "recipes/x.toml"  the default recipe, relative to the root of the file's packages
    def preflight(recipe): ...      raises a UserError (infra.machine has checks) before anything starts
    def check_cluster(recipe, nodes): ...   the same, with each node's resources ({"CPU": 2.0, "GPU": 1.0, ...})
    def on_finish(result): ...      called with the RunResult of a finished run, before its report is written
"""

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from infra.config import Settings, build, read_tree
from infra.errors import RecuaError, UserError
from infra.machine import local_resources, require_ray
from infra.storage import Store, open_store
from infra.telemetry import redact, shorten
from workflows.driver.settings import RunSettings
from workflows.graph.definitions import users_line
from workflows.graph.steps import Workflow
from workflows.identity.names import (
    OUR_ROOT,
    OURS,
    canonical_module,
    import_name,
    is_pythons,
    is_recua,
    is_taken,
    load_name,
    module_of_file,
    neighbours,
    split_target,
)
from workflows.launch.display import Display, open_display
from workflows.launch.keywords import arguments_of

if TYPE_CHECKING:
    from workflows.driver.session import RunResult

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """A workflow with its arguments, ready to plan or run."""

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
        """The workflow file's own check of the cluster's resources."""
        check = getattr(self.module, "check_cluster", None)
        if check is not None:
            check(*self.args, nodes=nodes, **self.kwargs)


def load_workflow_file(file: Path) -> ModuleType:
    """Import a workflow file under its canonical name, so that a script, `recua run` and a job use the same module.

    Raises:
        UserError: no such file; it belongs to another copy of recua; its name or its folder's is taken; or its import
            fails.
    """
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"workflow {file}: no such Python file")
    name, root = module_of_file(file)
    _check_names(name, root, file)
    _import_from(root, file.resolve().parent, behind=is_taken(file.resolve()))
    main = sys.modules["__main__"]
    if Path(getattr(main, "__file__", None) or "").resolve() == file.resolve() and canonical_module("__main__") == name:
        _check_package(name, root, file)
        return main
    try:
        module = import_name(name)
    except SyntaxError as error:
        raise UserError(f"workflow {file}: {error.filename or file}:{error.lineno or 1}: {error.msg}") from error
    except ImportError as error:
        clashes = [path for path in neighbours(root) if path.stem == str(error.name).partition(".")[0]]
        raise UserError(f"workflow {file}: {error}" + "".join(f"; {_clash(path)}" for path in clashes)) from error
    except RecuaError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"workflow {file}: {users_line(error)}: {_why_not(error)}") from error
    if Path(module.__file__ or "").resolve() != file.resolve():
        raise UserError(f"workflow {file}: {name} is already loaded from {module.__file__}; use the recua of that copy")
    _check_neighbours(root, file)
    return module


def _why_not(error: BaseException) -> str:
    """Why the import of a file failed, as one line."""
    if isinstance(error, SystemExit):
        code = "" if error.code is None else repr(error.code)
        return f'it calls sys.exit({code}) on import: put that under `if __name__ == "__main__":`'
    return shorten(" ".join(f"{type(error).__name__}: {error}".split()), 500)


def prepare(target: Path, recipe: str | None, overrides: Sequence[str]) -> Launch:
    """Load FILE or FILE:NAME, find its workflow, validate the recipe.

    Raises:
        UserError: the file, its workflow or the recipe is wrong; the message names the file or the setting.
    """
    file = split_target(target)[0]
    if recipe is None and (default := getattr(load_workflow_file(file), "RECIPE_FILE", None)):
        recipe = str(module_of_file(file)[1] / default)
    return with_recipe(target, read_tree(recipe), recipe or "recipe", overrides)


def with_recipe(target: Path, tree: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Launch:
    """The workflow of FILE or FILE:NAME with a recipe (which errors call `source`) and overrides; validates them.

    Raises:
        UserError: as `load_recipe`.
    """
    file, name = split_target(target)
    module = load_workflow_file(file)
    workflow = find_workflow(module, file, name)
    schema = getattr(module, "RECIPE", None)
    if schema is None:
        return Launch(module, workflow, *arguments_of(workflow, tree, source, overrides))
    if not (isinstance(schema, type) and issubclass(schema, Settings)):
        raise UserError(f"workflow {file}: RECIPE must be a class derived from infra.config.Settings")
    try:
        inspect.signature(workflow.fn).bind(schema)
    except TypeError as error:
        name = workflow.short_name
        raise UserError(f"workflow {file}: RECIPE is set, so {name} must take only the recipe: {error}") from None
    return Launch(module, workflow, (build(tree, schema, source, overrides),), {})


def find_workflow(module: ModuleType, file: Path, name: str | None = None) -> Workflow[..., Any]:
    """The @workflow function that the file itself defines; if there are several, the one of that name.

    Raises:
        UserError: there is none, or there are several and none is named.
    """
    known = {value.short_name: value for value in vars(module).values() if isinstance(value, Workflow)}
    found = {key: value for key, value in known.items() if value.fn.__module__ == module.__name__}
    names = ", ".join(found) or "none"
    if name in found:
        return found[name]
    if name is not None:
        raise UserError(f"workflow {file}:{name}: the file defines no @workflow function of that name; it has {names}")
    if len(found) != 1:
        hint = f"; name one: {file}:{next(iter(found))}" if found else ""
        if imported := [f"{key} of {value.fn.__module__}" for key, value in known.items() if not found]:
            hint = f"; it imports {', '.join(imported)}: run the file that defines it"
        raise UserError(f"workflow {file}: expected one @workflow function, found {names}{hint}")
    return next(iter(found.values()))


def is_finished(launch: Launch, store: Store, settings: RunSettings) -> bool:
    """Whether the run has finished, so that `run` would only show its result."""
    from workflows.driver.session import chosen_run
    from workflows.graph.values import encode
    from workflows.runs.journal import read_journal

    tree = encode({"args": list(launch.args), "kwargs": launch.kwargs}, "the recipe")
    end = read_journal(store, chosen_run(store, launch.workflow, tree, settings)).end
    return end is not None and end.status == "finished"


def run(
    launch: Launch, settings: RunSettings, reports: Path, display: Display | None = None, watched: bool = False
) -> Path | None:
    """Run to the end with a live display, then write the report. Returns the page's path; None if writing failed, which
    is only a warning, because the run has ended.

    `watched`: the caller ends this process if its cluster is lost for good, and starts another one if this one is told
    to end. Without it, an address where no Ray answers is refused, and SIGTERM cancels the run.

    Raises:
        RecuaError, KeyboardInterrupt: as workflows.driver.session.run.
    """
    from workflows.driver import session

    store = open_store(settings.store)
    store.check()
    if not is_finished(launch, store, settings):
        launch.preflight()
        if not watched:
            require_ray(settings.ray_address or os.environ.get("RAY_ADDRESS"), "--address (or RAY_ADDRESS)")
        if not (settings.ray_address or os.environ.get("RAY_ADDRESS") or settings.ray_options):
            launch.check_cluster([local_resources()])  # the cluster will be this machine: check before creating the run
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
        shown.say(f"run {result.run_id} has already finished; nothing ran (--new starts another)")
    finish = getattr(launch.module, "on_finish", None)
    if finish is not None:
        _after_the_end(shown, f"on_finish of {launch.module.__name__}", lambda: finish(result))
    else:
        _after_the_end(shown, "showing its result", lambda: _show_result(shown, result))
    again = f"the report (write it with `recua report {result.run_id}`)"
    return _after_the_end(shown, again, lambda: _report(store, result.run_id, reports, shown))


def _after_the_end(shown: Display, what: str, work: Callable[[], T]) -> T | None:
    """Turn errors after the end of a run into warnings: the run stays finished."""
    try:
        return work()
    except (Exception, SystemExit) as error:
        print(redact(traceback.format_exc()), file=sys.stderr)
        shown.say(f"warning: the run has finished, but {what} failed: {type(error).__name__}: {error}")
        return None


def _show_result(shown: Display, result: "RunResult") -> None:
    from workflows.graph.values import encode, one_line

    if text := one_line(encode(result.value, "the workflow's result")):
        shown.say(f"result: {text}")


def _report(store: Store, run_id: str, reports: Path, shown: Display) -> Path:
    from workflows.report.record import read_run
    from workflows.report.summary import summarise, table_lines
    from workflows.report.write import write
    from workflows.runs.catalog import load_run

    record = read_run(store, load_run(store, run_id))
    page = write(record, reports / run_id)
    for name in ("report.html", "report.json"):  # unlike the store, a job's folder may vanish with its cluster
        store.put(f"runs/{run_id}/{name}", (page.parent / name).read_bytes())
    for line in table_lines(summarise(record)):
        shown.say(line)
    shown.say(f"report: {page.absolute()}")
    return page


def resume(store: Store, run_id: str, settings: RunSettings, reports: Path) -> Path | None:
    """Resume a run by its id alone; its workflow and recipe are in the store.

    Raises:
        UserError: no such run, or its workflow can no longer be imported.
    """
    from workflows.graph.artifacts import ArtifactSource
    from workflows.graph.values import decode
    from workflows.runs.catalog import load_metadata

    metadata = load_metadata(store, run_id)
    _import_from(Path.cwd(), None, behind="%2Epy:" in metadata["workflow"])
    workflow = load_name(metadata["workflow"])
    if not isinstance(workflow, Workflow):
        raise UserError(f"run {run_id}: {metadata['workflow']} is no longer a @workflow")
    arguments = decode(metadata["recipe"], ArtifactSource(store.url, settings.cache))
    module = sys.modules.get(workflow.fn.__module__) or import_name(workflow.fn.__module__)
    launch = Launch(module, workflow, tuple(arguments["args"]), arguments["kwargs"])
    return run(launch, settings.model_copy(update={"run_id": run_id}), reports)


def import_code(name: str) -> Any:
    """The object `module:name`, imported from the working folder, for commands without a workflow file.

    Raises:
        UserError: there is no such object.
    """
    _import_from(Path.cwd(), None)
    return load_name(name)


def _check_names(name: str, root: Path, file: Path) -> None:
    """Refuse a user's package whose name belongs to a package that would be imported instead."""
    package = name.partition(".")[0]
    if package == name and file.stem != "__init__":
        return
    if is_pythons(package):
        raise UserError(f"workflow {file}: package {root / package} has the name of a Python module: rename it")
    if package in OURS and not is_recua(root):
        raise UserError(f"workflow {file}: {_clash(root / package)}")


def _check_neighbours(root: Path, file: Path) -> None:
    """The same for packages beside a workflow file that uses recua's own steps, which import such packages later, on a
    worker."""
    uses = {"workflows.recipes"} & sys.modules.keys()
    for path in neighbours(root) if uses else ():
        if path != file.resolve():
            raise UserError(f"workflow {file}: {_clash(path)}")


def _clash(path: Path) -> str:
    return f"{path} has the name of recua's own package {path.stem}: rename it (taken: {', '.join(OURS)})"


def _check_package(name: str, root: Path, file: Path) -> None:
    """Refuse a script inside a package if another copy of the package is loaded (an editable install of a clone)."""
    package = name.rpartition(".")[0].partition(".")[0]
    loaded = Path(sys.modules[package].__file__ or "").resolve().parent if package in sys.modules else root / package
    if loaded != root / package:
        raise UserError(
            f"workflow {file}: package {package} came from {loaded}; set PYTHONPATH={root}, or use that copy"
        )


def _import_from(root: Path, script_folder: Path | None, behind: bool = False) -> None:
    """Put `root` first on sys.path (`behind`: last, if it has a script with the name of another module), and recua's
    own root after it, so that a folder of data beside a script does not hide a package of that name. Remove a script's
    own folder, which Python put there, if it is inside a package: it would shadow packages."""
    if script_folder is not None and script_folder != root:
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != script_folder]
    if str(root) not in sys.path:
        sys.path.insert(len(sys.path) if behind else 0, str(root))
    if str(OUR_ROOT) not in sys.path and (behind or not neighbours(root)):
        sys.path.insert(sys.path.index(str(root)) + (not behind), str(OUR_ROOT))
