"""The driver's display of a run: a live table on a terminal, plain lines with the elapsed time elsewhere.

Every method may be called from any thread. A display only prints and never stops a run.
"""

import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from infra.telemetry import redact, take_any_text
from workflows.runs.events import Event

MARKS = {"waiting": "·", "running": "▸", "committed": "✓", "reused": "✓", "resumed": "✓", "failed": "✗"}
UNFINISHED = ("failed", "cancelled")
KNOWN = ("reused", "resumed", "not run")
STYLES = {"committed": "green", "reused": "green", "resumed": "green", "running": "bold", "failed": "red"}


@dataclass
class StepView:
    """The state of one call on the screen. Times are seconds of the display's clock."""

    name: str
    status: str = "running"
    began: float = 0.0
    seconds: float | None = None
    done: float = 0.0
    total: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""
    said: float = 0.0


def show_seconds(seconds: float) -> str:
    """4.2 -> "4.2 s", 75 -> "1:15", 3675 -> "1:01:15"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_metrics(metrics: Mapping[str, float], most: int = 4) -> str:
    """{"loss": 1.2345, "kl": 0.01} -> "loss 1.23, kl 0.01"."""
    return ", ".join(f"{name} {value:.3g}" for name, value in list(metrics.items())[:most])


class Display:
    """Receives a run's events. This base class keeps the state of every running call; subclasses show it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.steps: dict[str, StepView] = {}
        self.done = 0
        self._clock = clock
        self._began = clock()
        self._lock = threading.RLock()
        self._resume = ""

    def started(self, call: str, attempt: int = 1, ago: float = 0.0) -> None:
        """An attempt of `call` began, `ago` seconds ago."""
        with self._lock:
            note = f"attempt {attempt}" if attempt > 1 else ""
            self.steps[call] = StepView(call, began=self._clock() - ago, note=note, said=self._clock())
            self._changed(self.steps[call], "started")

    def progressed(self, call: str, done: float, total: float | None, metrics: Mapping[str, float]) -> None:
        """The body of `call` called `context().progress(done, total, **metrics)`."""
        with self._lock:
            view = self.steps.setdefault(call, StepView(call, began=self._clock()))
            view.done, view.total = done, total
            view.metrics.update(metrics)
            self._changed(view, "progressed")

    def retrying(self, call: str, reason: str, delay_s: float | None) -> None:
        """An attempt failed, and a retry will begin in `delay_s` seconds (None: soon)."""
        with self._lock:
            view = self.steps.setdefault(call, StepView(call, began=self._clock()))
            again = "soon again" if delay_s is None else f"again in {delay_s:.1f} s"
            view.status, view.note = "waiting", f"{again}: {_first_line(reason)}"
            self._changed(view, "retrying")

    def pending(self, call: str, message: str) -> None:
        """An attempt of `call` waits for resources."""
        with self._lock:
            view = self.steps[call] = StepView(call, "waiting", began=self._clock(), note=message)
            self._changed(view, "pending")

    def waiting(self, call: str, message: str, command: str) -> None:
        """`call` waits for an answer; `command` gives it."""
        with self._lock:
            view = self.steps[call] = StepView(call, "waiting", began=self._clock())
            view.note = f"{_first_line(message)}{': ' if message else ''}{command}"
            self._changed(view, "waiting")

    def finished(self, call: str, status: str, note: str = "", seconds: float | None = None) -> None:
        """`call` is committed (now, or "resumed": by an earlier driver), reused or failed; its body took `seconds`."""
        with self._lock:
            view = self.steps.pop(call, None) or StepView(call, began=self._clock())
            view.status, view.note = status, _first_line(note)
            view.seconds = self._clock() - view.began if seconds is None else seconds
            self.done += status in ("committed", "reused", "resumed")
            self._changed(view, "finished")

    def say(self, line: str) -> None:
        """A line that stays on the screen, above the live part."""
        with self._lock:
            self._print(redact(line))

    def on_event(self, event: Event) -> None:
        """Show one event of the executor."""
        call, data = event.call_id, event.data
        if event.kind == "started":
            self.started(call, data["attempt"], data.get("ago", 0.0))
        elif event.kind == "progress":
            self.progressed(call, data["done"], data["total"], data["metrics"])
        elif event.kind == "retry":
            self.retrying(call, f"{data['error_type']}: {data['error']}", data["seconds"])
        elif event.kind == "pending":
            self.pending(call, data["message"])
        elif event.kind == "waiting":
            self.waiting(call, data["message"], data["command"])
        elif event.kind in ("committed", "reused", "resumed"):
            note = f"from {data['reused_from']}" if event.kind == "reused" else ""
            self.finished(call, event.kind, note, data.get("seconds"))
        elif event.kind == "failed":
            error = str(data["error"])
            if error.startswith(f"{call}: "):
                self.finished(call, "failed", error.removeprefix(f"{call}: "))
            elif error.startswith(call):
                self.finished(call, "failed", error)
            else:  # a call that it depends on has failed
                self.finished(call, "not run")
        elif event.kind in ("log", "warning"):
            where = f"{call}: " if call else ""
            self.say(f"{'warning: ' if event.kind == 'warning' else ''}{where}{data['message']}")
        elif event.kind == "run-started":
            resumed = f"; {data['resumed']} steps are already committed" if data["resumed"] else ""
            self.say(f"run {data['run_id']} of {data['workflow']} in {data['store']}{resumed}")
            self._resume = f"recua resume {data['run_id']} --store {shlex.quote(data['store'])}"
        elif event.kind == "run-ended":
            again = f"; resume with: {self._resume}" if self._resume and data["status"] in UNFINISHED else ""
            self.say(f"run {data['status']} after {show_seconds(data['seconds'])}{again}")

    def elapsed(self) -> float:
        return self._clock() - self._began

    def _changed(self, view: StepView, what: str) -> None:
        raise NotImplementedError

    def _print(self, line: str) -> None:
        raise NotImplementedError

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class PlainDisplay(Display):
    """One line per event, progress at most every `every_s` seconds per step: for logs, pipes and job output."""

    def __init__(
        self, stream: TextIO | None = None, every_s: float = 15.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(clock)
        self._stream = stream or sys.stdout
        take_any_text(self._stream)
        self._every_s = every_s

    def _changed(self, view: StepView, what: str) -> None:
        if what == "progressed":
            if self._clock() - view.said < self._every_s:
                return
            share = f"{view.done:g}/{view.total:g}" if view.total else f"{view.done:g}"
            text = f"{view.name} {share} {show_metrics(view.metrics)}"
        elif what == "started":
            text = f"{view.name} started{f' ({view.note})' if view.note else ''}"
        elif what in ("retrying", "pending"):
            text = f"{view.name} {view.note}"
        elif what == "waiting":
            text = f"{view.name} waits: {view.note}"
        else:
            took = "" if view.status in KNOWN else f" in {show_seconds(view.seconds or 0.0)}"
            tail = view.note or show_metrics(view.metrics)
            text = f"{view.name} {view.status}{took}{f': {tail}' if tail else ''}"
        view.said = self._clock()
        self._print(redact(text.rstrip()))

    def _print(self, line: str) -> None:
        minutes, seconds = divmod(int(self.elapsed()), 60)
        print(f"[{minutes:3}:{seconds:02}] {line}", file=self._stream, flush=True)


class LiveDisplay(Display):
    """Finished steps scroll by as lines; running steps stay below, with bar, time and last metrics."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._console = console
        take_any_text(cast(TextIO, console.file))
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=4, transient=True)

    def __enter__(self) -> "LiveDisplay":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def _changed(self, view: StepView, what: str) -> None:
        if what == "finished":
            tail = view.note or show_metrics(view.metrics)
            took = view.status if view.status in KNOWN else show_seconds(view.seconds or 0.0)
            line = Text(f"{MARKS.get(view.status, '?')} ", STYLES.get(view.status, ""))
            line.append(f"{view.name:<32} {took:>9}  ", "default").append(redact(tail), "dim")
            self._console.print(line)
        elif what == "retrying":
            self._console.print(Text(redact(f"↻ {view.name} {view.note}"), "yellow"))
        elif what == "pending":
            self._console.print(Text(redact(f"{MARKS['waiting']} {view.name} {view.note}"), "yellow"))
        elif what == "waiting":
            self._console.print(Text(redact(f"{MARKS['waiting']} {view.name} waits: {view.note}"), "yellow"))

    def _print(self, line: str) -> None:
        self._console.print(Text(line))

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        with self._lock:
            now = self._clock()
            active = list(self.steps.values())
            for view in active[: max(3, self._console.height - 4)]:
                bar = ProgressBar(view.total or 1.0, min(view.done, view.total or 0.0), width=24, pulse=not view.total)
                table.add_row(
                    Text(MARKS[view.status], STYLES.get(view.status, "")),
                    Text(view.name),
                    bar,
                    Text(show_seconds(now - view.began)),
                    Text(redact(" ".join(filter(None, [show_metrics(view.metrics), view.note]))), "dim"),
                )
            table.add_row("", Text(f"{self.done} done, {len(active)} running", "dim"), "", show_seconds(self.elapsed()))
        return table


def open_display(stream: TextIO | None = None) -> Display:
    """Live on a terminal, plain elsewhere."""
    console = Console(file=stream or sys.stdout)
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(stream)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else ""
