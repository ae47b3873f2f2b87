"""`recua watch`: the live display of a run that another process drives.

Its data come from a service over HTTP, or, if there is none, from the store.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

from infra.errors import StoreError
from infra.storage import Store
from workflows.graph.values import one_line
from workflows.launch.display import Display
from workflows.runs.events import Event
from workflows.runs.signals import command
from workflows.service.client.http_client import Client, Unreachable, path_of
from workflows.service.drivers import records
from workflows.views import run_views

PERIOD_S = 0.5
PATIENCE_S = 120.0
"""How long a run may lack a driver, or service or store be unreachable: they may be moving to another head node."""
DONE = ("committed", "reused")
OVER = ("finished", "failed", "cancelled")
Json = dict[str, Any]


class Source(Protocol):
    """A source of a run's data. Raises UserError (no such run) or RecuaError (retry)."""

    def run(self) -> Json: ...

    def steps(self, after: int) -> Json: ...

    def metrics(self, after: str) -> Json: ...


class ServiceSource:
    """Over HTTP."""

    def __init__(self, client: Client, run_id: str) -> None:
        self._client = client
        self._run_id = run_id

    def run(self) -> Json:
        found: Json = self._client.get(path_of(self._run_id))
        return found

    def steps(self, after: int) -> Json:
        found: Json = self._client.get(path_of(self._run_id, "/steps"), after=after)
        return found

    def metrics(self, after: str) -> Json:
        found: Json = self._client.get(path_of(self._run_id, "/metrics"), after=after)
        return found


class StoreSource:
    """Read from the store. `served`: a service works on the run, though it does not answer now."""

    def __init__(self, store: Store, run_id: str, served: bool = False) -> None:
        self._store = store
        self._run_id = run_id
        self._served = served
        self._cache = run_views.RunCache()

    def run(self) -> Json:
        active = self._served and records.active_after(self._store, self._run_id) is not None
        return {**run_views.run(self._cache, self._store, self._run_id), "active": active}

    def steps(self, after: int) -> Json:
        return run_views.steps(self._cache, self._store, self._run_id, after)

    def metrics(self, after: str) -> Json:
        return run_views.metrics(self._cache, self._store, self._run_id, "", after)


def watch(source: Source, display: Display, sleep: Callable[[float], None] = time.sleep) -> Json:
    """Show the run until it has ended or has no driver; returns its last state.

    Raises:
        UserError: there is no such run.
        RecuaError: the service or the store stays unreachable.
    """
    follower = Follower(source, display)
    seen = time.monotonic()
    away = False
    while True:
        try:
            run = follower.look()
        except (Unreachable, StoreError) as error:
            if follower.run is None or time.monotonic() - seen > PATIENCE_S:
                raise
            if not away:
                display.say(f"{error}; waiting for it")
            away = True
        else:
            away = False
            if run["status"] == "running":
                seen = time.monotonic()
            if is_over(run) or time.monotonic() - seen > PATIENCE_S:
                return follower.end(run)
        sleep(PERIOD_S)


def is_over(run: Json) -> bool:
    """Whether no process works on the run any more. A failed or cancelled run that is active will be resumed."""
    return run["status"] == "finished" or not (run["status"] == "running" or run["active"])


class Follower:
    """Turns changes into the events that a driver's own display would get."""

    def __init__(self, source: Source, display: Display) -> None:
        self._source = source
        self._display = display
        self._version = 0
        self._cursor = ""
        self._shown: dict[str, tuple[str, int]] = {}
        self.run: Json | None = None

    def look(self) -> Json:
        """Poll once and return the run. The run is read first, so that everything before its end is shown."""
        run = self._source.run()
        steps = self._source.steps(self._version)
        history = self._source.metrics(self._cursor)
        first = self.run is None
        if first:
            done = sum(step["status"] in DONE for step in steps["steps"])
            data = {"run_id": run["run_id"], "workflow": run["workflow"], "store": run["store"]}
            self._emit("run-started", data={**data, "resumed": done})
        elif self.run is not None and self.run["status"] != run["status"] == "interrupted":
            then = "; the service starts another" if run["active"] else ""
            self._display.say(f"its driver is gone{then}")
        changed = [step for step in steps["steps"] if self._is_news(step, first)]
        going = {step["id"]: step for step in changed if step["status"] == "running"}
        for step in changed:
            self._begin(step, late=True)
        for event in history["events"]:
            if event["call"] not in going:
                self._history(event, first)
        for step in changed:
            self._settle(step, run)
        for step in going.values():  # ended steps made room for new ones
            self._begin(step)
        for event in history["events"]:
            if event["call"] in going:
                self._history(event, first)
        self._version, self._cursor, self.run = steps["version"], history["version"], run
        return run

    def end(self, run: Json) -> Json:
        """Show the step's end, if it has ended."""
        if run["status"] in OVER:
            seconds = (run["ended"] or time.time()) - run["created"]
            self._emit("run-ended", data={"status": run["status"], "seconds": seconds})
        if run["status"] == "finished" and (text := one_line(run["result"])):
            self._display.say(f"result: {text}")
        return run

    def _is_news(self, step: Json, first: bool) -> bool:
        state = (step["status"], step.get("attempts") or 0)
        if first and step["status"] in DONE:
            self._shown[step["id"]] = state
        return self._shown.get(step["id"]) != state

    def _begin(self, step: Json, late: bool = False) -> None:
        """Show that the step runs; `late`: that it ran, if it has ended since the last poll."""
        call, status, attempts = step["id"], step["status"], step.get("attempts") or 0
        if (status in ("committed", "failed") and call not in self._shown) if late else status == "running":
            ago = max(0.0, time.time() - (step.get("started") or time.time()))
            self._emit("started", call, {"attempt": max(1, attempts), "ago": ago})
            self._shown[call] = ("running", attempts)

    def _settle(self, step: Json, run: Json) -> None:
        call, status = step["id"], step["status"]
        if status == "running":
            return
        message = step.get("message") or ""
        self._shown[call] = (status, step.get("attempts") or 0)
        if status in DONE:
            self._emit(status, call, {"seconds": step.get("seconds"), "reused_from": step.get("reused_from")})
        elif status == "failed":
            self._emit("failed", call, {"error": f"{call}: {message}"})
        elif status == "waiting":
            kind, _, text = message.partition(": ")
            self._emit("retry", call, {"error": text, "error_type": kind, "seconds": None})
        elif status.startswith("waiting-for"):
            what = command(run["run_id"], call, step["step"], run["store"])
            self._emit("waiting", call, {"message": message, "command": what})

    def _history(self, event: Json, first: bool) -> None:
        call = event["call"]
        if event["kind"] == "progress":
            if self._shown.get(call, ("", 0))[0] == "running":
                metrics = {name: value for name, value in event["metrics"].items() if value is not None}
                self._emit("progress", call, {**event, "metrics": metrics})
        elif not first:
            self._emit(event["kind"], call, {"message": event["message"]})

    def _emit(self, kind: str, call: str = "", data: Json | None = None) -> None:
        self._display.on_event(Event(kind, call, call.rpartition("/")[2].partition("[")[0], data or {}))


def exit_code(run: Json) -> int:
    """End as `recua run` of the same run would have ended."""
    if run["status"] == "finished":
        return 0
    if run["status"] == "cancelled":
        return 130
    return 2 if (run.get("error") or {}).get("kind") == "refused" else 1
