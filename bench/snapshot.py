"""The cost of a snapshot of the training state in every step, for a 20M-parameter Llama.

    python -m bench.snapshot                                  # a table; 4k, 16k and 64k tokens per step, ten rounds
    python -m bench.snapshot --json --tokens 16384            # one size, as one JSON object on the last line

In each round every method trains one step, and one step runs without snapshots, in rotating order, so that other load
on the machine affects all alike. A step with a method takes the state, runs meanwhile if the method allows it, and ends
when the next snapshot could begin.

  off          no snapshot
  memory       `engines.snapshots`: copied into shared memory beside the step, checksummed, two kept
  replica      the same, with a replica in another process, which verifies it, over TCP (both ends on this machine)
  dcp_async    `torch.distributed.checkpoint.async_save` to a folder
  torch_save   `torch.save` to a folder, before the step

Overheads are fractions of a step without snapshots: the median over the rounds of (step with / step without - 1), with
a 95% bootstrap interval. `cpu_s` are processor seconds of this process per step (medians), which hardly depend on other
load. Files go to shared memory unless --folder names another folder, so that no disk is measured.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from actors.pretrain.batches import next_token_loss
from engines.collectives.ranks import Ranks
from engines.config import LearnerSettings
from engines.elastic.torch_learner import LlamaConfig, TorchLearner, build
from engines.snapshots import Holder, Peer, ReplicaServer, Snapshots

SEQUENCE = 512
MICRO_BATCH = 4096
"""Tokens per forward pass."""
HEADLINE = 16384
MODEL = LlamaConfig(
    dim=384, layers=11, heads=6, kv_heads=2, ffn_dim=1024, vocab_size=4096, context=SEQUENCE
)  # 20.4M parameters
TOKEN = "bench"
METHODS = ("memory", "replica", "dcp_async", "torch_save")


class Off:
    """A snapshot method that takes none. `begin`, the step and `finish` are measured, `rest` is not."""

    def __init__(self, learner: TorchLearner) -> None:
        self.learner = learner

    def begin(self) -> None:
        """Take the part of the state that must be taken before the step."""

    def finish(self) -> None:
        """Wait until the next snapshot may begin."""

    def rest(self) -> None:
        """Wait for work that belongs to the next step."""


class InMemory(Off):
    """As in training: the step waits for the copy before it changes the weights, and begins the next one."""

    def __init__(self, learner: TorchLearner, folder: Path, holders: Sequence[Holder] = ()) -> None:
        super().__init__(learner)
        self.snapshots = Snapshots(folder, "bench", 0, 0, 1, holders=holders)

    def begin(self) -> None:
        self.learner.snapshots = self.snapshots
        self.learner.take_snapshot()

    def rest(self) -> None:
        self.learner.snapshots = None
        newest = self.snapshots.settle()
        assert newest is not None and not newest.problems, newest


def _state(learner: TorchLearner) -> dict[str, torch.Tensor]:
    """Weights, moments and step by global name, as in a checkpoint of torch's."""
    return {**learner.optimizer.state(), "step": torch.tensor(learner.step)}


class DcpAsync(Off):
    """Staged in the training thread, written by another thread."""

    def __init__(self, learner: TorchLearner, folder: Path) -> None:
        super().__init__(learner)
        self.folder = folder

    def begin(self) -> None:
        writer = dcp.FileSystemWriter(self.folder, sync_files=False, overwrite=True)
        self._saved: Any = dcp.async_save(_state(self.learner), storage_writer=writer, no_dist=True)

    def finish(self) -> None:
        self._saved.result()


class TorchSave(Off):
    """Written in the training thread."""

    def __init__(self, learner: TorchLearner, file: Path) -> None:
        super().__init__(learner)
        self.file = file

    def begin(self) -> None:
        torch.save(_state(self.learner), self.file)


@dataclass
class Timings:
    """Seconds of one method at one size, one entry per round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@contextmanager
def methods(names: Sequence[str], learner: TorchLearner, folder: Path) -> Iterator[dict[str, Off]]:
    """The methods of `names`, and `off`."""
    with ExitStack() as stack:
        made = {"off": Off(learner)}
        for name in names:
            if name == "memory":
                made[name] = InMemory(learner, folder / name)
            elif name == "replica":
                made[name] = InMemory(learner, folder / name, [stack.enter_context(replica_holder(folder))])
            elif name == "dcp_async":
                made[name] = DcpAsync(learner, folder / name)
            else:
                made[name] = TorchSave(learner, folder / name)
        yield made
        for method in made.values():
            if isinstance(method, InMemory):
                method.snapshots.close(remove=True)


@contextmanager
def replica_holder(folder: Path) -> Iterator[Peer]:
    """Another process that keeps replicas in shared memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold_replicas, args=(theirs, folder / "other-node"), daemon=True)
    process.start()
    peer = Peer("127.0.0.1", ours.recv(), TOKEN, "bench")
    try:
        yield peer
    finally:
        peer.close()
        ours.send(None)
        process.join()


