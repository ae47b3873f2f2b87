"""The `recua` command: run workflow files, look into runs, serve and chat with what they made.

Only click is imported here; every command imports what it needs when it is called, so that `recua --help` is quick.
Exit codes: 0 done, 1 a step (or the platform or the store) failed, 2 something for the user to change, 130 interrupted.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from workflows.guarded import guarded
from workflows.service import commands as service_commands

if TYPE_CHECKING:
    from infra.storage import Store
    from workflows.config import RunSettings

RUN_EXAMPLES = """
\b
Examples:
  recua run workflows/llama3_posttrain.py --recipe recipes/tiny.toml
  recua run workflows/llama3_posttrain.py --recipe recipes/tiny.toml --set seed=2 --set dpo.beta=0.2
  recua run FILE --recipe R --plan                 what would run, what is reused; runs nothing
  recua run FILE --recipe R --rerun build_corpus   a new run that reuses everything else
  recua run FILE --recipe R --store s3://bucket/runs --address auto
  recua run FILE --recipe R --detach               hand it to the service that `recua up` started
"""

GC_EXAMPLES = """
\b
Examples:
  recua gc                                 what could go, and what stays; changes nothing
  recua gc --keep-runs 20 --yes            the newest 20 runs and all that they need stay
  recua gc --explain 3f2a91c0              who needs this artifact
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="recua", message="recua %(version)s")
def main_group() -> None:
    """Train and serve Llama models as one durable graph on Ray.

    A workflow file calls steps; every finished step is committed to a store, so the same command after a crash, a
    Ctrl-C or a lost machine goes on where it stopped. A recipe (TOML) holds the settings.

    \b
    First steps:
      recua run workflows/llama3_posttrain.py --recipe recipes/tiny.toml    start, or go on
      recua runs                                                           what there is
      recua show RUN                                                       its steps
      recua report RUN                                                     the run's page in one HTML file
      recua serve RUN                                                      its model, over gRPC and OpenAI HTTP
      recua chat localhost:50051                                           talk to it

    \b
    Without this terminal, on a cluster or on this machine:
      recua up                            a service with a web page; it survives logout and the loss of any process
      recua run FILE --recipe R --detach  hand a run to it
      recua watch RUN                     follow the run; Ctrl-C ends the watching only
      recua down                          stop the service

    Runs are kept where --store or RECUA_STORE says (a folder or s3://bucket/prefix), else in the store of the service
    that `recua up` started, else in ~/.recua/store.
    """


class FiniteRange(click.FloatRange):
    """A number in a range, and no NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value} is no finite number.", param, ctx)


def store_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--store, the same for every command."""
    return click.option(
        "--store",
        envvar="RECUA_STORE",
        metavar="URL",
        help="Where runs are kept: a folder or s3://bucket/prefix  [default: the service's, else ~/.recua/store].",
    )(command)


