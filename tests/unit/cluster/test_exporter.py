"""Prometheus metrics of an elastic group, as Ray's own recorder names and serves them, and the dashboard over them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.controller.lead import Listener
from cluster.controller.metrics import metered
from cluster.goodput.accounts import NodeAccount, RankAccount
from cluster.goodput.buckets import BUCKETS, Ledger
from cluster.node.exporter import LABELS, METRICS, Exporter, export_account

NAME = re.compile(r"\bray_recua_[a-z_]+")

SERVED = """
from prometheus_client import generate_latest
from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder
from cluster.node.exporter import LABELS, METRICS
recorder = OpenTelemetryMetricRecorder(gauge_metric_ttl_seconds=600)
for metric in METRICS:
    getattr(recorder, f"register_{metric.kind}_metric")(metric.name, metric.description)
    recorder.set_metric_value(metric.name, {label: "x" for label in (*LABELS, *metric.labels)}, 1.0)
print(generate_latest().decode())
"""


@pytest.fixture(scope="module")
def served(repository: Path) -> set[str]:
    """The names under which Ray's node agent serves METRICS, with all their labels; in a process of its own, because
    the recorder is global."""
    done = subprocess.run([sys.executable, "-c", SERVED], cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("ray_recua")]
    for metric in METRICS:
        [line] = [line for line in lines if line.startswith(f"ray_{metric.name}{{")]
        assert all(f'{label}="x"' in line for label in (*LABELS, *metric.labels))
    return {line.partition("{")[0] for line in lines}


def test_spot_dashboard_names_only_what_is_served(repository: Path, served: set[str]) -> None:
    """And everything that is served stands on it."""
    text = (repository / "infra/deploy/grafana/elastic.json").read_text()
    assert set(NAME.findall(text)) == served == {f"ray_{metric.name}" for metric in METRICS}


def test_spot_dashboard_panels_can_be_drawn(repository: Path) -> None:
    dashboard = json.loads((repository / "infra/deploy/grafana/elastic.json").read_text())
    labels = {f"ray_{metric.name}": {*LABELS, *metric.labels} for metric in METRICS}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, f"{panel['title']} overlaps"
        taken |= cells
        assert panel["description"] and panel["targets"]
        for target in panel["targets"]:
            query = target["expr"]
            assert query.count("(") == query.count(")")
            for name, chosen in re.findall(r"(ray_recua_[a-z_]+)\{([^}]*)\}", query):
                assert set(re.findall(r"(\w+)=", chosen)) <= labels[name], query
            used = set().union(*(labels[name] for name in NAME.findall(query)))
            for words in re.findall(r"by \(([^)]*)\)", query):
                assert set(words.replace(" ", "").split(",")) <= used, query
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= used


class Heard(Exporter):
    """Remembers what it was told, and tells Ray too (which sends nothing here: it is not initialised)."""

    def __init__(self) -> None:
        super().__init__("run-1", "pretrain")
        self.values: dict[tuple[str, ...], float] = {}

    def set(self, name: str, value: float | None, **labels: str) -> None:
        super().set(name, value, **labels)
        if value is not None:
            self.values[name, *labels.values()] = value

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        super().add(name, value, **labels)
        key = (name, *labels.values())
        self.values[key] = self.values.get(key, 0) + value


def test_spot_what_the_controller_says_is_counted() -> None:
    heard, passed = Heard(), list[dict[str, Any]]()
    with metered(Listener(passed.append, passed.append), heard, 5) as listener:
        row = {"step": 6, "loss": 2.5, "committed": True, "tokens": 512, "tokens_per_s": 900.0}
        listener.row(row)
        listener.row({**row, "step": 7, "loss": float("nan"), "committed": False})
        listener.event({"event": "detected", "generation": 1, "what": "w1 died", "worker": "w1"})
        listener.event({"event": "detected", "generation": 1, "what": "goes", "node": "n", "notice": "preempted"})
        pause = {
            "pause_s": 0.25,
            "lost_steps": 1,
            "action": "shrink",
            "reason": "w1 died",
            "key": "elastic.min_workers",
        }
        listener.event({"event": "started", "generation": 2, "ranks": 3, "pids": [], "step": 7, **pause})
        listener.event(
            {"event": "started", "generation": 3, "ranks": 4, "pids": [], "step": 7, **pause, "lost_steps": 0}
        )
        during = dict(heard.values)
    assert len(passed) == 6
    assert during == {
        ("recua_ranks_asked",): 5,
        ("recua_step",): 8,
        ("recua_tokens_per_second",): 900.0,
        ("recua_tokens_total",): 1024,
        ("recua_loss",): 2.5,
        ("recua_steps_refused_total",): 1,
        ("recua_faults_total",): 1,
        ("recua_notices_total", "preempted"): 1,
        ("recua_generation",): 3,
        ("recua_ranks",): 4,
        ("recua_last_pause_seconds",): 0.25,
        ("recua_pauses_total", "shrink"): 2,
        ("recua_pause_seconds_total", "shrink"): 0.5,
        ("recua_lost_steps_total",): 1,
    }
    assert heard.values["recua_ranks",] == heard.values["recua_ranks_asked",] == 0  # the group has ended


def test_spot_a_nodes_ledger_is_whole() -> None:
    heard = Heard()
    ranks = [RankAccount(f"w{i}", 0.0, 10.0, Ledger(10.0, {"compute": 7.0, "init": 2.0}), gone=False) for i in range(2)]
    export_account(heard, NodeAccount("n0", tuple(ranks)))
    assert len(heard.values) == len(BUCKETS) + 1
    assert sum(heard.values.values()) == pytest.approx(20.0)
    assert heard.values["recua_rank_seconds", "n0", "compute"] == 14.0
    assert heard.values["recua_rank_seconds", "n0", "unattributed"] == pytest.approx(2.0)
