"""How long re-forming stops real ranks, by group size. The simulator's pause model is fitted to these measurements.

    python -m bench.pauses --most 16 --output cluster/simulation/measured_pauses.json

One group of real processes (gloo, FSDP, a toy Llama) trains. One rank after the other is killed with SIGKILL inside a
step, and the survivors continue in the same processes. Who waits for whom: this process waits for every rank's answer;
ranks wait for each other in collectives, and for this process between generations.

Phases, in seconds, each the slowest rank's: abort_s (from the command "abort" until the last rank has left its groups),
form_s (new groups and mesh), build_s (network and optimizer sharded again), first_step_s (the first step's time beyond
a usual one), detection_s (from SIGKILL until this process knows). No state is restored; cluster.simulation.pauses
states that cost. If there are more ranks than cores, phases grow with the ranks because they compete for cores. Prints
one JSON object as its last line.
"""

import argparse
import gc
import json
import multiprocessing as mp
import os
import platform
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median
from typing import Any

from infra.storage.files import write_text

DEADLINE_S = 120.0
MODEL: dict[str, Any] = {"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 128}
MODEL |= {"vocab_size": 64, "context": 64}
USUAL_STEPS = 4


def rank_main(words: Connection, store: tuple[str, int]) -> None:
    """One rank: a control thread receives commands, this thread trains and answers."""
    import torch

    from engines.collectives.process_groups import ProcessGroups, Rendezvous, StoreAddress
    from infra.errors import NodeLost

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # later collections skip the imported modules
    rendezvous = Rendezvous(StoreAddress(*store))
    joins: list[tuple[int, int, int]] = []
    arrived, groups = threading.Semaphore(0), [None]

    def listen() -> None:
        while True:
            word = words.recv()
            if word == "abort":
                assert groups[0] is not None
                groups[0].abort()
            else:
                joins.append(word)
                arrived.release()

    threading.Thread(target=listen, daemon=True).start()
    words.send("ready")
    while True:
        arrived.acquire()
        generation, rank, world_size = joins.pop()
        current: Any = ProcessGroups(generation, rank, world_size, rendezvous)
        groups[0] = current
        try:
            with current.naming_lost_peers():
                train(current, words)
        except NodeLost:
            current.leave()
            words.send("left")


def train(groups: Any, words: Connection) -> None:
    """Form, build, report the phases after `USUAL_STEPS` steps, and train until a peer is lost."""
    import torch

    from engines.base import Batch
    from engines.collectives.ranks import Ranks
    from engines.config import LearnerSettings
    from engines.elastic.torch_learner import LlamaConfig, build

    laps = [time.perf_counter()]
    ranks = groups.form(Ranks.over_all)
    laps.append(time.perf_counter())
    learner = build(LlamaConfig(**MODEL), LearnerSettings(learning_rate=1e-3), ranks, fsdp=True)
    laps.append(time.perf_counter())
    tokens = torch.randint(0, MODEL["vocab_size"], (1, 65), generator=torch.Generator().manual_seed(ranks.rank))
    batch = {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:]}

    def loss_fn(module: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        logits = module(batch["input_ids"])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()), {}

    steps: list[float] = []
    while True:
        started = time.perf_counter()
        learner.train_step([batch], loss_fn)
        steps.append(time.perf_counter() - started)
        if len(steps) == USUAL_STEPS + 1:
            usual = median(steps[1:])
            phases = {"form_s": laps[1] - laps[0], "build_s": laps[2] - laps[1]}
            words.send({**phases, "first_step_s": max(0.0, steps[0] - usual), "step_s": usual})


class Group:
    """Real rank processes and the commands to them."""

    def __init__(self, size: int) -> None:
        from engines.collectives.process_groups import host_store

        self._store, address = host_store()
        context = mp.get_context("fork")
        self.ranks: list[tuple[Any, Connection]] = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=rank_main, args=(theirs, (address.host, address.port)), daemon=True)
            process.start()
            theirs.close()
            self.ranks.append((process, ours))
        self.generation = 0
        self.answers("ready")

    def answers(self, wanted: Any = dict) -> list[Any]:
        """One answer from every rank. Raises RuntimeError if a rank dies or is silent."""
        found = []
        for process, words in self.ranks:
            if not words.poll(DEADLINE_S):
                raise RuntimeError(f"rank process {process.pid} gave no answer in {DEADLINE_S:g} s")
            answer = words.recv()
            if not (answer == wanted or (wanted is dict and isinstance(answer, dict))):
                raise RuntimeError(f"rank process {process.pid} said {answer!r} instead of {wanted!r}")
            found.append(answer)
        return found

    def form(self) -> dict[str, float]:
        """Train in the next generation; returns the slowest rank's phases."""
        self.generation += 1
        for rank, (_, words) in enumerate(self.ranks):
            words.send((self.generation, rank, len(self.ranks)))
        answers = self.answers()
        return {name: max(answer[name] for answer in answers) for name in answers[0]}

    def kill(self, victim: int) -> dict[str, float]:
        """SIGKILL one rank in the middle of a step, and make the others leave their collectives."""
        process, words = self.ranks.pop(victim)
        killed = time.perf_counter()
        os.kill(process.pid, signal.SIGKILL)
        wait([process.sentinel], DEADLINE_S)
        known = time.perf_counter()
        for _, others in self.ranks:
            others.send("abort")
        self.answers("left")
        words.close()
        return {"detection_s": known - killed, "abort_s": time.perf_counter() - known}

    def end(self) -> None:
        for process, _ in self.ranks:
            process.kill()
            process.join()


def measure(most: int, dice: random.Random) -> list[dict[str, float]]:
    """From `most` + 1 ranks down to 2: one row per kill, by the size of the remaining group."""
    group, rows = Group(most + 1), []
    try:
        group.form()
        while len(group.ranks) > 2:
            time.sleep(dice.uniform(0, 0.2))  # anywhere in a step
            lost = group.kill(dice.randrange(len(group.ranks)))
            row = {"ranks": float(len(group.ranks)), **lost, **group.form()}
            rows.append({name: round(value, 5) for name, value in row.items()})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    finally:
        group.end()
    return rows


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=16, help="ranks of the largest group measured")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the victims")
    parser.add_argument("--output", type=Path, help="write the object here too")
    given = parser.parse_args(arguments)
    import engines.elastic.torch_learner  # noqa: F401  before the ranks are forked, so that none imports torch again

    dice, before, started = random.Random(given.seed), os.getloadavg()[0], time.monotonic()
    rows = [row for _ in range(given.passes) for row in measure(given.most, dice)]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, gloo on loopback"
    result = {
        "measurements": sorted(rows, key=lambda row: row["ranks"]),
        "command": "python -m bench.pauses " + " ".join(arguments),
        "machine": f"{machine}, load average {before:.1f} before, {os.getloadavg()[0]:.1f} with the ranks at the end",
        "seconds": round(time.monotonic() - started, 1),
        "model": MODEL,
    }
    if given.output is not None:
        write_text(given.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
