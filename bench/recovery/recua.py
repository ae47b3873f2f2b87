"""recua's own runs with kills: a real pretraining on a local Ray. Weights are replicated, as the peers' are."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.pretrain.lead import in_words
from bench.recovery.course import Course
from bench.recovery.job import BATCH, CLIP, LEARNING_RATE, MODEL, RANKS, THREADS, TOKENS

CASES: dict[str, dict[str, int]] = {"shrink": {}, "spare": {"spares": 1}, "tp": {"spares": 1, "tensor_parallel": 2}}


class Enough(Exception):
    """The group has recovered from the last kill."""


class Ear:
    """Passes rows and events of the group to the course. `processes`: the number of ranks and spares."""

    def __init__(self, course: Course, processes: int) -> None:
        self.course, self.processes = course, processes
        self.pauses: list[float] = []
        self.lost_steps: list[int] = []
        self.said: list[str] = []
        self._ready = 0
        self._members: dict[int, int] = {}

    def event(self, event: dict[str, Any]) -> None:
        if self.course.kills and event["event"] in ("decided", "stacks"):
            self.said.append(in_words(event) or "")
        if event["event"] == "ready":
            self._ready += len(event["workers"])
        elif event["event"] == "started":
            self._members = dict(enumerate(event["pids"]))
            self.course.resized(event["step"], len(self._members))
            if self.course.kills:
                self.pauses.append(round(event.get("pause_s", 0.0), 4))
                self.lost_steps.append(event.get("lost_steps", 0))

    def row(self, row: dict[str, Any]) -> None:
        if "tokens_per_s" not in row:  # reported again, by a generation that loaded this step
            return
        spares_back = self._ready - len(self.course.kills) >= self.processes
        self.course.step(row["step"], row["time"], self._members, ranks=len(self._members), ready=spares_back)
        if self.course.over:
            raise Enough


def measure(case: str, folder: Path, kills: int) -> tuple[Course, dict[str, Any]]:
    """One run with kills, in `folder` (see `job.prepare`), and the controller's own pauses and lost steps."""
    from actors.pretrain.config import PretrainSettings
    from actors.pretrain.job import PretrainJob
    from actors.pretrain.lead import pretrain
    from cluster.core.history import GroupJournal
    from engines.config import LearnerSettings
    from infra.storage import open_store
    from models.llama import LlamaConfig
    from models.tokenizers import load_tokenizer

    spares, tensor_parallel = CASES[case].get("spares", 0), CASES[case].get("tensor_parallel", 1)
    settings = PretrainSettings.model_validate(
        {
            "optimizer": LearnerSettings(learning_rate=LEARNING_RATE, max_grad_norm=CLIP),
            "steps": 10**6,
            "batch_size": BATCH,
            "micro_batch_size": BATCH,
            "sequence_length": TOKENS,
            "workers": RANKS,
            "tensor_parallel": tensor_parallel,
            "sharding": "replicate",
            "num_cpus": 0.25,
            "threads": THREADS,
            "save_every": 10**6,
            "elastic": {"spares": spares, "growth_must_pay": False, "quarantine_faults": 10**6, "hang_floor_s": 30},
        }
    )
    model = LlamaConfig(vocab_size=load_tokenizer(folder / "tokenizer").vocab_size, **MODEL)
    course, run = Course(kills), Path(tempfile.mkdtemp(dir=folder))
    ear = Ear(course, RANKS + spares)
    with local_ray(), contextlib.suppress(Enough):
        job = PretrainJob(folder / "tokens", folder / "tokenizer", model, settings, str(run / "state"), faults="")
        pretrain(job, run / "out", ear.row, on_event=ear.event)
    group = GroupJournal(open_store(run / "state"), "").history.group
    for memory in Path("/dev/shm").glob(f"recua-node-*/recua-{group}"):  # kept, because the run has not ended
        shutil.rmtree(memory)
    return course, {"pauses_s": ear.pauses, "lost_steps": ear.lost_steps, "said": ear.said, **CASES[case]}


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """A Ray on this machine alone, with niceness 0: Ray's default of 15 puts workers behind all other processes.

    On exit also removes the snapshots that unfinished runs keep in the machine's memory.
    """
    import ray

    from cluster.node.host_memory import node_root

    os.environ.setdefault("RAY_worker_niceness", "0")
    paths = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    ray.init(
        address="local", num_cpus=RANKS, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths}
    )
    nodes = [node["NodeID"] for node in ray.nodes()]
    try:
        yield
    finally:
        ray.shutdown()
        for node in nodes:
            shutil.rmtree(node_root(node), ignore_errors=True)
