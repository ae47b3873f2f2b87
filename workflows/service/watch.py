"""`recua watch`: the live display of a run that another process drives, made from what the store says of it.

The same answers come from a service over HTTP, or, where there is none, from the store itself.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

from infra.errors import StoreError
from infra.storage import Store
from workflows.events import Event
from workflows.progress import Display
from workflows.service import views
from workflows.service.client import Client, Unreachable, path_of

PERIOD_S = 0.5
PATIENCE_S = 120.0
"""How long the service or the store may be away: it is being started again, or moves to another head node."""
DONE = ("committed", "reused")
OVER = ("finished", "failed", "cancelled")
Json = dict[str, Any]


class Source(Protocol):
    """Where a run is seen. Raises UserError (no such run), RecuaError (try again)."""

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
    """Straight from the store."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store = store
        self._run_id = run_id
        self._cache = views.RunCache()

    def run(self) -> Json:
        return {**views.run(self._cache, self._store, self._run_id), "active": False}

    def steps(self, after: int) -> Json:
        return views.steps(self._cache, self._store, self._run_id, after)

    def metrics(self, after: str) -> Json:
        return views.metrics(self._cache, self._store, self._run_id, "", after)


def watch(source: Source, display: Display, sleep: Callable[[float], None] = time.sleep) -> Json:
    """Show the run until it has ended (or nobody drives it); what is known of it then.

    Raises:
        UserError: there is no such run.
        RecuaError: service or store stay away for long.
    """
    follower = Follower(source, display)
    lost: float | None = None
    while True:
        try:
            run = follower.look()
        except (Unreachable, StoreError) as error:
            if follower.run is None:
                raise
            if lost is None:
                display.say(f"{error}; waiting for it")
            lost = lost or time.monotonic()
            if time.monotonic() - lost > PATIENCE_S:
                raise
        else:
            lost = None
            if run["status"] in OVER or (run["status"] == "interrupted" and not run["active"]):
                return run
        sleep(PERIOD_S)


class Follower:
    """Turns changed answers into the events that a driver's own display would get."""

    def __init__(self, source: Source, display: Display) -> None:
        self._source = source
        self._display = display
        self._version = 0
        self._cursor = ""
        self._shown: dict[str, tuple[str, int]] = {}
        self.run: Json | None = None

    def look(self) -> Json:
        """One look; the run as it is. Asked for first, so that what came before its end has been shown."""
        run = self._source.run()
        steps = self._source.steps(self._version)
        history = self._source.metrics(self._cursor)
        first = self.run is None
        if first:
            done = sum(step["status"] in DONE for step in steps["steps"])
            data = {"run_id": run["run_id"], "workflow": run["workflow"], "store": run.get("store", "its store")}
            self._emit("run-started", data={**data, "resumed": done})
        elif self.run is not None and self.run["status"] != run["status"] and run["status"] == "interrupted":
            self._display.say(
                "its driver is gone; the service starts another" if run["active"] else "its driver is gone"
            )
        for step in steps["steps"]:
            self._step(step, first)
        for event in history["events"]:
            self._history(event, first)
        self._version, self._cursor, self.run = steps["version"], history["version"], run
        if run["status"] in OVER:
            seconds = (run["ended"] or time.time()) - run["created"]
            self._emit("run-ended", data={"status": run["status"], "seconds": seconds})
        return run

    def _step(self, step: Json, first: bool) -> None:
        call, status, attempts = step["id"], step["status"], step.get("attempts") or 0
        before = self._shown.get(call)
        self._shown[call] = (status, attempts)
        if before == (status, attempts) or (first and status in DONE):
            return
        if status == "running" or (status in ("committed", "failed") and before is None):
            self._emit("started", call, {"attempt": max(1, attempts)})
        if status in DONE:
            data = {"seconds": step.get("seconds"), "reused_from": step.get("reused_from")}
            self._emit(status, call, data)
        elif status == "failed":
            self._emit("failed", call, {"error": f"{call}: {step.get('message', '')}"})
        elif status == "waiting":
            data = {"error": step.get("message", ""), "error_type": "retry", "seconds": 0.0}
            self._emit("retry", call, data)
        elif status.startswith("waiting-for"):
            self._display.say(f"{call} is {status.replace('-', ' ')}: {step.get('message', '')}")

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
    """As `recua run` of the same run would have ended."""
    if run["status"] == "finished":
        return 0
    if run["status"] == "cancelled":
        return 130
    return 2 if (run.get("error") or {}).get("kind") == "refused" else 1
