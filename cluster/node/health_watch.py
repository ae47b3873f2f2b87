"""Reads a node's health at intervals, in a thread beside its agent's other work.

Who waits for whom: one thread reads and sleeps; `latest` never waits. A reader that hangs (a broken driver) blocks only
this thread.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.config import HealthSettings
from cluster.node.health import Readers, default_readers


@dataclass(frozen=True)
class Reading:
    """The `number`-th reading of a node's signals; 0: none yet."""

    number: int = 0
    signals: Mapping[str, float] = field(default_factory=dict)


class HealthWatch:
    """The health watch of this machine."""

    def __init__(self, settings: HealthSettings) -> None:
        self._settings = settings
        self._latest = Reading()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="health", daemon=True).start()

    def latest(self) -> Reading:
        return self._latest

    def close(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        readers = Readers(default_readers(self._settings.root))
        while True:
            self._latest = Reading(self._latest.number + 1, readers.read())
            if self._ended.wait(self._settings.period_s):
                return
