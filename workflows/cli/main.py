"""The `recua` command: run workflow files, inspect runs, serve their models and chat with them.

Only click is imported here. Every command imports what it needs when it is called, so that `recua --help` is fast.
Exit codes: 0 done, 1 a step (or the platform or the store) failed, 2 the user must change something, 130 interrupted.
"""

import sys
from pathlib import Path
from typing import Any

import click

from workflows.cli import models, runs, stores
from workflows.cli import service as service_commands
from workflows.cli.options import (
    RunOptions,
    local_folder,
    open_store_of,
    restarts_option,
    run_options,
    settings_of,
    store_option,
)
from workflows.launch.guarded import guarded

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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="recua", message="recua %(version)s")
def main_group() -> None:
    """Train and serve Llama models as one durable graph on Ray.

    A workflow file calls steps. Every finished step is committed to a store, so that after a crash, a Ctrl-C or a lost
    machine the same command resumes the run. A recipe (TOML) holds the settings.

    \b
    First steps:
      recua run workflows/llama3_posttrain.py --recipe recipes/tiny.toml    start or resume a run
      recua runs                                                           list the runs
      recua show RUN                                                       its steps
      recua report RUN                                                     the run's page in one HTML file
      recua serve RUN                                                      its model, over gRPC and OpenAI HTTP
      recua chat localhost:50051                                           talk to it

    \b
    Without this terminal, on a cluster or on this machine:
      recua up                            a service with a web page; it survives logout and the loss of any process
      recua run FILE --recipe R --detach  submit a run to it
      recua watch RUN                     follow the run; Ctrl-C only stops watching
      recua down                          stop the service

    Runs are kept where --store or RECUA_STORE says (a folder or s3://bucket/prefix), else in the store of the service
    that `recua up` started, else in ~/.recua/store.
    """


@main_group.command(epilog=RUN_EXAMPLES)
@click.argument("file", metavar="WORKFLOW_FILE", type=click.Path(path_type=Path))
@run_options
def run(file: Path, **given: Any) -> None:
    """Run the workflow in WORKFLOW_FILE, resume its run, or show the result of its finished run. If the file has
    several workflows, WORKFLOW_FILE:NAME names one."""
    _run(file, RunOptions(**given))


@main_group.command()
@click.argument("run_id", metavar="RUN")
@store_option
@click.option("--address", metavar="local|auto|ray://...", help="Ray to use.")
@restarts_option
@click.option("--reports", default="runs", metavar="DIR", help="Where DIR/RUN/report.html goes  [default: runs].")
@click.option("--detach", is_flag=True, help="Let the service that it was submitted to resume it, and return.")
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
    """Resume RUN; its workflow and recipe are in the store."""
    from workflows.launch import script

    if detach:
        service_commands.resume(run_id, store, service, token_file)
        return
    settings = settings_of(store=store, ray_address=address, local_ray_restarts=local_ray_restarts)
    script.resume(open_store_of(settings), run_id, settings, local_folder(reports, "--reports"))


for command in (
    *(runs.runs, runs.show, runs.logs, runs.cancel, runs.approve, runs.send, runs.report, runs.goodput),
    *(stores.gc, stores.export, stores.import_bundle),
    *(models.serve, models.chat),
    *(service_commands.up, service_commands.down, service_commands.watch),
):
    main_group.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """The console script: runs a command and exits with its code."""
    sys.exit(guarded(lambda: main_group(arguments, prog_name="recua", standalone_mode=False)))


def run_script(file: str) -> None:
    """`python workflows/x.py ...` is `recua run workflows/x.py ...`. Call it under `if __name__ == "__main__":`.

    `file`: `__file__`, or f"{__file__}:NAME" if the file has several workflows.

    Raises:
        UserError: the file is being imported.
    """
    path, caller = Path(file), sys._getframe(1)
    if caller.f_code.co_name == "<module>" and caller.f_globals["__name__"] != "__main__":
        from infra.errors import UserError

        raise UserError(
            f'workflow {path}: write `if __name__ == "__main__":` above run_script, because workers import the file'
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
    from workflows.launch import script

    which: dict[str, Any] = {"store": given.store, "run_id": given.run_id, "new": given.new}
    if given.detach and not given.only_plan:
        which["rerun"] = list(given.rerun)
        service_commands.detach(file, given.recipe, given.overrides, given.service, given.token_file, **which)
        return
    folder = local_folder(given.reports, "--reports")
    settings = settings_of(
        **which, rerun=given.rerun, ray_address=given.address, local_ray_restarts=given.local_ray_restarts
    )
    prepared = script.prepare(file, given.recipe, given.overrides)
    if given.only_plan:
        from workflows.cli.tables import show_plan
        from workflows.launch.plan import plan

        show_plan(plan(prepared.workflow, *prepared.args, settings=settings, **prepared.kwargs))
        return
    script.run(prepared, settings, folder)
