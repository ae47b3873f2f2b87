"""What the terminal shows, line by line, with a clock in the test's hand."""

import io

import pytest
from rich.console import Console

from workflows.launch.display import LiveDisplay, PlainDisplay, open_display, show_seconds
from workflows.runs.events import Event


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("seconds", "shown"), [(4.2, "4.2 s"), (75, "1:15"), (3675, "1:01:15")])
def test_seconds(seconds: float, shown: str) -> None:
    assert show_seconds(seconds) == shown


def test_plain_lines_have_the_elapsed_time_and_throttle_progress() -> None:
    stream, clock = io.StringIO(), Clock()
    display = PlainDisplay(stream, every_s=10, clock=clock)
    display.started("sft")
    for second in range(1, 26):
        clock.now = 100.0 + second
        display.progressed("sft", second, 50, {"loss": 3.0 - second / 10})
    clock.now = 165.0
    display.finished("sft", "committed")
    display.finished("corpus", "reused")
    display.say("report: somewhere; HF_TOKEN=hf_abcdefghijklmnop")
    assert stream.getvalue().splitlines() == [
        "[  0:00] sft started",
        "[  0:10] sft 10/50 loss 2",
        "[  0:20] sft 20/50 loss 1",
        "[  1:05] sft committed in 1:05: loss 0.5",
        "[  1:05] corpus reused",
        "[  1:05] report: somewhere; HF_TOKEN=[redacted]",
    ]


def test_plain_retry_and_failure_keep_to_one_line() -> None:
    stream, clock = io.StringIO(), Clock()
    display = PlainDisplay(stream, clock=clock)
    display.started("ppo")
    display.retrying("ppo", "node 1 was lost\nlong trace", 2.0)
    display.started("ppo", attempt=2)
    display.finished("ppo", "failed", "ValueError: no\nmore")
    assert stream.getvalue().splitlines() == [
        "[  0:00] ppo started",
        "[  0:00] ppo again in 2.0 s: node 1 was lost",
        "[  0:00] ppo started (attempt 2)",
        "[  0:00] ppo failed in 0.0 s: ValueError: no",
    ]


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        ("finished", "run finished after 1:05"),
        ("failed", "run failed after 1:05; resume with: recua resume r1 --store '/a b'"),
        ("cancelled", "run cancelled after 1:05; resume with: recua resume r1 --store '/a b'"),
    ],
)
def test_a_run_that_did_not_finish_says_how_to_go_on(status: str, shown: str) -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream, clock=Clock())
    started = {"run_id": "r1", "workflow": "w:w", "store": "/a b", "resumed": 0}
    display.on_event(Event("run-started", data=started))
    display.on_event(Event("run-ended", data={"status": status, "seconds": 65.0}))
    assert stream.getvalue().splitlines()[1:] == [f"[  0:00] {shown}"]


def test_live_shows_running_steps_below_and_finished_ones_as_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=100, height=20, color_system=None)
    with LiveDisplay(console, clock=clock) as display:
        display.started("tokenizer")
        display.started("pretrain")
        display.progressed("pretrain", 40, 80, {"loss": 2.125})
        clock.now = 130.0
        display.finished("tokenizer", "committed")
        lines = console.render_lines(display._table())  # the part that is redrawn in place
        table = "\n".join("".join(segment.text for segment in line) for line in lines)
    assert "pretrain" in table and "30.0 s" in table and "loss 2.12" in table and "1 done, 1 running" in table
    assert "tokenizer" not in table
    assert "✓ tokenizer" in stream.getvalue()


def test_a_pipe_gets_plain_lines() -> None:
    assert isinstance(open_display(io.StringIO()), PlainDisplay)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("live", [False, True])
def test_any_text_and_any_number_is_shown_on_any_terminal(encoding: str, live: bool) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    shown = LiveDisplay(Console(file=stream, force_terminal=True)) if live else PlainDisplay(stream, every_s=0.0)
    with shown as display:
        display.on_event(Event("started", "a[0]", "a", {"attempt": 1}))
        odd = {"done": 5, "total": -3, "metrics": {"loss": float("nan"), "x\udce9": float("inf")}}
        display.on_event(Event("progress", "a[0]", "a", odd))
        display.on_event(Event("log", "a[0]", "a", {"message": "caf\udce9 日本"}))
    stream.flush()
    assert b"caf\\udce9" in raw.getvalue()
