"""Commands on stores: gc, export, import."""

from pathlib import Path

import click

from workflows.cli.options import FiniteRange, local_folder, open_store_of, settings_of, store_option

GC_EXAMPLES = """
\b
Examples:
  recua gc                                 what could go, and what stays; changes nothing
  recua gc --keep-runs 20 --yes            the newest 20 runs and all that they need stay
  recua gc --explain 3f2a91c0              who needs this artifact
"""


@click.command(epilog=GC_EXAMPLES)
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
    from workflows.runs.bundle import export_run

    target = local_folder(out or f"{run_id}.tar", "--out")
    size = export_run(open_store_of(settings_of(store=store)), run_id, target, not no_logs, only_results)
    click.echo(f"wrote {target} ({show_size(size)}); elsewhere: recua import {target} --store STORE")


@click.command(name="import")
@click.argument("file", type=click.Path(path_type=Path))
@store_option
def import_bundle(file: Path, store: str | None) -> None:
    """Put the run in FILE, written by `recua export`, into the store: to show, report, serve, resume and reuse.

    Every checksum is compared first; of a damaged file nothing is imported.
    """
    from workflows.runs.bundle import import_run

    opened = open_store_of(settings_of(store=store))
    opened.check()
    run_id = import_run(opened, file)
    click.echo(f"run {run_id} is in {opened.url}: recua show {run_id} --store {opened.url}")
