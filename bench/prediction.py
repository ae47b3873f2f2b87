"""Precision, recall and lead time of the failure predictor on SYNTHETIC health traces (bench.synthetic_health).

    python -m bench.prediction --nodes 400 --days 3 --json

Counts are per node. A failure counts as predicted if the policy drains the node at least `--lead-s` before it; a drain
of a node that stays healthy is a false alarm. `recall_with_signs` leaves out failures without signs, which cannot be
predicted. The numbers say nothing about real hardware. Prints one JSON object as its last line.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from bench.synthetic_health import SyntheticTrace, make_fleet
from cluster.config import ElasticSettings
from cluster.guard.prediction import NodeTrend, decide_drain_ahead


def first_drain(trace: SyntheticTrace, settings: ElasticSettings) -> float | None:
    """When the policy drains the node of this trace; None if never."""
    trend = NodeTrend()
    for now, signals in trace.samples:
        trend.observe(now, signals)
        if decide_drain_ahead(trace.node, trend, settings).action == "drain":
            return now
    return None


def score(traces: Iterable[SyntheticTrace], lead_s: float, settings: ElasticSettings) -> dict[str, Any]:
    """Precision and recall over `traces`, with counts by kind of node."""
    nodes, caught, alarms, leads = Counter[str](), Counter[str](), Counter[str](), []
    for trace in traces:
        nodes[trace.kind] += 1
        at = first_drain(trace, settings)
        if at is None:
            continue
        if trace.fails_at is not None and trace.fails_at - at >= lead_s:
            caught[trace.kind] += 1
            leads.append(trace.fails_at - at)
        else:
            alarms[trace.kind] += 1
    failing = {kind for kind in nodes if kind in ("memory", "cooling", "link", "bus", "sudden")}
    failures = sum(nodes[kind] for kind in failing)
    shown = failures - nodes["sudden"]
    hits = sum(caught.values())
    with_signs = hits - caught["sudden"]
    return {
        "traces": "synthetic (bench.synthetic_health): invented, not recorded",
        "precision": round(hits / (hits + sum(alarms.values())), 4) if hits else 0.0,
        "recall": round(hits / failures, 4) if failures else 0.0,
        "recall_with_signs": round(with_signs / shown, 4) if shown else 0.0,
        "median_lead_s": round(median(leads), 1) if leads else None,
        "nodes": dict(nodes),
        "predicted": dict(caught),
        "false_or_late": dict(alarms),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=400)
    parser.add_argument("--days", type=float, default=3)
    parser.add_argument("--failing", type=float, default=0.3, help="share of the nodes that fail")
    parser.add_argument("--lead-s", type=float, default=60, help="a drain counts this long before the failure")
    parser.add_argument("--risk", type=float, help="elastic.predicted_risk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    given = parser.parse_args(arguments)
    settings = ElasticSettings() if given.risk is None else ElasticSettings(predicted_risk=given.risk)
    fleet = make_fleet(given.nodes, given.days, given.failing, given.seed)
    result = score(fleet, given.lead_s, settings)
    if not given.json:
        for name, value in result.items():
            print(f"{name:<20}{value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
