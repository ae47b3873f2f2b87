"""A timer for reports of bodies that take longer: work that runs unless it is cancelled soon."""

import threading
import time
from collections.abc import Callable


class Watchdog:
    """`set(work)`: run it on this object's thread after one to two times `after_s`; `now()`: run it at once; `clear()`:
    cancel it. Work runs at most once, and never after `clear` has returned."""

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._lock = threading.Lock()
        self._armed = threading.Event()
        self._work: Callable[[], None] | None = None
        threading.Thread(target=self._run, name="recua-alarm", daemon=True).start()

    def set(self, work: Callable[[], None]) -> None:
        self._work = work
        if not self._armed.is_set():
            self._armed.set()

    def now(self) -> None:
        with self._lock:
            work, self._work = self._work, None
            if work is not None:
                work()

    def clear(self) -> None:
        with self._lock:
            self._work = None

    def _run(self) -> None:
        while True:
            self._armed.wait()
            self._armed.clear()
            while (work := self._work) is not None:
                time.sleep(self._after_s)
                if self._work is work:
                    self.now()
