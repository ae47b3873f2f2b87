"""Ten thousand durable steps, compared with bare Ray tasks and Prefect.

    python -m bench.graph                 # a table: 100 chains of 100 steps, three repetitions, about five minutes
    python -m bench.graph --json          # the same figures as one JSON object on the last line of standard output
    python -m bench.graph --peers none    # without Prefect: nothing is installed, two minutes

Each step adds one to the result of the step before it, so that only the engine is measured: every step runs in a Ray
worker, and its result is on the disk (fsync) before the next step starts. Each measurement is a driver process of its
own on one local Ray; the engines take turns, and medians are reported. If many short steps are ready, recua runs
several in one Ray task (workflows.worker.batch); bare Ray has a task for each.

  recua_ms_per_step   wall time of the whole run, by steps
  ray_ms_per_task     the same chains as bare Ray tasks, whose results are not kept: the lower bound
  prefect_ms_per_step the same chains on Prefect 3 with persisted results, on its thread runner or its Ray runner,
                      whichever is faster; fewer steps (--prefect-steps), its start and warm-up not counted
  resume_s            a new process resumes the run, whose end is not recorded: the workflow makes all its calls again,
                      and finds each one committed. Includes the start of Python
  finished_s          the same with the end recorded: the result is shown
  rss_mb_1000, _10000 resident memory of recua's driver after 1,000 and after 10,000 steps (the same number of chains, a
                      tenth as long)

Prefect is installed, once, into .venv-peers from requirements/bench.txt, because its pins conflict with recua's.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.chains import run_id
from bench.peers import peers_python, prefect_environment
from infra.storage import open_store
from workflows.runs.journal import read_journal, slot_key

ROOT = Path(__file__).resolve().parents[1]
RUNNERS = ("threads", "ray")
PREFECT_CHAINS = 20
FSYNCS = 200
LIMIT_S = 1800
TRY_S = 180
"""Limit of the trial of each of Prefect's runners; its Ray runner may exceed it on a loaded machine."""


@dataclass
class Figures:
    """The measurements so far: one number per repetition, by name."""

    seen: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.seen.setdefault(name, []).append(value)

    def median(self, name: str) -> float | None:
        return round(statistics.median(self.seen[name]), 3) if name in self.seen else None


