"""State that the loop shares with waiting threads: the ended calls, and the error that ends the run.

Any thread may use it; one lock guards all of it. A waiting thread is woken only by the end of a call that a thread
waits for, by a failure, and when no call is open any more, because no thread waits for most calls of a run.
"""

import threading
from collections.abc import Callable

from workflows.driver.call import Call


class Ends:
    """The ends of a run's calls, and the error that ends the run."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: set[str] = set()
        self._failed: list[Call] = []
        self._fatal: BaseException | None = None

    @property
    def fatal(self) -> BaseException | None:
        """The error that ends the run, if there is one."""
        return self._fatal

    def opened(self, call: Call) -> None:
        """A call was made."""
        with self._changed:
            self._open.add(call.id)

    def ended(self, call: Call) -> None:
        """A call has its result or its error. One that the workflow does not handle itself ends the run."""
        with self._changed:
            call.ended = True
            self._open.discard(call.id)
            if call.error is not None and not call.options.may_fail:
                self._failed.append(call)
            if call.awaited or call.error is not None or not self._open:
                self._changed.notify_all()

    def abort(self, error: BaseException) -> None:
        """End the run with `error`, unless another error has ended it: every waiting thread raises the error."""
        with self._changed:
            if self._fatal is None:
                self._fatal = error
            self._changed.notify_all()

    def wait_for(self, call: Call) -> None:
        """Return when `call` has ended.

        Raises:
            BaseException: the error that ends the run, or the failure of a call that no thread has raised yet.
        """
        with self._changed:
            call.awaited += 1
            try:
                self._wait(lambda: call.ended)
            finally:
                call.awaited -= 1

    def wait_for_all(self) -> None:
        """Return when every call has ended, and all failures have been raised. Raises as `wait_for`."""
        with self._changed:
            self._wait(lambda: not self._open)
            self._raise_failure()

    def raise_fatal(self) -> None:
        """Raise the error that ends the run, if there is one."""
        if self._fatal is not None:
            raise self._fatal

    def _wait(self, over: Callable[[], bool]) -> None:
        while not over():
            self._raise_failure()
            self._changed.wait()

    def _raise_failure(self) -> None:
        """Raise the error that ends the run, or else the first failure that no thread has raised yet."""
        self.raise_fatal()
        for call in self._failed:
            if not call.seen:
                assert call.error is not None
                call.seen = True
                raise call.error
