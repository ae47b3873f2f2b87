"""Saved states: what the next attempt of a long call goes on from.

A body writes into its call's folder and leaves it there when it ends: until the commit is on record, the driver can die
and the body must run again. The driver removes the folder after the commit, or, where it died in that very moment, the
next driver of the run does when it begins. In a store that is no folder, states lie on the node that wrote them.
"""

import json
import queue
import shutil
import threading
from collections.abc import Container
from pathlib import Path
from urllib.parse import quote, unquote

from infra.storage import Store


def state_folder(store: Store, cache: str, run_id: str, call_id: str) -> Path:
    """Where a call's state lies: in a folder store, else on this node beside the artifact cache."""
    return _states_of(store, cache, run_id) / quote(call_id, safe="[]")


def forget_finished_runs(store: Store, cache: str) -> None:
    """Remove from this node the states of runs that have finished: their drivers may have been on others."""
    if store.local_path("runs") is not None:
        return
    for states in Path(cache).parent.glob("runs/*/state"):
        status = json.loads(store.get(f"runs/{states.parent.name}/status.json") or b"{}")
        if status.get("status") == "finished":
            shutil.rmtree(states, ignore_errors=True)


class SavedStates:
    """The driver's side: removes the states of committed calls that this machine sees, on a thread of its own."""

    def __init__(self, store: Store, cache: str, run_id: str, committed: Container[str]) -> None:
        self._folder = _states_of(store, cache, run_id)
        self._queue: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        for state in self._folder.glob("*"):
            if unquote(state.name) in committed:
                self._remove(state)

    def committed(self, call_id: str) -> None:
        self._remove(self._folder / quote(call_id, safe="[]"))

    def close(self) -> None:
        """Returns when all is removed."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _remove(self, state: Path) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="recua-states", daemon=True)
            self._thread.start()
        self._queue.put(state)

    def _run(self) -> None:
        while (state := self._queue.get()) is not None:
            shutil.rmtree(state, ignore_errors=True)


def _states_of(store: Store, cache: str, run_id: str) -> Path:
    key = f"runs/{run_id}/state"
    return store.local_path(key) or Path(cache).parent / key
