"""Curves of a run: from reports of running bodies, and from their results afterwards.

If a call's result has an artifact with a `metrics.jsonl`, its curves come from that file, which has every optimizer
step; otherwise from the run's history, which is thinned.
"""

from collections import defaultdict
from functools import partial
from typing import Any

from infra.storage import Store
from infra.telemetry import metric_rows
from workflows.runs.history import read_history
from workflows.views.run_replay import Replay, RunCache, open_run

Json = dict[str, Any]
Point = tuple[float, float]
MOST_POINTS = 1000
MOST_CALLS = 300
"""Most calls whose results are read for the whole run; every call can be requested by itself."""


def metrics(cache: RunCache, store: Store, run_id: str, call_id: str = "", after: str = "") -> Json:
    """New data since the cursor `after` (empty: all data), of one call or of all.

    {"version", "curves": [{call, name, x, y}], "events": [...], "left_out"}. A curve is complete; x is the optimizer
    step. Events are the history's new ones: {"kind": "progress", call, time, done, total, metrics} and {"kind": "log" |
    "warning", call, time, message}. `left_out`: calls whose results were not read.
    """
    _, replay = open_run(cache, store, run_id)
    slot, _, cursor = after.partition("|")
    events, cursor = read_history(store, run_id, cursor)
    chosen = [call_id] if call_id else [row["id"] for row in replay.since(int(slot) if slot.isdigit() else 0)]
    calls = [call for call in chosen if replay.locations.get(call)]
    return {
        "version": f"{replay.head.slot}|{cursor}",
        "curves": [curve for call in calls[:MOST_CALLS] for curve in _curves(cache, store, replay, call)],
        "events": [event for event in events if call_id in ("", event["call"])],
        "left_out": len(calls[MOST_CALLS:]),
    }


def _curves(cache: RunCache, store: Store, replay: Replay, call_id: str) -> list[Json]:
    found: dict[str, list[Point]] = {}
    for location in replay.locations[call_id]:
        found |= cache.fact(f"{store.url} metrics {location}", partial(_read, store, location))
    return [
        {"call": call_id, "name": name, "x": [x for x, _ in points], "y": [y for _, y in points]}
        for name, points in found.items()
    ]


def _read(store: Store, location: str) -> dict[str, list[Point]]:
    """Name -> points of an artifact's metrics; empty if it has none. If it has several stages, names begin with the
    stage."""
    raw = store.get(f"{location}/data/metrics.jsonl")
    lines: dict[str, list[Point]] = defaultdict(list)
    if raw is None:
        return lines
    rows = metric_rows(raw)[0]
    several = len({row.get("stage") for row in rows}) > 1
    for row in rows:
        stage = f"{row['stage']} " if several and "stage" in row else ""
        for name, value in row.items():
            if name not in ("stage", "step") and value is not None:
                lines[stage + name].append((row["step"], value))
    return {name: thin(points) for name, points in lines.items()}


def thin(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """About `most` points that look the same: the lowest and the highest of each stretch, and both ends."""
    if len(points) <= most:
        return points
    size = -(-2 * len(points) // most)
    kept: list[Point] = [points[0]]
    for begin in range(1, len(points) - 1, size):
        stretch = points[begin : min(begin + size, len(points) - 1)]
        ends = (min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1]))
        kept += sorted(dict.fromkeys(ends))
    return [*kept, points[-1]]
