"""Commands on stores: gc, export, import."""

from pathlib import Path

import click

from workflows.cli.options import FiniteRange, local_folder, open_store_of, settings_of, store_option

GC_EXAMPLES = """
\b
Examples:
  recua gc                                 show what would be deleted and what stays; changes nothing
  recua gc --keep-runs 20 --yes            keep the newest 20 runs and everything that they need
  recua gc --explain 3f2a91c0              show which runs need this artifact
"""


@click.command(epilog=GC_EXAMPLES)
@store_option
@click.option("--keep-runs", type=click.IntRange(min=0), metavar="N", help="Remove ended runs except the newest N.")
@click.option("--keep-days", type=FiniteRange(min=0), metavar="D", help="Remove runs that ended more than D days ago.")
@click.option("--run", "runs", multiple=True, metavar="RUN", help="Remove this run; repeatable.")
@click.option(
    "--grace",
    "grace_s",
    type=FiniteRange(min=0),
    default=3600.0,
    metavar="SECONDS",
    help="Time from marking to deletion  [default: 3600].",
)
@click.option("--yes", is_flag=True, help="Carry out the plan; without it the plan is only shown.")
@click.option("--dry-run", is_flag=True, help="Show the plan (the default).")
@click.option("--explain", "digest", metavar="DIGEST", help="Show which runs need the artifact with this digest.")
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
    """Remove what no run needs: output of failed attempts, old runs by your policy, and their artifacts.

    Artifacts that another run reuses stay. Data is first marked, and a later `recua gc --yes` deletes it after the
    grace period.

    Also removes snapshots that crashed pretrainings left in this machine's memory (/dev/shm/recua-node-*), if no
    process uses them and their run is finished or removed. Snapshots that a run may resume from stay. Other machines
    are cleaned when the next pretraining starts on them.
    """
    from cluster.node import host_memory
    from workflows.cli import gc_tables
    from workflows.runs import gc as collector
    from workflows.runs.status import standing

    if yes and dry_run:
        raise click.UsageError("--yes and --dry-run contradict each other")
    opened = open_store_of(settings_of(store=store))
    if digest is not None:
        for line in collector.explain(opened, digest):
            click.echo(line)
        return
    policy = collector.Policy(runs, keep_runs, keep_days, grace_s)
    if yes:
        result = collector.collect(opened, policy)
        memory = host_memory.survey(standing)
        host_memory.free(memory)
        gc_tables.show_result(result, policy, memory, as_json)
    else:
        plan = collector.plan_gc(opened, policy)
        gc_tables.show_plan(plan, policy, host_memory.survey(standing), as_json)


@click.command()
@click.argument("run_id", metavar="RUN")
@store_option
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Output; .gz compresses  [RUN.tar].")
@click.option(
    "--only-results", is_flag=True, help="For a finished run: only the artifacts of its result, and its recipe."
)
@click.option("--no-logs", is_flag=True, help="Leave out the output of steps and drivers.")
def export(run_id: str, store: str | None, out: Path | None, only_results: bool, no_logs: bool) -> None:
    """Write RUN with all that it needs into one file, for `recua import`.

    The file holds its recipe, journal, logs and report, every artifact that it refers to, its code's fingerprints, and,
    for a run of the service, its code package. A run that has not finished can be resumed from it.

    With --only-results the artifacts that steps passed to each other are left out: the run can then be shown, reported
    and served, but its other steps cannot be reused. Known forms of secrets in logs are redacted.
    """
    from infra.machine import show_size
    from workflows.runs.bundle import export_run

    target = local_folder(out or f"{run_id}.tar", "--out")
    size = export_run(open_store_of(settings_of(store=store)), run_id, target, not no_logs, only_results)
    click.echo(f"wrote {target} ({show_size(size)}); elsewhere: recua import {target} --store STORE")


@click.command(name="import")
@click.argument("file", type=click.Path(path_type=Path))
@store_option
def import_bundle(file: Path, store: str | None) -> None:
    """Import the run in FILE, written by `recua export`, into the store: to show, report, serve, resume and reuse it.

    All checksums are compared first; nothing is imported from a damaged file.
    """
    from workflows.runs.bundle import import_run

    opened = open_store_of(settings_of(store=store))
    opened.check()
    run_id = import_run(opened, file)
    click.echo(f"run {run_id} is in {opened.url}: recua show {run_id} --store {opened.url}")
