"""`bench.graph` end to end on a few steps: what it prints is whole and its ratios are those of its figures."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from bench import graph
from bench.graph import Figures, summary

ROOT = Path(__file__).resolve().parents[2]
GIVEN = Namespace(chains=10, length=20, repetitions=3, cpus=2, prefect_steps=40)


def test_engine_bench_measures_floor_engine_resume_and_memory_of_a_small_graph(tmp_path: Path) -> None:
    size = ["--chains", "4", "--length", "3", "--repetitions", "1", "--cpus", "1"]
    command = [sys.executable, "-m", "bench.graph", "--json", "--peers", "none", *size, "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert (printed["steps"], printed["repetitions"], printed["prefect_ms_per_step"]) == (12, 1, None)
    measured = ("recua_ms_per_step", "ray_ms_per_task", "recua_vs_ray", "resume_s", "finished_s", "fsync_ms")
    assert all(printed[name] > 0 for name in (*measured, "rss_mb_1000", "rss_mb_10000"))
    assert "repetition 1 of 1" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_engine_bench_gives_medians_and_the_faster_of_prefects_runners() -> None:
    seen = {"recua_ms_per_step": [1.0, 9.0, 2.0], "ray_ms_per_task": [0.5, 1.0, 4.0]}
    tried = {"try_prefect_threads": [30.0], "try_prefect_ray": [60.0]}
    result = summary(Figures({**seen, **tried, "prefect_ms_per_step": [20.0, 24.0, 16.0]}), GIVEN, 0.5)
    assert (result["recua_ms_per_step"], result["ray_ms_per_task"], result["recua_vs_ray"]) == (2.0, 1.0, 2.0)
    assert (result["prefect_runner"], result["prefect_ms_per_step"], result["prefect_vs_recua"]) == ("threads", 20, 10)
    assert (result["steps"], result["prefect_steps"]) == (200, 40)


def test_engine_bench_refuses_an_empty_graph_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        graph.main(["--chains", "0"])
    assert "--chains must be at least 1" in capsys.readouterr().err
