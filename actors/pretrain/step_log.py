"""The outcomes of a training's steps in order, as objects of a store, so that the next attempt finds them.

steps/00000000-1.jsonl, steps/00000001-1.jsonl, ...     CHUNK rows each, the last one fewer

The second number is the writer's: objects of a process that was replaced meanwhile are hidden by those of its
successor, which has a higher number.
"""

import json
import logging
import threading
from collections.abc import Mapping
from typing import Any

from infra.errors import StoreError
from infra.storage import Store

log = logging.getLogger(__name__)

FOLDER = "steps"
CHUNK = 256
"""Rows of one object, which is always written as a whole."""
PERIOD_S = 2.0
"""Longest delay until rows are in the store; until then the ranks have them too (`cluster.node.beacons.ROWS`)."""


class StepLog:
    """The log; at first `rows` has those of earlier attempts. Only `undo` and `close` wait for the store.

    Raises:
        StoreError: the store cannot be read.
    """

    def __init__(self, store: Store, writer: int = 1) -> None:
        self._store, self._writer, self.rows = store, writer, read_steps(store)
        self._changed: int | None = None
        """The first step whose row in the store differs from the one here."""
        self._undone = False
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="step-log", daemon=True)
        self._thread.start()

    def write(self, row: Mapping[str, Any]) -> None:
        """Add the next step's row. The row of an earlier step removes all rows from there on."""
        with self._lock:
            self._change(row["step"])
            self.rows.append(dict(row))

    def undo(self, step: int) -> None:
        """Remove the rows of this step and later ones, also in the store. Raises StoreError."""
        with self._lock:
            self._change(step)
        self._flush()

    def close(self) -> None:
        """Write all rows to the store. Raises StoreError."""
        self._ended.set()
        self._thread.join()
        self._flush()

    def _keep(self) -> None:
        while not self._ended.wait(PERIOD_S):
            try:
                self._flush()
            except StoreError as error:
                log.warning("outcomes of steps are not stored yet: %s", error)

    def _change(self, step: int) -> None:
        self._undone |= step < len(self.rows)
        del self.rows[step:]
        self._changed = step if self._changed is None else min(step, self._changed)

    def _flush(self) -> None:
        with self._flushing:
            with self._lock:
                if self._changed is None:
                    return
                changed, self._changed = self._changed, None
                undone, self._undone = self._undone, False
                first = changed // CHUNK
                rows = self.rows[first * CHUNK :]
            try:
                self._write(first, rows, undone)
            except StoreError:
                with self._lock:
                    self._changed = changed if self._changed is None else min(changed, self._changed)
                    self._undone |= undone
                raise

    def _write(self, first: int, rows: list[dict[str, Any]], undone: bool) -> None:
        chunks = [rows[start : start + CHUNK] for start in range(0, max(1, len(rows)), CHUNK)]
        for number, writer in _found(self._store) if undone else ():
            if number >= first + len(chunks):  # a rollback has removed them
                self._store.delete(_key(number, writer))
        for number, chunk in enumerate(chunks, first):
            content = "".join(json.dumps(row) + "\n" for row in chunk).encode()
            self._store.put(_key(number, self._writer), content)


def read_steps(store: Store) -> list[dict[str, Any]]:
    """The rows from step 0 on, up to the first gap."""
    rows: list[dict[str, Any]] = []
    newest = dict(sorted(_found(store)))
    while len(rows) % CHUNK == 0 and (number := len(rows) // CHUNK) in newest:
        content = store.get(_key(number, newest[number]))
        if not content:
            break
        rows += [json.loads(line) for line in content.splitlines()]
    return rows


def _found(store: Store) -> list[tuple[int, int]]:
    """(number, writer) of every object in the store."""
    names = (key.rpartition("/")[2].partition(".")[0].split("-") for key in store.list(FOLDER))
    return [(int(number), int(writer)) for number, writer in names]


def _key(number: int, writer: int) -> str:
    return f"{FOLDER}/{number:08d}-{writer}.jsonl"
