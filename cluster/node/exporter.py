"""Prometheus metrics of an elastic group, through Ray: every node of a cluster serves them as `ray_<name>`.

The controller exports events and decisions, each node agent its ranks' ledgers. infra/deploy/grafana draws them.
Ray sends nothing while it is not initialised, so that the same code runs in tests without it.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from cluster.goodput.accounts import NodeAccount
from cluster.goodput.buckets import BUCKETS, merge

LABELS = ("run", "group")


@dataclass(frozen=True)
class Metric:
    """One metric. `labels` come on top of run and group. Counters only grow; their names end in _total, as Prometheus
    expects."""

    name: str
    kind: Literal["gauge", "counter"]
    description: str
    labels: tuple[str, ...] = ()


METRICS = (
    Metric("recua_ranks", "gauge", "Ranks that train in the present generation"),
    Metric("recua_ranks_asked", "gauge", "Ranks asked for, spares included"),
    Metric("recua_generation", "gauge", "Number of the present generation; it grows with every re-forming"),
    Metric("recua_step", "gauge", "Training steps whose outcome is known"),
    Metric("recua_loss", "gauge", "Loss of the last committed step"),
    Metric("recua_tokens_per_second", "gauge", "Tokens trained on per second, at the last step"),
    Metric("recua_tokens_total", "counter", "Tokens of all steps, those that a rollback undid included"),
    Metric("recua_steps_refused_total", "counter", "Steps whose update was not applied (NaN, Inf)"),
    Metric("recua_pauses_total", "counter", "Times that training stood still and went on", ("action",)),
    Metric("recua_pause_seconds_total", "counter", "Seconds in which training stood still", ("action",)),
    Metric("recua_last_pause_seconds", "gauge", "The latest pause"),
    Metric("recua_lost_steps_total", "counter", "Committed steps that faults and rollbacks undid"),
    Metric("recua_rollbacks_total", "counter", "Returns to an earlier snapshot for NaN, spikes or corruption"),
    Metric("recua_faults_total", "counter", "Deaths, hangs and lost nodes that were detected"),
    Metric("recua_notices_total", "counter", "Nodes that said that they will go", ("kind",)),
    Metric("recua_rank_seconds", "gauge", "Seconds of all ranks that ever lived on a node", ("node", "bucket")),
)


class Exporter:
    """Sets METRICS of one group."""

    def __init__(self, run: str, group: str) -> None:
        from ray.util import metrics as ray_metrics

        kinds: dict[str, Any] = {"gauge": ray_metrics.Gauge, "counter": ray_metrics.Counter}
        self._tags = {"run": run, "group": group}
        self._metrics = {
            one.name: kinds[one.kind](one.name, one.description, (*LABELS, *one.labels)) for one in METRICS
        }

    def set(self, name: str, value: float | None, **labels: str) -> None:
        """Set a gauge; None or a number that is not finite leaves it as it was."""
        if value is not None and math.isfinite(value):
            self._metrics[name].set(value, {**self._tags, **labels})

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter."""
        if value > 0 and math.isfinite(value):
            self._metrics[name].inc(value, {**self._tags, **labels})


def export_account(exporter: Exporter, account: NodeAccount) -> None:
    """Export a node's ledger so far. Time that a fault undid moves from compute to recomputed, so these are gauges."""
    ledger = merge(rank.ledger for rank in account.ranks)
    for bucket in BUCKETS:
        exporter.set("recua_rank_seconds", ledger.seconds[bucket], node=account.node, bucket=bucket)
    exporter.set("recua_rank_seconds", ledger.unattributed_s, node=account.node, bucket="unattributed")
