"""Books a rank's time around its steps: the waits within them, and the faults that end them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.goodput.stopwatch import Stopwatch
from engines.collectives.wait_times import Wait, Waits


@dataclass(frozen=True)
class Aborted:
    """The controller's order that ends a generation: when it arrived, and when the fault began; both by
    time.monotonic()."""

    generation: int
    heard: float
    began: float


class RankTime:
    """The account of the training thread.

    Example: a peer dies at 10.0 s while this rank waits for it (since 9.8 s), its connection breaks at 10.02 s, the
    controller's order comes at 10.1 s: 0.2 s exposed communication, 0.1 s detection, then re-forming.
    """

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch
        self.waited_s = 0.0
        """Seconds of waits in the last step, for others and for the snapshot before it."""
        self._broken: tuple[int, Wait | None] | None = None

    @contextmanager
    def step(self, waits: Waits, again: bool) -> Iterator[None]:
        """Book a step: computing, less the waits for others and for the snapshot before it.

        again: the step was committed before a fault undid it.
        """
        self.watch.begin_step(again)
        try:
            yield
        finally:
            taken = waits.take()
            self.waited_s = sum(taken.values())
            for kind, seconds in taken.items():
                self.watch.reattribute("recomputed" if again else "compute", kind, seconds)
        self.watch.end_step()

    def broken(self, generation: int, waits: Waits | None) -> None:
        """This generation has ended here with an error; `heard` books the fault later."""
        self.watch.step_lost()
        self._broken = generation, None if waits is None else waits.last

    def heard(self, word: Aborted) -> None:
        """Book the fault that an order reports, after `broken`. An order about an older generation changes nothing."""
        if self._broken is None or word.generation < self._broken[0]:
            return
        wait = self._broken[1]
        waited = None if wait is None else (wait.kind, wait.began, wait.ended)
        self.watch.fault_known(word.began, word.heard, waited)
        self._broken = None

    def enter(self, bucket: str) -> None:
        self._broken = None
        self.watch.enter(bucket)
