"""The report's part on elastic training: where the time of a run's ranks went, and its pauses."""

from collections.abc import Sequence
from typing import Any

from cluster.goodput import accounts as goodput_records
from infra.errors import DataError
from infra.storage import Store

Group = dict[str, Any]
"""cluster.goodput.accounts.GroupReport as JSON."""


def gather_groups(store: Store, run_id: str) -> list[Group]:
    """Goodput and pauses of the run's elastic groups. If a record is damaged, the report omits it."""
    try:
        return [report.to_json() for report in goodput_records.read_run(store, run_id)]
    except DataError:
        return []


def summary(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The groups as report.json has them."""
    kept = ("group", "goodput", "goodput_without_spares", "capacity", "spares", "wall_s", "shares", "pauses")
    return [{name: group[name] for name in kept if name in group} for group in groups]


def interruptions(groups: Sequence[Group]) -> list[list[str]]:
    """Every pause of training after its start, as rows of text, a header first; empty if there was none."""
    rows = [
        [
            group["group"],
            f"{1000 * (pause['ended'] - pause['began']):.0f} ms",
            str(pause["lost_steps"]),
            str(pause["ranks"]),
            pause["action"],
            pause["reason"],
            pause["key"],
        ]
        for group in groups
        for pause in group["pauses"]
        if pause["generation"] > 1
    ]
    header = ["group", "pause", "lost steps", "ranks after", "decision", "reason", "governed by"]
    return [header, *rows] if rows else []


def time_spent(groups: Sequence[Group]) -> list[list[str]]:
    """The ledgers as rows of text, a header first: a row per bucket in which any group spent time, a column per group;
    empty without groups. Shares are of the requested capacity, so that a column adds up to 1."""
    if not groups:
        return []
    header = ["", *(f"{group['group']}: {group['capacity']:g} ranks x {group['wall_s']:.1f} s" for group in groups)]
    buckets = [name for name in groups[0]["shares"] if name == "unattributed" or _most(groups, name) >= 5e-6]
    rows = [
        [name.replace("_", " "), *(f"{group['shares'][name]:.2%}" for group in groups)]
        for name in sorted(buckets, key=lambda name: -_most(groups, name))
    ]
    return [header, ["goodput", *(f"{group['goodput']:.2%}" for group in groups)], *rows]


def _most(groups: Sequence[Group], bucket: str) -> float:
    return max(abs(group["shares"][bucket]) for group in groups)