def main(arguments: list[str]) -> None:
    given = _parse(arguments)
    figures = Figures()
    load = os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(prefix="recua-bench-", dir=given.folder))
    try:
        figures.add("fsync_ms", fsync_ms(folder))
        with local_ray(given.cpus) as address:
            for repetition in range(given.repetitions):
                say(f"repetition {repetition + 1} of {given.repetitions}, load {os.getloadavg()[0]:.1f}")
                measure_graph(figures, given, folder / str(repetition), address)
                if given.peers == "prefect":
                    measure_prefect(figures, given, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = summary(figures, given, load)
    if not given.json:
        for name, value in result.items():
            print(f"{name:24} {value}")
    else:
        print(json.dumps(result))


def measure_graph(figures: Figures, given: argparse.Namespace, folder: Path, address: str) -> None:
    """One repetition of bare Ray, of recua, of its resumes and of its memory."""
    steps = given.chains * given.length
    size = ["--chains", str(given.chains), "--length", str(given.length)]
    short = ["--chains", str(given.chains), "--length", str(max(1, given.length // 10))]
    store, small = ["--store", str(folder / "store")], ["--store", str(folder / "short")]
    joined = ["--address", address]
    bare = _child(["ray", *size, *joined])
    figures.add("ray_ms_per_task", 1000 * bare["seconds"] / steps)
    durable = _child(["recua", *size, *store, *joined])
    figures.add("recua_ms_per_step", 1000 * durable["seconds"] / steps)
    figures.add("recua_driver_cpu_ms_per_step", 1000 * durable["cpu_s"] / steps)
    figures.add("rss_mb_10000", durable["rss_mb"])
    figures.add("rss_mb_1000", _child(["recua", *short, *small, *joined])["rss_mb"])
    figures.add("finished_s", _child(["resume", *size, *store])["process_s"])
    forget_end(str(folder / "store"), run_id(given.chains, given.length))
    figures.add("resume_s", _child(["resume", *size, *store])["process_s"])
    shutil.rmtree(folder)


def measure_prefect(figures: Figures, given: argparse.Namespace, folder: Path) -> None:
    """Prefect on the faster of its runners, which the first call finds with a tenth of the steps on each."""
    python = peers_python()

    def run(runner: str, steps: int, limit_s: float = LIMIT_S) -> float:
        length = max(1, steps // PREFECT_CHAINS)
        size = ["--chains", str(PREFECT_CHAINS), "--length", str(length)]
        home = Path(tempfile.mkdtemp(prefix="home-", dir=folder))
        script = [str(python), str(ROOT / "bench" / "prefect_chains.py"), runner, *size]
        try:
            seconds = _process(script, prefect_environment(home), limit_s)["seconds"]
        except subprocess.TimeoutExpired:
            if limit_s == LIMIT_S:
                raise
            say(f"  Prefect on its {runner} runner has not finished after {limit_s} s: it counts as the slower one")
            seconds = limit_s
        return 1000 * seconds / (PREFECT_CHAINS * length)

    for runner in RUNNERS:
        if f"try_prefect_{runner}" not in figures.seen:
            figures.add(f"try_prefect_{runner}", run(runner, given.prefect_steps // 10, TRY_S))
    figures.add("prefect_ms_per_step", run(faster_runner(figures), given.prefect_steps))


def faster_runner(figures: Figures) -> str:
    return min(RUNNERS, key=lambda runner: figures.seen[f"try_prefect_{runner}"][0])


def summary(figures: Figures, given: argparse.Namespace, load: float) -> dict[str, Any]:
    """The printed figures: medians, ratios and the measurements behind them."""
    median = figures.median
    recua, ray, prefect = (median(name) for name in ("recua_ms_per_step", "ray_ms_per_task", "prefect_ms_per_step"))
    assert recua is not None and ray is not None
    names = ("resume_s", "finished_s", "rss_mb_1000", "rss_mb_10000", "recua_driver_cpu_ms_per_step", "fsync_ms")
    return {
        "recua_ms_per_step": recua,
        "ray_ms_per_task": ray,
        "prefect_ms_per_step": prefect,
        "prefect_runner": None if prefect is None else faster_runner(figures),
        "recua_vs_ray": round(recua / ray, 2),
        "prefect_vs_recua": None if prefect is None else round(prefect / recua, 1),
        **{name: median(name) for name in names},
        "steps": given.chains * given.length,
        "prefect_steps": given.prefect_steps if prefect is not None else 0,
        "repetitions": given.repetitions,
        "cpus": given.cpus,
        "load_before": round(load, 2),
        "each": {name: [round(value, 3) for value in values] for name, values in figures.seen.items()},
    }


def forget_end(url: str, run: str) -> None:
    """Remove the recorded end of a finished run, as if its driver had been killed after the last step."""
    store = open_store(url)
    state = read_journal(store, run)
    assert state.end is not None, f"{run} did not finish"
    store.delete(slot_key(run, state.slot))
    assert read_journal(store, run).end is None


def fsync_ms(folder: Path) -> float:
    """Median time of flushing a small file."""
    seconds = []
    with (folder / "fsync").open("wb", buffering=0) as stream:
        for _ in range(FSYNCS):
            stream.write(b"x" * 256)
            began = time.perf_counter()
            os.fsync(stream.fileno())
            seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds)


@contextmanager
def local_ray(cpus: int) -> Iterator[str]:
    """Start one local Ray for all drivers; yields its address."""
    import logging

    import ray

    context: Any = ray.init(
        address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    try:
        yield str(context.address_info["gcs_address"])
    finally:
        ray.shutdown()


def _child(arguments: list[str]) -> dict[str, float]:
    return _process([sys.executable, "-m", "bench.chains", *arguments], dict(os.environ))


def _process(command: list[str], environment: dict[str, str], limit_s: float = LIMIT_S) -> dict[str, float]:
    """Run a driver; returns the JSON object that it printed last, with the wall seconds of its process.

    Raises:
        subprocess.TimeoutExpired: the driver took longer than `limit_s` and was killed.
        RuntimeError: the driver failed; the message ends with its last output.
    """
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s)
    seconds = time.perf_counter() - began
    what = " ".join([Path(command[0]).name, *command[1:]])
    if done.returncode:
        raise RuntimeError(f"{what} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    say(f"  {what}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    return {**figures, "process_s": seconds}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.graph", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of a table")
    parser.add_argument("--chains", type=int, default=100, help="chains that run side by side (default 100)")
    parser.add_argument("--length", type=int, default=100, help="steps of each chain (default 100)")
    parser.add_argument("--repetitions", type=int, default=3, help="how often everything is measured (default 3)")
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="CPUs of the local Ray (default: all)")
    parser.add_argument("--peers", choices=["prefect", "none"], default="prefect", help="what else to measure")
    parser.add_argument("--prefect-steps", type=int, default=400, help="steps of Prefect's run (default 400)")
    parser.add_argument("--folder", help="where the stores are made: the disk that is measured (default: TMPDIR)")
    given = parser.parse_args(arguments)
    for name in ("chains", "length", "repetitions", "cpus", "prefect_steps"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return given


if __name__ == "__main__":
    main(sys.argv[1:])
