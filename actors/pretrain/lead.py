"""Pretraining: an elastic group of ranks runs the loop; this module leads it and reports every step.

Who waits for whom: the caller's thread leads the group (see cluster.controller). The ranks wait only for each other:
they train on while this process is gone, and the next call with the same state takes them over. So the controller
needs no actor of its own: a caller that repeats a lost call (the executor, the next driver) restarts it, and the
group's journal decides which of two calls leads.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray

from actors.pretrain.agent import PretrainAgent
from actors.pretrain.handover import take_over
from actors.pretrain.job import PretrainJob
from actors.pretrain.rank import PretrainRank
from actors.pretrain.step_log import StepLog
from actors.pretrain.task import PretrainTask
from cluster.controller.fleet import Fleet, WorkerKind
from cluster.controller.lead import GroupController, Listener
from cluster.controller.metrics import metered
from cluster.core.history import KEY, GroupJournal
from cluster.node.agent import AgentSettings
from cluster.node.exporter import Exporter
from cluster.node.host_memory import AskStanding
from cluster.workers.named_actors import end_group
from engines.collectives.process_groups import host_store
from infra.code_root import code_root
from infra.errors import CheckpointError
from infra.fault_injection import VARIABLE
from infra.storage import Store, open_store

log = logging.getLogger(__name__)

JOB, MODEL = "job.json", "model"
CODE = ("actors", "cluster", "data", "engines", "infra", "models")
"""Packages with code that a rank runs."""


@dataclass(frozen=True)
class PretrainResult:
    """The outcome of a finished run. `restarts`: re-formings of the group in this call; `lost_steps`: committed steps
    that faults undid; `tokens`: those of the whole run."""

    steps: int
    tokens: int
    final_loss: float
    restarts: int
    lost_steps: int = 0
    longest_pause_s: float = 0.0
    """Seconds of those re-formings: from the detection of a fault until all ranks had joined."""
    held_out_loss: float | None = None
    """Held-out loss after the last step, in nats per token; None without held-out text."""
    short_steps: int = 0
    """Steps with fewer ranks than asked for, if the run ended with fewer; else 0."""


def pretrain(
    job: PretrainJob,
    out: Path,
    on_metrics: Callable[[dict[str, Any]], None],
    *,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    accounts: tuple[str, str, str] | None = None,
    ask_standing: AskStanding | None = None,
    nodes_come: bool = False,
) -> PretrainResult:
    """Train `job.model` from scratch on the token shards of `job.tokens`; leaves an HF model folder in `out`.

    Another call with the same `job.state` (after any crash of this process, on any node) takes over the live ranks, or
    resumes from their snapshots in memory, or from the newest state in storage.

    Args:
        job: this function sets its `out`.
        out: a folder of this node.
        on_metrics: called once per step, in order, also for the steps of earlier calls: {"step", "steps", "loss", "lr",
            "grad_norm", "tokens", "tokens_per_s", "committed", "time"}, and "held_out_loss" if it was measured.
            Steps that a rollback undid come again.
        on_event: {"event": "ready" | "started" | "detected" | "decided" | "verified" | "rolled-back" | "stacks",
            "generation", ...}: observations and decisions, with reasons and durations ("started": pids by rank, step,
            pause_s, lost_steps; "detected": after_s since the fault; "ready": burn_in by worker). At the end
            "short", if the run ended with fewer ranks than asked for.
        accounts: (store URL, run id, group) for the goodput records.
        ask_standing: tells ranks without a controller whether the run of `accounts` still runs; None: they wait
            `elastic.orphan_s` for the next controller.
        nodes_come: accept more ranks than the cluster has room for now.

    Raises:
        CheckpointError: `job.state` belongs to another job.
        SystemFault: the group cannot continue (see pretrain.elastic).
        ResourceError, DataError, StepError: see `cluster.controller` and `data.loader`.
    """
    store = open_store(job.state)
    out.mkdir(parents=True, exist_ok=True)
    folder = store.local_path(MODEL)
    faults = os.environ.get(VARIABLE, "") if job.faults is None else job.faults
    job = replace(job.absolute(), out=folder, state=store.url, faults=faults)
    _claim(job, store)
    journal = GroupJournal(store, "pretrain" if accounts is None else f"{accounts[1]}.{accounts[2]}")
    steps = StepLog(store, journal.history.controllers + 1)
    for row in steps.rows:
        on_metrics(row)

    def on_row(row: dict[str, Any]) -> None:
        steps.write(row)
        on_metrics(row)

    formed: list[dict[str, Any]] = []

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "started":
            formed.append(event)
        elif event["event"] == "rolled-back":
            steps.undo(event["to_step"])
        on_event(event)

    try:
        _lead(job, journal, Listener(on_row, hear), steps.rows, accounts, ask_standing, nodes_come)
    finally:
        steps.close()
    if folder is None:
        take_over(store, out)
    else:  # ranks of an earlier call know its `out`, not this one's
        for path in folder.iterdir():
            shutil.move(path, out / path.name)
    rows, again = steps.rows, formed[1:]
    trained, lost = sum(row["tokens"] for row in rows), sum(event.get("lost_steps", 0) for event in again)
    longest = max((event.get("pause_s", 0.0) for event in again), default=0.0)
    if (short := fell_short(formed, len(rows), job.settings.workers)) is not None:
        on_event(short)
    return PretrainResult(
        len(rows),
        trained,
        rows[-1]["loss"],
        len(again),
        lost,
        round(longest, 3),
        rows[-1].get("held_out_loss"),
        0 if short is None else short["short_steps"],
    )


def fell_short(formed: Sequence[Mapping[str, Any]], steps: int, asked: int) -> dict[str, Any] | None:
    """The "short" event of a training of `steps` steps that ended with fewer ranks than `asked` for; else None.
    `formed`: its "started" events, each with the step that it resumed from."""
    if not formed or formed[-1]["ranks"] >= asked:
        return None
    short, until = 0, steps
    for one in reversed(formed):  # a step that a later one repeated is not counted twice
        short += max(0, until - one["step"]) if one["ranks"] < asked else 0
        until = min(until, one["step"])
    last = {name: formed[-1][name] for name in ("generation", "ranks", "reason") if name in formed[-1]}
    return {"event": "short", "asked": asked, "steps": steps, "short_steps": short, **last}


def _lead(
    job: PretrainJob,
    journal: GroupJournal,
    listener: Listener,
    rows: list[dict[str, Any]],
    accounts: tuple[str, str, str] | None,
    ask_standing: AskStanding | None,
    nodes_come: bool,
) -> None:
    settings, elastic = job.settings, job.settings.group()
    group = journal.history.group
    served, store = host_store(ray.util.get_node_ip_address())
    env = {"OMP_NUM_THREADS": str(settings.threads), "RES_OPTIONS": "timeout:1 attempts:1"}
    kind = WorkerKind(
        PretrainRank,
        (job, store),
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus,
        spread=settings.placement.endswith("SPREAD"),
        env=env,
    )
    agents = AgentSettings(
        orphan_s=elastic.orphan_s,
        accounts=accounts,
        notices=elastic.notices,
        health=elastic.health,
        journal=open_store(job.state).local_path(KEY),
        leader=journal.history.controllers + 1,
        ask_standing=ask_standing,
    )
    fleet = Fleet(group, kind, PretrainAgent, agents, nodes_come=nodes_come)
    ranks = _digest(job)
    if journal.history.controllers and journal.history.ranks != ranks:
        log.info("group %s: code or settings are not those that its ranks were started with: new ones start", group)
        end_group(group, agents.leader)
    journal.note(ranks=ranks)
    replicated = settings.sharding == "replicate" and settings.block == 1
    task = PretrainTask(group, open_store(job.snapshot_store), store, elastic, replicated)
    exporter = Exporter("" if accounts is None else accounts[1], group)
    with metered(listener, exporter, elastic.max_workers + elastic.spares) as heard:
        GroupController(fleet, task, elastic, journal, heard, tuple(rows)).run()
    del served  # until here the ranks met at this server


def _digest(job: PretrainJob) -> str:
    """Digest of everything that determines a rank, except the locations of data and results."""
    made_of = [job.settings.model_dump_json(), repr(job.model), str(job.seed)]
    here = code_root()
    for package in CODE:
        for path in sorted((here / package).rglob("*.py")):
            made_of += [str(path.relative_to(here)), path.read_text()]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def in_words(event: Mapping[str, Any]) -> str | None:
    """A line about an event for people; None for routine events.

    Example: "generation 2: 1 rank trains from step 41; the pause took 312 ms, no step was lost"
    """
    kind = event["event"]
    if kind == "detected":
        after_s = event.get("after_s")
        return f"detected{'' if after_s is None else _after(after_s)}: {event['what']}"
    if kind == "decided":
        return None if event["generation"] == 0 else str(event["decision"])
    if kind == "stacks":
        return f"stacks of {event['worker']}: {event['stacks']}"
    if kind == "short":
        why = f": {event['reason']}" if "reason" in event else ""
        few = f"it ended with {event['ranks']} of the {event['asked']} ranks asked for (workers)"
        return f"{few}, and took {event['short_steps']} of its {event['steps']} steps with fewer than that{why}"
    if kind == "rolled-back":
        return f"step {event['step']}: back to {event['to_step']}; {event['decision']}"
    if kind != "started":
        return None
    ranks, lost = event["ranks"], event.get("lost_steps", 0)
    who = "1 rank trains" if ranks == 1 else f"{ranks} ranks train"
    line = f"generation {event['generation']}: {who} from step {event['step']}"
    if event["generation"] > 1 and "pause_s" in event:
        steps = "no step was lost" if not lost else f"{lost} step{'s' * (lost != 1)} lost and computed again"
        line += f"; the pause took {1000 * event['pause_s']:.0f} ms, {steps}"
    return line


def _after(seconds: float) -> str:
    """The delay of a detection, for people."""
    return f" within {1000 * seconds:.0f} ms" if seconds < 1 else f" after {seconds:.1f} s"


def _claim(job: PretrainJob, store: Store) -> None:
    """The state belongs to one job: settings that determine the numbers must not change."""
    irrelevant = {"workers", "sharding", "tensor_parallel", "compile", "num_cpus", "num_gpus", "threads", "placement"}
    irrelevant |= {"pipeline_parallel", "shard_over", "save_every", "keep_states", "micro_batch_size", "elastic"}
    irrelevant |= {"snapshot_store", "validate_every", "validation_rows"}
    settings = job.settings.model_dump(mode="json", exclude=irrelevant)
    identity = {"model": asdict(job.model), "settings": settings, "seed": job.seed}
    text = json.dumps(identity, sort_keys=True, default=str, indent=1)
    if not store.put_if_absent(JOB, text.encode()) and store.get(JOB) != text.encode():
        raise CheckpointError(f"state {store.url} belongs to a pretraining with other settings (see {JOB} there)")
