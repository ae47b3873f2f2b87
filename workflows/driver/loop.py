"""One thread that owns the state of a run: everything reaches it as work in its inbox, or as a timer.

Work is done in the order in which it came, in rounds: all that is there, then what is due. Between rounds the thread
rests for `rest()` seconds, 0 where nobody may wait. Rests let work gather while much is going on: threads that wake
each other for every single thing spend most of their time on that.
"""

import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
Work = tuple[Callable[..., None], tuple[Any, ...]]


class Loop:
    """`on_error(error)` gets what a piece of work raised; the loop goes on. Where the loop itself fails it gets that
    too, and from then on there are no timers and no rests: what is posted is still done, so that the run can end."""

    def __init__(self, on_error: Callable[[BaseException], None], rest: Callable[[], float]) -> None:
        self._on_error = on_error
        self._rest = rest
        self._inbox: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, Work]] = []
        self._order = itertools.count()
        self._thread = threading.Thread(target=self._run, name="recua-loop", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do `work(*arguments)` on the loop's thread, soon. From any thread."""
        self._inbox.put((work, arguments))

    def ask(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do `work(*arguments)` on the loop's thread, and return or raise what it does. From any other thread."""
        answer: Future[T] = Future()

        def work_and_answer() -> None:
            try:
                answer.set_result(work(*arguments))
            except BaseException as error:
                answer.set_exception(error)

        self.post(work_and_answer)
        return answer.result()

    def later(self, seconds: float, work: Callable[..., None], *arguments: Any) -> None:
        """Do it in so many seconds. From the loop's thread only."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), (work, arguments)))

    def close(self) -> None:
        """Do what was posted before, and end; timers are dropped."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._rounds()
        except BaseException as error:
            self._on_error(error)
            while (work := self._inbox.get()) is not None:
                self._do(work)

    def _rounds(self) -> None:
        while True:
            try:
                work = self._inbox.get(timeout=self._until_due())
            except queue.Empty:
                work = heapq.heappop(self._timers)[2]
            while work is not None:
                self._do(work)
                if self._timers and self._until_due() == 0.0:
                    self._do(heapq.heappop(self._timers)[2])
                try:
                    work = self._inbox.get_nowait()
                except queue.Empty:
                    break
            if work is None:
                return
            if rest := self._rest():
                time.sleep(rest)

    def _until_due(self) -> float | None:
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _do(self, work: Work) -> None:
        try:
            work[0](*work[1])
        except BaseException as error:
            self._on_error(error)
