"""Pretraining: a group of ranks runs the loop; this module starts it, listens, and starts it again after a fault.

Who waits for whom: the caller's thread waits for rank 0's metrics. The ranks wait for nobody but each other. Losing a
rank ends the group; the next generation goes on from the newest verified state.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.config import PretrainSettings
from actors.pretrain_worker import METRICS, PretrainJob, PretrainWorker, read_metrics
from cluster.policies.failure import decide_restart
from cluster.worker_group import WorkerGroup
from engines import state_folder
from engines.torch_learner import LlamaConfig
from infra.errors import CheckpointError, SystemFault
from infra.faults import VARIABLE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run says of itself; `restarts` counts this call's, `tokens` the whole run's."""

    steps: int
    tokens: int
    final_loss: float
    restarts: int


def pretrain(
    tokens_dir: Path,
    tokenizer_dir: Path,
    model: LlamaConfig,
    settings: PretrainSettings,
    out: Path,
    state: Path,
    on_metrics: Callable[[dict[str, Any]], None],
    *,
    seed: int = 0,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    faults: str | None = None,
) -> PretrainResult:
    """Train `model` from scratch on the token shards of `tokens_dir`; leaves an HF model folder in `out`.

    Called again with the same `state` folder (after any crash of this process) it goes on from the newest state there.

    Args:
        tokens_dir: shards written by `data.tokenized`.
        tokenizer_dir: copied into `out`.
        state: on a file system that all workers see; holds saved states and metrics.jsonl.
        on_metrics: called once per step, in order, also for the steps of earlier calls: {"step", "steps", "loss", "lr",
            "grad_norm", "tokens", "tokens_per_s", "committed"}.
        seed: of initialisation and data order.
        faults: schedule for the ranks' fault points (tests, demos); None reads RECUA_FAULTS.
        on_event: {"event": "started" | "lost", ...}: generations, process ids, decisions.

    Raises:
        CheckpointError: `state` belongs to another job.
        SystemFault: workers were lost more often than `max_restarts` allows.
        ResourceError, DataError, StepError: see `cluster.worker_group` and `data.loader`.
    """
    faults = os.environ.get(VARIABLE, "") if faults is None else faults
    state.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    tokens_dir, tokenizer_dir, out, state = (p.resolve() for p in (tokens_dir, tokenizer_dir, out, state))
    job = PretrainJob(tokens_dir, tokenizer_dir, model, settings, out, state, seed, faults)
    _claim(job)
    reported = -1

    def report(row: dict[str, Any]) -> None:
        nonlocal reported
        if row["step"] > reported:  # steps that are computed again after a fault were reported before it
            reported = row["step"]
            on_metrics(row)

    generation = 0
    while True:
        newest = state_folder.newest_verified(state)
        for row in read_metrics(state / METRICS, below=newest[0] if newest else 0):
            report(row)
        try:
            _run_generation(job, generation, newest[1] if newest else None, report, on_event)
            break
        except SystemFault as fault:
            decision = decide_restart(fault, generation, settings.max_restarts, "pretrain.max_restarts")
            log.warning("%s", decision)
            on_event({"event": "lost", "generation": generation, "fault": str(fault), "decision": str(decision)})
            if decision.action == "raise":
                raise
        generation += 1
    rows = read_metrics(state / METRICS, below=settings.steps)
    return PretrainResult(len(rows), sum(row["tokens"] for row in rows), rows[-1]["loss"], generation)


def _run_generation(
    job: PretrainJob,
    generation: int,
    resume: Path | None,
    report: Callable[[dict[str, Any]], None],
    on_event: Callable[[dict[str, Any]], None],
) -> None:
    settings, started = job.settings, time.monotonic()
    group = WorkerGroup(
        PretrainWorker,
        settings.workers,
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus,
        strategy=settings.placement,
        env={"OMP_NUM_THREADS": str(settings.threads)},
        name=f"pretrain-{hashlib.sha256(str(job.state).encode()).hexdigest()[:12]}",
        generation=generation,
        actor_args=(settings,),
    )
    with group:
        on_event(
            {
                "event": "started",
                "generation": generation,
                "pids": [info.pid for info in group.infos],
                "resumed_from": resume.name if resume else None,
                "start_s": time.monotonic() - started,
            }
        )
        for _, row in group.stream("train", job, resume):
            report(row)


def _claim(job: PretrainJob) -> None:
    """The state folder belongs to one job: what decides the numbers may not change under it."""
    irrelevant = {"workers", "sharding", "tensor_parallel", "compile", "num_cpus", "num_gpus", "threads", "placement"}
    irrelevant |= {"save_every", "keep_states", "max_restarts", "max_skipped_steps", "micro_batch_size"}
    settings = job.settings.model_dump(mode="json", exclude=irrelevant)
    identity = {"model": asdict(job.model), "settings": settings, "seed": job.seed}
    text = json.dumps(identity, sort_keys=True, default=str, indent=1)
    file = job.state / "job.json"
    if not file.exists():
        draft = file.with_suffix(".partial")
        draft.write_text(text)
        draft.replace(file)
    elif file.read_text() != text:
        raise CheckpointError(f"state {job.state} belongs to a pretraining with other settings (see {file})")
