"""Prometheus metrics of an elastic group's controller: everything that its listener receives, counted."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.controller.lead import Listener
from cluster.node.exporter import Exporter


@contextlib.contextmanager
def metered(listener: Listener, exporter: Exporter, ranks_asked: int) -> Iterator[Listener]:
    """A listener that exports everything before it passes it on. At the end the gauges of the group's ranks go to 0:
    this process may live on, and Ray exports a gauge as long as its process lives."""
    exporter.set("recua_ranks_asked", ranks_asked)

    def row(values: dict[str, Any]) -> None:
        export_row(exporter, values)
        listener.row(values)

    def event(values: dict[str, Any]) -> None:
        export_event(exporter, values)
        listener.event(values)

    try:
        yield Listener(row, event)
    finally:
        exporter.set("recua_ranks", 0)
        exporter.set("recua_ranks_asked", 0)


def export_row(exporter: Exporter, row: Mapping[str, Any]) -> None:
    """Export one step's outcome (see cluster.controller.lead.Listener)."""
    exporter.set("recua_step", row["step"] + 1)
    exporter.set("recua_tokens_per_second", row.get("tokens_per_s"))
    exporter.add("recua_tokens_total", row.get("tokens", 0))
    if row["committed"]:
        exporter.set("recua_loss", row["loss"])
    else:
        exporter.add("recua_steps_refused_total")


def export_event(exporter: Exporter, event: Mapping[str, Any]) -> None:
    """Export what the controller saw, decided or did."""
    kind = event["event"]
    if kind == "started":
        exporter.set("recua_generation", event["generation"])
        exporter.set("recua_ranks", event["ranks"])
        if "pause_s" in event:
            exporter.set("recua_last_pause_seconds", event["pause_s"])
            exporter.add("recua_pauses_total", action=event["action"])
            exporter.add("recua_pause_seconds_total", event["pause_s"], action=event["action"])
            exporter.add("recua_lost_steps_total", event["lost_steps"])
    elif kind == "rolled-back":
        exporter.add("recua_rollbacks_total")
    elif kind == "detected" and "notice" in event:
        exporter.add("recua_notices_total", kind=event["notice"])
    elif kind == "detected":
        exporter.add("recua_faults_total")
