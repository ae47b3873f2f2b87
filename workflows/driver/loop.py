"""One thread that owns the state of a run: all input reaches it as work in its inbox, or as a timer.

Work is done in order of arrival, in rounds: all waiting work, then due timers. Between rounds the thread rests for
`rest()` seconds, which is 0 if work must not wait. Rests let work gather under load: threads that wake each other for
every item spend most of their time on that.
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
    """`on_error(error)` gets the error of a piece of work; the loop continues. It also gets an error of the loop
    itself; from then on there are no timers and no rests, but posted work is still done, so that the run can end."""

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
        """Do `work(*arguments)` soon on the loop's thread. Callable from any thread."""
        self._inbox.put((work, arguments))

    def ask(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do `work(*arguments)` on the loop's thread, and return its result or raise its error. From other threads
        only.
        """
        answer: Future[T] = Future()

        def work_and_answer() -> None:
            try:
                answer.set_result(work(*arguments))
            except BaseException as error:
                answer.set_exception(error)

        self.post(work_and_answer)
        return answer.result()

    def later(self, seconds: float, work: Callable[..., None], *arguments: Any) -> None:
        """Do the work after a number of seconds. From the loop's thread only."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), (work, arguments)))

    def close(self) -> None:
        """Do the work that was already posted, and end; timers are dropped."""
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
