"""Seconds without a completed step after a rank is killed with SIGKILL, beyond the usual step: recua's own figures.

    python -m bench.recovery --json

One pinned toy Llama, 4 ranks (FSDP on gloo), steps of 200 ms and more on two cores. Every rank, 0 included, is killed
`--rounds` times by its process id, while the others wait for it in the collectives of a step.

    recua_shrink_s  the survivors go on smaller, while a cold replacement warms up beside them (which slows their steps)
    recua_full_s    the sum of the pauses until all ranks train again: shrinking, and growing back at a step boundary
    recua_back_s    from the kill until all ranks train again, steps of the smaller group included
    recua_spare_s   a hot spare takes the place: back at full size
    recua_tp_s      the same for a rank of a tp2 block (dp2 x tp2)

Medians over all kills; `all` has every one, with the controller's own pauses. Prints one JSON object as its last line.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

RANKS = 4
MODEL: dict[str, Any] = {"dim": 128, "layers": 4, "heads": 4, "kv_heads": 2, "ffn_dim": 352, "context": 128}
BATCH, TOKENS, VOCAB = 32, 128, 300
QUIET_STEPS = 8
"""Steps of the whole group before each kill."""
CASES: dict[str, dict[str, int]] = {"shrink": {}, "spare": {"spares": 1}, "tp": {"spares": 1, "tensor_parallel": 2}}


class Enough(Exception):
    """Every kill is done and overcome."""


class Killer:
    """Hears rows and events of a group; kills the next rank whenever the whole group has trained for a while."""

    def __init__(self, kills: int, processes: int) -> None:
        self.kills, self.processes = kills, processes
        self._ready = 0
        self.times: list[float] = []
        self.killed: list[float] = []
        self.back: list[float] = []
        self.pauses: list[float] = []
        self.lost_steps: list[int] = []
        self._pids: list[int] = []
        self._quiet = 0

    def event(self, event: dict[str, Any]) -> None:
        if event["event"] == "ready":
            self._ready += len(event["workers"])
        elif event["event"] == "started":
            self._pids, self._quiet = event["pids"], 0
            if self.killed:
                self.pauses.append(round(event.get("pause_s", 0.0), 4))
                self.lost_steps.append(event.get("lost_steps", 0))
            if len(self._pids) == RANKS and len(self.back) < len(self.killed):
                self.back.append(event.get("time", time.time()) - self.killed[-1])

    def row(self, row: dict[str, Any]) -> None:
        self.times.append(row["time"])
        self._quiet += 1
        if len(self._pids) == RANKS and self._quiet >= QUIET_STEPS and self._all_ready():
            if len(self.killed) == self.kills:
                raise Enough
            self._quiet = 0
            self.killed.append(time.time())
            os.kill(self._pids[(len(self.killed) - 1) % RANKS], signal.SIGKILL)

    def _all_ready(self) -> bool:
        """The spares of the last kill are there again."""
        return self._ready - len(self.killed) >= self.processes

    def usual_s(self) -> float:
        return median(b - a for a, b in pairwise(self.times))

    def gaps(self, worst: int) -> list[float]:
        """Per kill the sum of the `worst` longest times between two completed steps, each beyond the usual one."""
        usual, found = self.usual_s(), []
        for start, end in pairwise([*self.killed, self.times[-1]]):
            steps = sorted(b - a for a, b in pairwise(self.times) if start < b <= end)
            found.append(sum(max(0.0, step - usual) for step in steps[-worst:]))
        return found


def measure(folder: Path, kills: int, *, spares: int = 0, tensor_parallel: int = 1) -> Killer:
    """One real pretraining under fire."""
    from actors.config import PretrainSettings
    from actors.pretrain import JOURNAL, pretrain
    from cluster.group_journal import GroupJournal
    from engines.config import LearnerSettings
    from models.llama import LlamaConfig
    from models.tokenizer import load_tokenizer

    settings = PretrainSettings.model_validate(
        {
            "optimizer": LearnerSettings(learning_rate=1e-3, warmup_steps=2),
            "steps": 10**6,
            "batch_size": BATCH,
            "micro_batch_size": BATCH,
            "sequence_length": TOKENS,
            "workers": RANKS,
            "tensor_parallel": tensor_parallel,
            "sharding": "fsdp",
            "num_cpus": 0.25,
            "save_every": 10**6,
            "elastic": {"spares": spares, "growth_must_pay": False, "quarantine_faults": 10**6, "hang_floor_s": 30},
        }
    )
    model = LlamaConfig(vocab_size=load_tokenizer(folder / "tokenizer").vocab_size, **MODEL)
    killer, run = Killer(kills, RANKS + spares), Path(tempfile.mkdtemp(dir=folder))
    with contextlib.suppress(Enough):
        pretrain(
            folder / "tokens", folder / "tokenizer", model, settings, run / "out", run / "state", killer.row,
            on_event=killer.event, faults="",
        )  # fmt: skip
    group = GroupJournal(run / "state" / JOURNAL, "").history.group
    for memory in Path("/dev/shm").glob(f"recua-node-*/recua-{group}"):  # kept, because the run has not ended
        shutil.rmtree(memory)
    return killer


def corpus(folder: Path) -> None:
    """Token shards and a tokenizer, the same every time."""
    from data.tokenized import write_shards
    from models.tokenizer import load_tokenizer, train_bpe

    draw = random.Random(0)
    texts = [" ".join(f"{draw.randrange(100)} plus" for _ in range(100)) for _ in range(300)]
    train_bpe(texts, VOCAB).save(folder / "tokenizer")
    write_shards(texts, load_tokenizer(folder / "tokenizer"), folder / "tokens")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="only the JSON object on standard output")
    parser.add_argument("--rounds", type=int, default=2, help="how often each rank is killed")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    given = parser.parse_args(arguments)
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default is 15: behind whatever else runs here
    paths = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths})
    folder = Path(tempfile.mkdtemp(prefix="recua-recovery-"))
    result: dict[str, float] = {}
    everything: dict[str, Any] = {}
    try:
        corpus(folder)
        for case in given.cases.split(","):
            killer = measure(folder, RANKS * given.rounds, **CASES[case])
            gaps = killer.gaps(1)
            result[f"recua_{case}_s"] = round(median(gaps), 3)
            everything[case] = {"gaps_s": [round(gap, 3) for gap in gaps], "step_s": round(killer.usual_s(), 3)}
            everything[case] |= {"pauses_s": killer.pauses, "lost_steps": killer.lost_steps}
            if case == "shrink":
                result["recua_full_s"] = round(median(killer.gaps(2)), 3)
                result["recua_back_s"] = round(median(killer.back), 3)
            if not given.json:
                print(case, json.dumps(everything[case]), flush=True)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    load = os.getloadavg()[0]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, load average {load:.1f} at the end"
    print(json.dumps({**result, "machine": machine, "ranks": RANKS, "model": MODEL, "all": everything}))


if __name__ == "__main__":
    main(sys.argv[1:])