def _hold_replicas(pipe: Connection, folder: Path) -> None:
    with ReplicaServer(TOKEN, root=folder) as server:
        pipe.send(server.port)
        pipe.recv()


def micro_batches(tokens: int, vocab_size: int) -> list[dict[str, torch.Tensor]]:
    """`tokens` random tokens as micro-batches of sequences."""
    generator = torch.Generator().manual_seed(tokens)
    rows = torch.randint(0, vocab_size, (max(1, tokens // SEQUENCE), SEQUENCE + 1), generator=generator)
    batches = rows.split(MICRO_BATCH // SEQUENCE)
    return [{"input_ids": batch[:, :-1], "targets": batch[:, 1:]} for batch in batches]


def measure(
    learner: TorchLearner, ready: dict[str, Off], tokens: int, rounds: int, limit_s: float = math.inf
) -> dict[str, Timings]:
    """`rounds` rounds of one step per method, after a warm-up round; fewer if `limit_s` runs out."""
    batches, loss = micro_batches(tokens, learner.config.vocab_size), next_token_loss(tokens)
    seen = {name: Timings() for name in ready}
    order, started = list(ready), time.monotonic()
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() - started > limit_s:
            break
        for name in order:
            method = ready[name]
            wall, cpu = time.perf_counter(), time.process_time()
            method.begin()
            learner.train_step(batches, loss)
            method.finish()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            method.rest()
            if number:
                seen[name].wall.append(wall)
                seen[name].cpu.append(cpu)
        order = [*order[1:], order[0]]
        print(f"{tokens} tokens, round {number} of {rounds}: {wall:.2f} s a step", file=sys.stderr, flush=True)
    return seen


def overhead(with_it: Timings, without: Timings) -> tuple[float, tuple[float, float]]:
    """Median of the rounds' relative differences and its 95% bootstrap interval."""
    ratios = [a / b - 1 for a, b in zip(with_it.wall, without.wall, strict=True)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), (medians[50], medians[-51])


def report(seen: dict[int, dict[str, Timings]], learner: TorchLearner) -> dict[str, Any]:
    """The figures of the module's docstring; the headline is at 16k tokens, or else at the largest size."""
    sizes: dict[str, Any] = {}
    for tokens, timings in seen.items():
        size: dict[str, Any] = {"rounds": len(timings["off"].wall), "step_s": statistics.median(timings["off"].wall)}
        for name, one in timings.items():
            size.setdefault("cpu_s", {})[name] = statistics.median(one.cpu)
            if name != "off":
                size[f"{name}_overhead"], size[f"{name}_ci"] = overhead(one, timings["off"])
        sizes[str(tokens)] = size
    headline = HEADLINE if HEADLINE in seen else max(seen)
    chosen = sizes[str(headline)]
    state_bytes = sum(piece.tensor.numel() * piece.tensor.element_size() for piece in learner.pieces())
    return {
        "tokens_per_step": headline,
        "overhead_every_step": chosen.get("memory_overhead"),
        "overhead_ci": chosen.get("memory_ci"),
        "dcp_async_overhead": chosen.get("dcp_async_overhead"),
        "torch_save_overhead": chosen.get("torch_save_overhead"),
        "replica_overhead": chosen.get("replica_overhead"),
        "cpu_s": chosen["cpu_s"],
        "sizes": sizes,
        "parameters": sum(parameter.numel() for parameter in learner.module.parameters()),
        "state_mib": state_bytes / 2**20,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
    }


def run(
    model: LlamaConfig,
    sizes: Sequence[int],
    rounds: int,
    names: Sequence[str],
    parent: Path,
    limit_s: float = math.inf,
) -> dict[str, Any]:
    """Measure `names` at all `sizes` (tokens per step), with files in a folder of its own under `parent`."""
    learner = build(model, LearnerSettings(learning_rate=1e-4), Ranks(), fsdp=False)
    with tempfile.TemporaryDirectory(prefix="recua-bench-", dir=parent) as folder:
        with methods(names, learner, Path(folder)) as ready:
            seen = {tokens: measure(learner, ready, tokens, rounds, limit_s) for tokens in sizes}
        return report(seen, learner)


def table(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [f"{figures['parameters'] / 1e6:.1f}M parameters, {figures['state_mib']:.0f} MiB of state"]
    for tokens, size in figures["sizes"].items():
        lines.append(f"{tokens} tokens: {size['step_s']:.2f} s a step, {size['rounds']} rounds")
        for name, cpu in size["cpu_s"].items():
            cost = ""
            if name != "off":
                low, high = size[f"{name}_ci"]
                cost = f"{size[f'{name}_overhead']:+8.2%}  ({low:+.2%} to {high:+.2%})"
            lines.append(f"  {name:<12}{cpu:8.2f} CPU s  {cost}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, HEADLINE, 65536], help="per step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where files go")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds per size; no round begins after them")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    figures = run(MODEL, given.tokens, given.rounds, given.methods, given.folder, given.limit)
    print(json.dumps(figures) if given.json else table(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
