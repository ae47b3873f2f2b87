"""What `recua gc` and its neighbours say on the terminal."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

import click

from cluster.node.host_memory import Held
from infra.machine import show_size
from workflows.runs.gc import GcPlan, GcResult, Item, Kept, Policy


def show_plan(plan: GcPlan, policy: Policy, memory: list[Held], as_json: bool = False) -> None:
    """What `recua gc --yes` would do."""
    if as_json:
        click.echo(json.dumps({**asdict(plan), "due": sorted(plan.due), "memory": _as_json(memory)}, indent=2))
        return
    _memory(memory, "would go")
    for run_id in plan.runs:
        click.echo(f"run {run_id} would be removed")
    _table(plan.items, "would go")
    _kept(plan.kept)
    if not plan.items and not plan.runs and all(held.needed for held in memory):
        click.echo("nothing to remove: every artifact is needed by a run")
        return
    due = sum(item.size for item in plan.items if item.key in plan.due)
    click.echo(f"nothing was changed; --yes marks what would go and deletes what has been marked for "
               f"{_minutes(policy.grace_s)} ({show_size(due)} now)")  # fmt: skip


def show_result(result: GcResult, policy: Policy, memory: list[Held], as_json: bool = False) -> None:
    """What `recua gc --yes` did."""
    if as_json:
        click.echo(json.dumps({**asdict(result), "memory": _as_json(memory)}, indent=2))
        return
    _memory(memory, "deleted")
    for run_id in result.removed_runs:
        click.echo(f"run {run_id} was removed")
    _table(result.deleted, "deleted")
    _table(result.marked, "marked")
    _kept(result.kept)
    if result.waiting:
        runs = ", ".join(result.waiting)
        click.echo(
            f"nothing was deleted: the driver of {runs} has not said that it knows what goes; try again, or end it"
        )
    elif result.marked:
        click.echo(f"what is marked goes with `recua gc --yes` in {_minutes(policy.grace_s)} (or now with --grace 0)")
    click.echo(f"freed {show_size(sum(item.size for item in result.deleted))}")


def _memory(memory: list[Held], what: str) -> None:
    for held in memory:
        done = "kept" if held.needed else what
        click.echo(f"{done}: memory of this machine  {show_size(held.size)}  {held.folder}: {held.reason}")


def _as_json(memory: list[Held]) -> list[dict[str, object]]:
    return [{**asdict(held), "folder": str(held.folder)} for held in memory]


def _table(items: Iterable[Item], what: str) -> None:
    numbers: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for item in items:
        numbers[item.kind] += 1
        sizes[item.kind] += item.size
    for kind in sorted(numbers):
        click.echo(f"{what}: {kind:<20} {numbers[kind]:>6}  {show_size(sizes[kind])}")


def _kept(kept: list[Kept]) -> None:
    by = Counter((each.location.split("/")[1], reference.run_id) for each in kept for reference in each.by[:1])
    for (owner, user), number in sorted(by.items()):
        click.echo(f"kept: {number} artifact(s) of removed run {owner}, which run {user} needs")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:g} min"