def restarts_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--local-ray-restarts, the same wherever a Ray of our own may be started."""
    return click.option(
        "--local-ray-restarts",
        type=click.IntRange(min=0),
        metavar="N",
        help="How often a local Ray that dies is started again within ten minutes  [default: 3].",
    )(command)


@dataclass(frozen=True)
class RunOptions:
    """What `run_options` gives, by the names of its parameters."""

    recipe: str | None
    overrides: tuple[str, ...]
    store: str | None
    run_id: str | None
    only_plan: bool
    new: bool
    rerun: tuple[str, ...]
    address: str | None
    local_ray_restarts: int | None
    reports: str
    detach: bool
    service: str | None
    token_file: str | None


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `recua run` and a workflow file run as a script have in common."""
    options: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
        click.option("--recipe", metavar="FILE", help="TOML file with the settings."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting; repeatable."),
        store_option,
        click.option("--run", "run_id", metavar="ID", help="Name of the run  [default: workflow and recipe's hash]."),
        click.option("--plan", "only_plan", is_flag=True, help="Show steps, reuse, resources, disk; run nothing."),
        click.option("--new", is_flag=True, help="A new run of this recipe that reuses nothing."),
        click.option("--rerun", multiple=True, metavar="STEP", help="A new run that reuses all but this; repeatable."),
        click.option(
            "--address",
            metavar="local|auto|ray://...",
            help="Ray to use  [default: RAY_ADDRESS where it is set, as in a Ray job, else a fresh local one].",
        ),
        restarts_option,
        click.option(
            "--reports", default="runs", metavar="DIR", help="Where DIR/RUN/report.html goes  [default: runs]."
        ),
        click.option("--detach", is_flag=True, help="Hand it to the service (`recua up`) and return."),
        service_commands.service_options,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main_group.command(epilog=RUN_EXAMPLES)
@click.argument("file", metavar="WORKFLOW_FILE", type=click.Path(path_type=Path))
@run_options
def run(file: Path, **given: Any) -> None:
    """Run the workflow in WORKFLOW_FILE, or go on with it, or show its result where it has finished. Of several in one
    file, WORKFLOW_FILE:NAME is one."""
    _run(file, RunOptions(**given))


@main_group.command()
@click.argument("run_id", metavar="RUN")
@store_option
@click.option("--address", metavar="local|auto|ray://...", help="Ray to use.")
@restarts_option
@click.option("--reports", default="runs", metavar="DIR", help="Where DIR/RUN/report.html goes  [default: runs].")
@click.option("--detach", is_flag=True, help="Have the service that it was submitted to go on with it, and return.")
@service_commands.service_options
def resume(
    run_id: str,
    store: str | None,
    address: str | None,
    local_ray_restarts: int | None,
    reports: str,
    detach: bool,
    service: str | None,
    token_file: str | None,
) -> None:
    """Go on with RUN; its workflow and recipe are in the store."""
    from workflows import launch

    if detach:
        service_commands.resume(run_id, store, service, token_file)
        return
    settings = _settings(store=store, ray_address=address, local_ray_restarts=local_ray_restarts)
    launch.resume(_open(settings), run_id, settings, _folder(reports, "--reports"))


@main_group.command()
@store_option
def runs(store: str | None) -> None:
    """List the runs in the store, newest first."""
    from workflows.listing import show_runs
    from workflows.runs import list_runs

    show_runs(list_runs(_open(_settings(store=store))))


@main_group.command()
@click.argument("run_id", metavar="RUN")
@click.argument("step", required=False)
@store_option
@click.option("--why", metavar="STEP", help="Why this step (a name or a call id) ran, was reused, or would run again.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def show(run_id: str, step: str | None, store: str | None, why: str | None, as_json: bool) -> None:
    """Show RUN's steps, or one STEP (a step's name or a call id) with its result and error."""
    from workflows.listing import show_run, show_step, show_why
    from workflows.runs import find_steps, load_run

    opened = _open(_settings(store=store))
    view = load_run(opened, run_id)
    if why is not None:
        from workflows.launch import import_code
        from workflows.why import Reasons

        reasons = Reasons(opened, run_id, import_code)
        show_why([reasons.of(found) for found in find_steps(view, why)], as_json)
    elif step is None:
        show_run(view, opened.url, as_json)
    else:
        for found in find_steps(view, step):
            show_step(found, as_json)


@main_group.command()
@click.argument("run_id", metavar="RUN")
@click.argument("step", required=False)
@store_option
def logs(run_id: str, step: str | None, store: str | None) -> None:
    """Print what RUN's steps (or one STEP, a name or call id) printed, attempt by attempt."""
    from workflows.listing import show_logs
    from workflows.runs import find_steps, load_run

    opened = _open(_settings(store=store))
    view = load_run(opened, run_id)
    show_logs(opened, run_id, view.steps if step is None else find_steps(view, step))


@main_group.command()
@click.argument("run_id", metavar="RUN")
@store_option
def cancel(run_id: str, store: str | None) -> None:
    """Ask RUN's driver to stop and wait for it; the run can be resumed."""
    status = service_commands.cancel(_open(_settings(store=store)), run_id)
    click.echo(f"run {run_id} is {status}")
    if status == "running":
        sys.exit(1)


@main_group.command(epilog=GC_EXAMPLES)
@store_option
@click.option("--keep-runs", type=click.IntRange(min=0), metavar="N", help="Remove ended runs but the newest N.")
@click.option("--keep-days", type=FiniteRange(min=0), metavar="D", help="Remove runs that ended over D days ago.")
@click.option("--run", "runs", multiple=True, metavar="RUN", help="Remove this run; repeatable.")
@click.option(
    "--grace",
    "grace_s",
    type=FiniteRange(min=0),
    default=3600.0,
    metavar="SECONDS",
    help="From mark to deletion  [default: 3600].",
)
@click.option("--yes", is_flag=True, help="Do it; without it only a plan is shown.")
@click.option("--dry-run", is_flag=True, help="Show the plan (the default).")
@click.option("--explain", "digest", metavar="DIGEST", help="Say who needs the artifact with this digest.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def gc(
    store: str | None,
    keep_runs: int | None,
    keep_days: float | None,
    runs: tuple[str, ...],
    grace_s: float,
    yes: bool,
    dry_run: bool,
    digest: str | None,
    as_json: bool,
) -> None:
    """Remove what no run needs: attempts that lost, old runs by your policy, what is left of them.

    Artifacts that another run reuses stay. What goes is marked first and deleted by a later `recua gc --yes`, when the
    grace period is over.

    The same for snapshots in this machine's memory (/dev/shm/recua-node-*) that crashed pretrainings left: those that
    no process works with go, where their run is finished or removed. What a run may still go on from stays. Other
    machines are swept when the next pretraining starts on them.
    """
    from cluster.node import host_memory
    from workflows import gc as collector
    from workflows import housekeeping
    from workflows.status import standing

    if yes and dry_run:
        raise click.UsageError("--yes and --dry-run contradict each other")
    opened = _open(_settings(store=store))
    if digest is not None:
        for line in collector.explain(opened, digest):
            click.echo(line)
        return
    policy = collector.Policy(runs, keep_runs, keep_days, grace_s)
    if yes:
        result = collector.collect(opened, policy)
        memory = host_memory.survey(standing)
        host_memory.free(memory)
        housekeeping.show_result(result, policy, memory, as_json)
    else:
        plan = collector.plan_gc(opened, policy)
        housekeeping.show_plan(plan, policy, host_memory.survey(standing), as_json)


@main_group.command()
@click.argument("run_id", metavar="RUN")
@click.argument("step")
@click.option("--deny", is_flag=True, help="Say no: the workflow gets a Denied.")
@click.option("--comment", default="", metavar="TEXT", help="Kept with the answer.")
@store_option
def approve(run_id: str, step: str, deny: bool, comment: str, store: str | None) -> None:
    """Answer RUN's approval STEP (its name or call id; `recua show RUN` has what waits). The first answer counts."""
    from workflows.runs import load_run
    from workflows.waits import me, reply

    opened = _open(_settings(store=store))
    load_run(opened, run_id)
    click.echo(reply(opened, run_id, step, "approval", {"approve": not deny, "comment": comment}, me()))


@main_group.command()
@click.argument("run_id", metavar="RUN")
@click.argument("step")
@click.argument("value", metavar="JSON")
@store_option
def send(run_id: str, step: str, value: str, store: str | None) -> None:
    """Send JSON to RUN's event STEP (its name or call id; `recua show RUN` has what waits). The first one counts."""
    import json

    from infra.errors import ConfigError
    from workflows.runs import load_run
    from workflows.waits import me, reply

    try:
        tree = json.loads(value)
    except ValueError as error:
        raise ConfigError(f"JSON {value!r}: {error}; text needs its own quotes: '\"text\"'") from None
    opened = _open(_settings(store=store))
    load_run(opened, run_id)
    click.echo(reply(opened, run_id, step, "event", tree, me()))


@main_group.command()
@click.argument("run_id", metavar="RUN")
@store_option
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="A name in .gz: compressed  [RUN.tar].")
@click.option("--only-results", is_flag=True, help="Of a finished run: only artifacts in its result and its recipe.")
@click.option("--no-logs", is_flag=True, help="Leave out what steps and drivers printed.")
def export(run_id: str, store: str | None, out: Path | None, only_results: bool, no_logs: bool) -> None:
    """Write RUN with all that it needs into one file, for `recua import`.

    That is its recipe, journal, logs and report, every artifact that it refers to, its code's fingerprints, and the
    code package of a run of the service. A run that has not finished can be resumed from it.

    With --only-results the artifacts that steps handed to each other stay out: the run can be shown, reported and
    served from the bundle, and nothing else of it can be reused. Known forms of secrets in logs are blanked.
    """
    from infra.machine import show_size
    from workflows.bundle import export_run

    target = _folder(out or f"{run_id}.tar", "--out")
    size = export_run(_open(_settings(store=store)), run_id, target, not no_logs, only_results)
    click.echo(f"wrote {target} ({show_size(size)}); elsewhere: recua import {target} --store STORE")


@main_group.command(name="import")
@click.argument("file", type=click.Path(path_type=Path))
@store_option
def import_bundle(file: Path, store: str | None) -> None:
    """Put the run in FILE, written by `recua export`, into the store: to show, report, serve, resume and reuse.

    Every checksum is compared first; of a damaged file nothing is imported.
    """
    from workflows.bundle import import_run

    opened = _open(_settings(store=store))
    opened.check()
    run_id = import_run(opened, file)
    click.echo(f"run {run_id} is in {opened.url}: recua show {run_id} --store {opened.url}")


@main_group.command()
@click.argument("run_id", metavar="RUN")
@store_option
@click.option("--output", default="runs", metavar="DIR", help="Write DIR/RUN/report.html and .json  [default: runs].")
def report(run_id: str, store: str | None, output: str) -> None:
    """Write RUN's report: one self-contained HTML page, and report.json beside it."""
    from workflows import report as reports
    from workflows.runs import load_run

    folder = _folder(output, "--output")
    opened = _open(_settings(store=store))
    record = reports.read_run(opened, load_run(opened, run_id))
    page = reports.write(record, folder / run_id)
    for line in reports.table_lines(reports.summarise(record)):
        click.echo(line)
    click.echo(f"report: {page.absolute()}")


@main_group.command()
@click.argument("run_id", metavar="RUN")
@store_option
@click.option("--json", "as_json", is_flag=True, help="As one JSON list, an object per elastic group.")
def goodput(run_id: str, store: str | None, as_json: bool) -> None:
    """Show where the time of RUN's ranks went: useful computing and every kind of loss, its pauses, and what its
    records do not say."""
    import json

    from cluster.goodput.accounts import read_run
    from infra.errors import UserError
    from workflows.runs import load_metadata

    opened = _open(_settings(store=store))
    load_metadata(opened, run_id)
    reports = read_run(opened, run_id)
    if not reports:
        raise UserError(f"run {run_id!r} has no elastic group: only elastic training keeps accounts of its ranks' time")
    if as_json:
        click.echo(json.dumps([report.to_json() for report in reports]))
    else:
        click.echo("\n\n".join(report.to_text() for report in reports))


@main_group.command()
@click.argument("artifact")
@store_option
@click.option("--grpc-port", type=int, help="Port of the gRPC gateway; 0: any free one.")
@click.option("--http-port", type=int, help="Port of the OpenAI-compatible server; 0: any free one.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any setting of the serving section.")
@click.option("--address", default="local", metavar="local|auto|ray://...", help="Ray to use  [default: local].")
@restarts_option
def serve(
    artifact: str,
    store: str | None,
    grpc_port: int | None,
    http_port: int | None,
    overrides: tuple[str, ...],
    address: str,
    local_ray_restarts: int | None,
) -> None:
    """Serve ARTIFACT until Ctrl-C: a model folder, a RUN, RUN:STEP, or the first digits of an artifact's digest."""
    from infra.config import load
    from serving.config import ServingSettings
    from serving.console import serve_forever
    from workflows.listing import find_model

    ports = {"grpc_port": grpc_port, "http_port": http_port}
    given = [f"{name}={port}" for name, port in ports.items() if port is not None]
    settings = load(None, ServingSettings, [*overrides, *given])
    run = _settings(store=store, local_ray_restarts=local_ray_restarts)
    folder, version = find_model(artifact, run)
    serve_forever(folder, settings, version, address, run.local_ray_restarts, run.retry_window_s, say=click.echo)


@main_group.command()
@click.argument("address", default="127.0.0.1:50051")
@click.option("--token-file", type=click.Path(path_type=Path), help="File whose first line is the bearer token.")
@click.option("--tls-ca", type=click.Path(path_type=Path), help="PEM file of the authority that signed the endpoint.")
@click.option("--system", default="", help="System instruction.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer.")
@click.option("--temperature", type=FiniteRange(min=0), help="0 is greedy.")
def chat(
    address: str,
    token_file: Path | None,
    tls_ca: Path | None,
    system: str,
    max_tokens: int | None,
    temperature: float | None,
) -> None:
    """Talk to a served model over gRPC at ADDRESS [default: 127.0.0.1:50051]. /new forgets, /exit ends."""
    from infra.tokens import read_tokens
    from serving.console import chat_loop

    token = None if token_file is None else read_tokens(token_file, "--token-file")[0]
    authority = None if tls_ca is None else _read(tls_ca, "--tls-ca")
    chat_loop(address, token, authority, system, max_tokens, temperature, say=_say)


for command in (service_commands.up, service_commands.down, service_commands.watch):
    main_group.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """The console script: runs a command and exits with its code."""
    sys.exit(guarded(lambda: main_group(arguments, prog_name="recua", standalone_mode=False)))


def run_script(file: str) -> None:
    """`python workflows/x.py ...` is `recua run workflows/x.py ...`. Call it under `if __name__ == "__main__":`.

    `file`: `__file__`, or f"{__file__}:NAME" where the file has several workflows.

    Raises:
        UserError: the file is being imported.
    """
    path, caller = Path(file), sys._getframe(1)
    if caller.f_code.co_name == "<module>" and caller.f_globals["__name__"] != "__main__":
        from infra.errors import UserError

        raise UserError(
            f'workflow {path}: write `if __name__ == "__main__":` above run_script, workers import the file'
        )
    command = click.Command(
        path.name,
        params=run.params[1:],
        callback=lambda **given: _run(path, RunOptions(**given)),
        help=f"The same as `recua run {path}`.",
        epilog=RUN_EXAMPLES,
        context_settings=main_group.context_settings,
    )
    sys.exit(guarded(lambda: command(prog_name=path.name, standalone_mode=False)))


def _run(file: Path, given: RunOptions) -> None:
    from workflows import launch

    which: dict[str, Any] = {"store": given.store, "run_id": given.run_id, "new": given.new}
    if given.detach and not given.only_plan:
        which["rerun"] = list(given.rerun)
        service_commands.detach(file, given.recipe, given.overrides, given.service, given.token_file, **which)
        return
    folder = _folder(given.reports, "--reports")
    settings = _settings(
        **which, rerun=given.rerun, ray_address=given.address, local_ray_restarts=given.local_ray_restarts
    )
    prepared = launch.prepare(file, given.recipe, given.overrides)
    if given.only_plan:
        from workflows.listing import show_plan
        from workflows.planning import plan

        show_plan(plan(prepared.workflow, *prepared.args, settings=settings, **prepared.kwargs))
        return
    launch.run(prepared, settings, folder)


def _settings(**given: Any) -> "RunSettings":
    from infra.config import validate
    from workflows.config import RunSettings
    from workflows.service import places

    if given.get("store") is None:
        given["store"] = places.known_store()
    return validate({name: value for name, value in given.items() if value is not None}, RunSettings, "options")


def _open(settings: "RunSettings") -> "Store":
    from infra.storage import open_store

    return open_store(settings.store)


def _folder(path: str | Path, option: str) -> Path:
    """A path on this machine. Raises ConfigError where it is a store's URL."""
    from infra.errors import ConfigError
    from infra.storage import parse_store

    scheme, local = parse_store(str(path), option)
    if scheme != "file":
        raise ConfigError(f"{option} {path}: name a path on this machine; --store is what may be on S3")
    return Path(local).expanduser()


def _read(path: Path, option: str) -> bytes:
    from infra.errors import ConfigError

    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}") from None


def _say(text: str, end: str = "\n", flush: bool = False) -> None:
    click.echo(text + end, nl=False)


if __name__ == "__main__":
    main()
