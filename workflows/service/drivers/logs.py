"""A driver's output in the store: written in place in a folder; sent to other stores at intervals and at the end."""

import contextlib
import time
from pathlib import Path

from infra.storage import Store
from infra.telemetry import redact
from workflows.service.drivers.records import log_key

PERIOD_S = 10.0
LIMIT = 1 << 20
"""Most bytes that are sent to a remote store; of a longer log, its end."""
TAIL = 4000


class DriverLog:
    """The log of one driver of a run; the process writes to `file`."""

    def __init__(self, store: Store, run_id: str, number: int, folder: Path) -> None:
        self._store = store
        self._key = log_key(run_id, number)
        local = store.local_path(self._key)
        self._remote = local is None
        self.file = local or folder / f"{number:06d}.log"
        self._sent_at, self._sent_size = 0.0, 0

    def send(self, final: bool = False) -> None:
        """Raises StoreError."""
        if not self._remote or (not final and time.monotonic() - self._sent_at < PERIOD_S):
            return
        self._sent_at = time.monotonic()
        with contextlib.suppress(FileNotFoundError):
            size = self.file.stat().st_size
            if size != self._sent_size:
                self._store.put(self._key, self._last(LIMIT), durable=final)
                self._sent_size = size

    def tail(self) -> str:
        """The end of the log, without secrets; empty if there is none."""
        with contextlib.suppress(FileNotFoundError):
            return redact(self._last(TAIL).decode(errors="replace"))
        return ""

    def _last(self, size: int) -> bytes:
        with self.file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - size))
            return stream.read(size)
