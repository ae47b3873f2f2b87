"""Saved states: the state that a retry of a long call resumes from.

A body writes under its call's key in the run's store, which every node sees. The state stays when the body ends,
because the driver may die before the commit is recorded, and the body must run again. The driver removes the state
after the commit; if it dies in that moment, the run's next driver does at its start.
"""

import hashlib
import logging
import queue
import shutil
import threading
from collections.abc import Collection
from urllib.parse import quote

from infra.errors import StoreError
from infra.storage import Store
from infra.storage.files import LONGEST_NAME

log = logging.getLogger(__name__)


def states_key(run_id: str) -> str:
    """Folder of a run's saved states in its store."""
    return f"runs/{run_id}/state"


def state_url(store: Store, run_id: str, call_id: str) -> str:
    """The URL of one call's state: a store of its own inside the run's store."""
    return f"{store.url}/{states_key(run_id)}/{_name(call_id)}"


class StepStates:
    """The driver's side: removes the states of committed calls, on a thread of its own."""

    def __init__(self, store: Store, run_id: str, committed: Collection[str]) -> None:
        self._store, self._folder = store, states_key(run_id)
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if left := set(store.folders(self._folder)):
            for name in sorted(left.intersection(map(_name, committed))):
                self._remove(name)

    def committed(self, call_id: str) -> None:
        self._remove(_name(call_id))

    def close(self) -> None:
        """Return when all states are removed."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _remove(self, name: str) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="recua-states", daemon=True)
            self._thread.start()
        self._queue.put(name)

    def _run(self) -> None:
        while (name := self._queue.get()) is not None:
            key = f"{self._folder}/{name}"
            try:
                if (folder := self._store.local_path(key)) is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    continue
                for one in list(self._store.list(key)):
                    self._store.delete(one)
            except (StoreError, OSError) as error:
                log.warning("cannot remove the state of a finished step (recua gc will): %s", error)


def _name(call_id: str) -> str:
    """A call's folder. A part of a path has 255 bytes at most; a longer name ends in a digest."""
    name = quote(call_id, safe="[]", errors="surrogatepass")
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return f"{name[: LONGEST_NAME - 1 - len(digest)]}~{digest}"
