"""Commands on runs: list, show, logs, cancel, approve, send, report, goodput."""

import sys

import click

from workflows.cli import service as service_commands
from workflows.cli.options import local_folder, open_store_of, settings_of, store_option


@click.command()
@store_option
def runs(store: str | None) -> None:
    """List the runs in the store, newest first."""
    from workflows.cli.tables import show_runs
    from workflows.runs.catalog import list_runs

    show_runs(list_runs(open_store_of(settings_of(store=store))))


@click.command()
@click.argument("run_id", metavar="RUN")
@click.argument("step", required=False)
@store_option
@click.option("--why", metavar="STEP", help="Why this step (a name or a call id) ran, was reused, or would run again.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def show(run_id: str, step: str | None, store: str | None, why: str | None, as_json: bool) -> None:
    """Show RUN's steps, or one STEP (a step's name or a call id) with its result and error."""
    from workflows.cli.tables import show_run, show_step, show_why
    from workflows.runs.catalog import find_steps, load_run

    opened = open_store_of(settings_of(store=store))
    view = load_run(opened, run_id)
    if why is not None:
        from workflows.launch.script import import_code
        from workflows.runs.why import Reasons

        reasons = Reasons(opened, run_id, import_code)
        show_why([reasons.of(found) for found in find_steps(view, why)], as_json)
    elif step is None:
        show_run(view, opened.url, as_json)
    else:
        for found in find_steps(view, step):
            show_step(found, as_json)


@click.command()
@click.argument("run_id", metavar="RUN")
@click.argument("step", required=False)
@store_option
def logs(run_id: str, step: str | None, store: str | None) -> None:
    """Print the output of RUN's steps (or of one STEP, a name or call id), attempt by attempt."""
    from workflows.cli.tables import show_logs
    from workflows.runs.catalog import find_steps, load_run

    opened = open_store_of(settings_of(store=store))
    view = load_run(opened, run_id)
    show_logs(opened, run_id, view.steps if step is None else find_steps(view, step))


@click.command()
@click.argument("run_id", metavar="RUN")
@store_option
def cancel(run_id: str, store: str | None) -> None:
    """Ask RUN's driver to stop, and wait until it has; the run can be resumed."""
    status = service_commands.cancel(open_store_of(settings_of(store=store)), run_id)
    click.echo(f"run {run_id} is {status}")
    if status == "running":
        sys.exit(1)


@click.command()
@click.argument("run_id", metavar="RUN")
@click.argument("step")
@click.option("--deny", is_flag=True, help="Deny the approval: the workflow gets a Denied.")
@click.option("--comment", default="", metavar="TEXT", help="Kept with the answer.")
@store_option
def approve(run_id: str, step: str, deny: bool, comment: str, store: str | None) -> None:
    """Answer RUN's approval STEP (its name or call id; `recua show RUN` lists those that wait). The first answer
    counts.
    """
    from workflows.runs.catalog import load_run
    from workflows.runs.signals import me, reply

    opened = open_store_of(settings_of(store=store))
    load_run(opened, run_id)
    click.echo(reply(opened, run_id, step, "approval", {"approve": not deny, "comment": comment}, me()))


@click.command()
@click.argument("run_id", metavar="RUN")
@click.argument("step")
@click.argument("value", metavar="JSON")
@store_option
def send(run_id: str, step: str, value: str, store: str | None) -> None:
    """Send JSON to RUN's event STEP (its name or call id; `recua show RUN` lists those that wait). The first one
    counts.
    """
    import json

    from infra.errors import ConfigError
    from workflows.runs.catalog import load_run
    from workflows.runs.signals import me, reply

    try:
        tree = json.loads(value)
    except ValueError as error:
        raise ConfigError(f"JSON {value!r}: {error}; text needs its own quotes: '\"text\"'") from None
    opened = open_store_of(settings_of(store=store))
    load_run(opened, run_id)
    click.echo(reply(opened, run_id, step, "event", tree, me()))


@click.command()
@click.argument("run_id", metavar="RUN")
@store_option
@click.option("--output", default="runs", metavar="DIR", help="Write DIR/RUN/report.html and .json  [default: runs].")
def report(run_id: str, store: str | None, output: str) -> None:
    """Write RUN's report: one self-contained HTML page, and report.json beside it."""
    from workflows.report.record import read_run
    from workflows.report.summary import summarise, table_lines
    from workflows.report.write import write
    from workflows.runs.catalog import load_run

    folder = local_folder(output, "--output")
    opened = open_store_of(settings_of(store=store))
    record = read_run(opened, load_run(opened, run_id))
    page = write(record, folder / run_id)
    for line in table_lines(summarise(record)):
        click.echo(line)
    click.echo(f"report: {page.absolute()}")


@click.command()
@click.argument("run_id", metavar="RUN")
@store_option
@click.option("--json", "as_json", is_flag=True, help="As one JSON list, an object per elastic group.")
def goodput(run_id: str, store: str | None, as_json: bool) -> None:
    """Show where the time of RUN's ranks went: useful computing and every kind of loss, the pauses, and time that is
    not accounted for."""
    import json

    from cluster.goodput.accounts import read_run
    from infra.errors import UserError
    from workflows.runs.catalog import load_metadata

    opened = open_store_of(settings_of(store=store))
    load_metadata(opened, run_id)
    reports = read_run(opened, run_id)
    if not reports:
        raise UserError(f"run {run_id!r} has no elastic group: only elastic training records its ranks' time")
    if as_json:
        click.echo(json.dumps([report.to_json() for report in reports]))
    else:
        click.echo("\n\n".join(report.to_text() for report in reports))
