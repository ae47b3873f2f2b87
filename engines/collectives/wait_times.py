"""How long a rank waited for others within a step, by kind: timed where it waits, never what is left over.

Who waits for whom: the training thread waits for its peers; nobody waits for what is counted here. On the CPU a wait
blocks the thread, in `Work.wait` (collectives, FSDP's gathers and reductions included) or in `wait_tensor` (tensor
parallelism). On CUDA it blocks the compute stream and not the thread: events of that stream before and after it begins
to wait for another one tell how long. torch (2.13) has no hook there, so these functions are wrapped while a step runs,
and only then; it costs about a microsecond per wait.

What a compiled block waits for inside itself is not seen.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

KINDS = ("exposed_communication", "pipeline_bubble", "checkpoint_stall")
"""Names of cluster.goodput.buckets, which this layer does not import; a test holds the two together."""


@dataclass(frozen=True)
class Wait:
    """One wait of the thread, by time.monotonic()."""

    kind: str
    began: float
    ended: float


class Waits:
    """The waits of one rank.

    Args:
        device: cuda times the compute stream, everything else the thread.
        alone: there are no others.
    """

    def __init__(self, device: torch.device, alone: bool = False) -> None:
        self.last: Wait | None = None
        """The thread's latest: the one that an error ended, after an error."""
        self._alone = alone
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._kind = KINDS[0]
        self._inside = False
        self._stream = _StreamWaits(device) if device.type == "cuda" and not alone else None

    def take(self) -> dict[str, float]:
        """Seconds by kind since the last call."""
        taken, self._seconds = self._seconds, dict.fromkeys(KINDS, 0.0)
        if self._stream is not None:
            for kind, seconds in self._stream.finished():
                taken[kind] += seconds
        return taken

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, this process's waits for other ranks are counted."""
        if self._alone:
            yield
            return
        from torch.distributed import _functional_collectives as functional

        with ExitStack() as wrapped:
            wrapped.enter_context(replaced(dist.Work, "wait", self._timed))
            wrapped.enter_context(replaced(functional, "wait_tensor", self._timed_eagerly))
            if self._stream is not None:
                wrapped.enter_context(replaced(torch.cuda.Stream, "wait_event", self._stream.timed(self)))
            yield

    @contextmanager
    def waiting(self, kind: str) -> Iterator[None]:
        """The thread does nothing but wait in here."""
        before, self._inside = self._inside, True
        began = time.monotonic()
        try:
            yield
        finally:
            self._inside = before
            if not before:
                self._add(Wait(kind, began, time.monotonic()))

    @contextmanager
    def counted_as(self, kind: str) -> Iterator[None]:
        """What is waited for in here counts as `kind`."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def counting_as(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose waits count as `kind`."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.counted_as(kind):
                return function(*args, **kwargs)

        return counted

    def _add(self, wait: Wait) -> None:
        self.last = wait
        self._seconds[wait.kind] += wait.ended - wait.began

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self._stream is not None:
            return self._stream.timed(self)(function)

        def wait(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            began = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                self._add(Wait(self._kind, began, time.monotonic()))

        return wait

    def _timed_eagerly(self, function: Callable[..., Any]) -> Callable[..., Any]:
        timed = self._timed(function)

        def wait(*args: Any, **kwargs: Any) -> Any:
            return (function if torch.compiler.is_compiling() else timed)(*args, **kwargs)

        return wait


class _StreamWaits:
    """Waits of the stream that a step computes on."""

    def __init__(self, device: torch.device) -> None:
        self._compute = torch.cuda.current_stream(device)
        self._waits: list[tuple[str, Any, Any]] = []
        self._spare: list[Any] = []

    def timed(self, waits: Waits) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            def wait(*args: Any, **kwargs: Any) -> Any:
                if torch.cuda.current_stream(self._compute.device) != self._compute:
                    return function(*args, **kwargs)
                before, after = self._event(), self._event()
                before.record(self._compute)
                result = function(*args, **kwargs)
                after.record(self._compute)
                self._waits.append((waits._kind, before, after))
                return result

            return wait

        return wrap

    def finished(self) -> Iterator[tuple[str, float]]:
        """(kind, seconds) of those that are over; the others are named by a later call."""
        open_waits = []
        for kind, before, after in self._waits:
            if after.query():
                yield kind, before.elapsed_time(after) / 1000
                self._spare += [before, after]
            else:
                open_waits.append((kind, before, after))
        self._waits = open_waits

    def _event(self) -> Any:
        return self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)


@contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """`owner.name` is `wrap(owner.name)` inside."""
    original = vars(owner)[name]  # not getattr: what is put back must bind as it did
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        setattr(owner, name, original)
