"""The process that drives one submitted run; and the one that checks a submission before it is accepted.

    python -m workflows.service.drivers.driver_process check|run FOLDER

FOLDER has `task.json` and the unpacked package in `code/`, which is the working folder and first on sys.path, so that
the package's own code is used everywhere. The outcome is written to `outcome.json`.

If its cluster is lost, a driver ends by itself without an `end` record; the run is resumed on the next cluster.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infra.config import parse_tree
from infra.errors import RecuaError, RunBusy, StoreError, UserError
from infra.machine import answers
from infra.processes import process_start
from infra.ray_internals import raylet_socket
from infra.storage import open_store
from infra.storage.files import write_text
from workflows.driver import session
from workflows.driver.settings import RunSettings
from workflows.launch import script
from workflows.launch.display import PlainDisplay
from workflows.launch.guarded import guarded
from workflows.launch.script import Launch
from workflows.service.drivers.processes import Process

CLUSTER_GONE = 75
WATCH_PERIOD_S = 2.0
GCS_PATIENCE_S = 60.0
"""How long the cluster's head service may be unreachable: one that keeps its state elsewhere comes back."""
Record = dict[str, Any]


def main(command: str, folder: Path) -> int:
    task: Record = json.loads((folder / "task.json").read_text())
    outcome: Record = {}

    def work() -> None:
        try:
            outcome.update(check(task) if command == "check" else run(task, folder))
        except BaseException as error:
            outcome.update(describe(error))
            raise

    code = guarded(work)
    write_text(folder / "outcome.json", json.dumps({**outcome, "code": code}))
    return code


def describe(error: BaseException) -> Record:
    """`error`: the message for a client; `kind`: user, busy (another driver has the run), store, or fault."""
    if isinstance(error, RecuaError):
        kinds = ((RunBusy, "busy"), (UserError, "user"), (StoreError, "store"))
        return {"error": str(error), "kind": next((kind for each, kind in kinds if isinstance(error, each)), "fault")}
    frame = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = "" if frame is None else f" ({Path(frame.filename).name}:{frame.lineno})"
    return {"error": f"{type(error).__name__}: {error}{where}", "kind": "fault"}


def prepare(submission: Record) -> Launch:
    """The submitted workflow with its recipe, as `recua run` in the package's folder would load it."""
    target, recipe, overrides = Path(submission["workflow_file"]), submission["recipe"], submission["overrides"]
    if recipe is None:
        return script.prepare(target, None, overrides)
    source = submission["recipe_name"]
    tree = parse_tree(recipe, source) if isinstance(recipe, str) else recipe
    return script.with_recipe(target, tree, source, overrides)


def check(task: Record) -> Record:
    """Refuse what `recua run` would refuse; else create the run and report its id."""
    submission = task["submission"]
    names = ("run_id", "new", "rerun")
    settings = RunSettings(store=task["store"], **{name: submission[name] for name in names})
    prepared = prepare(submission)
    store = open_store(settings.store)
    if not script.is_finished(prepared, store, settings):
        prepared.preflight()
        prepared.check_cluster(task["nodes"])
    arguments = {"args": list(prepared.args), "kwargs": prepared.kwargs}
    return {"run_id": session.open_run(store, prepared.workflow, arguments, settings)[0]}


def run(task: Record, folder: Path) -> Record:
    """Drive the run to its end."""
    Watch(task["address"]).start()
    options = {"runtime_env": {"working_dir": str(folder / "package.zip")}}
    settings = RunSettings(store=task["store"], run_id=task["run_id"], ray_address=task["address"], ray_options=options)
    reports = open_store(settings.store).local_path("runs") or folder / "reports"  # the store gets them in either case
    script.run(prepare(task["submission"]), settings, reports, PlainDisplay(sys.stdout), watched=True)
    return {"run_id": task["run_id"]}


class Watch:
    """Ends this process if its Ray cluster is lost: this node's raylet at once, the head service after a while."""

    def __init__(self, address: str, end: Callable[[int], None] = os._exit) -> None:
        parts = urlsplit(f"//{address.rpartition('://')[2]}")
        self._head = f"{parts.hostname or ''}:{parts.port or 0}"
        self._end = end

    def start(self) -> None:
        threading.Thread(target=self.watch, name="recua-cluster", daemon=True).start()

    def watch(self) -> None:
        try:
            self._look()
        except Exception as error:
            self._gone(f"the watch on the cluster ({error!r})")

    def _look(self) -> None:
        raylet: Process | None = None
        seen = time.monotonic()
        while True:
            time.sleep(WATCH_PERIOD_S)
            raylet = raylet or own_raylet()
            if raylet is not None and not raylet.alive():
                return self._gone("this node's raylet")
            if answers(self._head, timeout_s=10):
                seen = time.monotonic()
            elif time.monotonic() - seen > GCS_PATIENCE_S:
                return self._gone(f"the cluster at {self._head}")

    def _gone(self, what: str) -> None:
        print(f"recua: {what} is gone; this driver ends, and the next `recua up` resumes the run", flush=True)
        self._end(CLUSTER_GONE)


def own_raylet() -> Process | None:
    """The raylet that this process is connected to; None if it is not connected."""
    import ray

    name = raylet_socket(ray)
    if name is None:
        return None
    wanted = f"--raylet_socket_name={name}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "cmdline").read_bytes().split(b"\0"):
                return Process(int(entry.name), process_start(int(entry.name)) or "")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
