"""Runs, steps, plans and logs as text (or JSON) on the terminal, and models found by name."""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra.machine import show_size
from infra.storage import Store
from infra.telemetry import redact, shorten
from workflows.launch.display import show_seconds
from workflows.launch.plan import Plan
from workflows.runs.catalog import RunSummary, RunView, StepView, artifacts_of, read_log
from workflows.runs.signals import command
from workflows.runs.why import Why

SHOWN_LETTERS = 200_000
"""Most characters of an error; of a longer one, its beginning and its end are shown."""
STYLES = {"finished": "green", "committed": "green", "reused": "green", "running": "bold", "failed": "red"}


def show_runs(runs: Iterable[RunSummary]) -> None:
    """One line per run."""
    rows = [
        [run.run_id, run.status, _when(run.created), _duration(run), f"{run.done}/{sum(run.counts.values())}"]
        for run in runs
    ]
    if not rows:
        click.echo("no runs yet; start one with `recua run WORKFLOW_FILE --recipe FILE`")
        return
    _print_table(["run", "status", "started", "took", "steps done"], rows, styled=1)


def show_run(view: RunView, store_url: str, as_json: bool = False) -> None:
    """A run's summary, its steps, and the command that answers a waiting one."""
    if as_json:
        click.echo(redact(json.dumps(asdict(view), indent=2)))
        return
    click.echo(
        f"{view.run_id}: {view.workflow}, {view.status}, {_duration(view)}, {view.drivers} driver(s); {view.driver}"
    )
    rows = []
    for step in view.steps:
        made = ", ".join(f"{entry['name']} {entry['digest'][:12]}" for entry in artifacts_of(step))
        error = (step.error or {}).get("message", "").partition("\n")[0]
        error = error if len(error) <= 60 else f"{error[:57]}..."  # whole in `recua show RUN STEP`
        seconds = "" if step.seconds is None else show_seconds(step.seconds)
        if step.status.startswith("waiting-for"):
            made = step.message
        rows.append([step.call_id, step.status, seconds, str(len(step.attempts)), redact(error) if error else made])
    _print_table(["step", "status", "took", "attempts", "artifacts"], rows, styled=1)
    for step in view.steps:
        if step.status.startswith("waiting-for"):
            click.echo(
                f"{step.call_id} waits for an answer: {command(view.run_id, step.call_id, step.step, store_url)}"
            )
    if view.error:
        click.echo(redact(f"error: {shorten(view.error.get('message', ''), SHOWN_LETTERS)}"))


def show_step(step: StepView, as_json: bool = False) -> None:
    """One call with all its data."""
    if as_json:
        click.echo(redact(json.dumps(asdict(step), indent=2)))
        return
    took = "" if step.seconds is None else f", {show_seconds(step.seconds)}"
    click.echo(
        f"{step.call_id}: {step.step}, {step.status}{took}, {len(step.attempts)} attempt(s) {step.node}".rstrip()
    )
    if step.reused_from:
        click.echo(f"reused from run {step.reused_from}")
    if step.needs:
        click.echo(f"takes the results of {', '.join(step.needs)}")
    if step.message:
        click.echo(redact(step.message))
    if step.error:
        click.echo(redact(shorten(step.error.get("traceback") or step.error.get("message", ""), SHOWN_LETTERS)))
    if step.result is not None:
        click.echo(redact(json.dumps(step.result, indent=2)))


def show_why(answers: Iterable[Why], as_json: bool = False) -> None:
    """Why calls ran, were reused, or would run again."""
    if as_json:
        click.echo(redact(json.dumps([asdict(answer) for answer in answers], indent=2)))
        return
    for answer in answers:
        for line in answer.sentences():
            click.echo(redact(line))


def show_logs(store: Store, run_id: str, steps: Iterable[StepView]) -> None:
    """The output of the attempts, in the order of their starts."""
    for step in steps:
        for number, attempt in enumerate(step.attempts, start=1):
            if text := read_log(store, run_id, attempt):
                click.echo(f"--- {step.call_id}, attempt {number}")
                click.echo(redact(text.rstrip("\n")))


def show_plan(plan: Plan) -> None:
    """The plan of a run. Calls are numbered; `after` lists the numbers of the calls whose results they need."""
    rows = []
    number = {call.call_id: str(index) for index, call in enumerate(plan.calls, start=1)}
    for call in plan.calls:
        asks = [f"{call.num_cpus:g} CPU", f"{call.num_gpus:g} GPU" if call.num_gpus else ""]
        asks += [
            show_size(call.memory) if call.memory else "",
            f"limit {show_seconds(call.timeout)}" if call.timeout else "",
        ]
        asks += [f"gang of {call.gang}" if call.gang else ""]
        took = "" if call.seconds is None else show_seconds(call.seconds)
        after = " ".join(number[need] for need in dict.fromkeys(call.needs))
        rows.append([number[call.call_id], call.call_id, call.status, took, ", ".join(filter(None, asks)), after])
    click.echo(f"run {plan.run_id} in {plan.store}")
    _print_table(["", "step", "status", "took then", "asks for", "after"], rows, styled=2)
    if origins := dict.fromkeys(call.reused_from for call in plan.calls if call.status == "reusable"):
        click.echo(f"reusable results come from {', '.join(str(origin) for origin in origins)}")
    if plan.unknown_after:
        click.echo(f"later steps are known only at run time: they depend on the result of {plan.unknown_after}")
    free = "" if plan.free_bytes is None else f", {show_size(plan.free_bytes)} free"
    click.echo(f"stored by the known steps: {show_size(plan.stored_bytes)}{free}")
    for warning in plan.warnings:
        click.echo(f"warning: {warning}", err=True)


def _print_table(header: list[str], rows: list[list[str]], styled: int) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in header:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, STYLES.get(cell, "") if index == styled else "") for index, cell in enumerate(row)))
    console = Console()
    if console.is_terminal:
        console.print(table)
        return
    widest = sum(max(len(row[i]) for row in [header, *rows]) + 3 for i in range(len(header)))
    with (console := Console(width=max(80, widest))).capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        click.echo(line.rstrip())


def _duration(run: RunView | RunSummary) -> str:
    end = run.ended or (time.time() if run.status == "running" else None)
    return "" if end is None else show_seconds(end - run.created)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
