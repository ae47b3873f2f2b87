"""Ranks of elastic training in real processes, led by a test as a controller would lead them."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from actors.pretrain.batches import NO_TARGET, next_token_loss
from data.config import BatchSettings
from data.loader import Loader
from data.mixture import Mixture, Source
from engines.collectives.process_groups import Rendezvous, StoreAddress, host_store
from engines.collectives.ranks import Ranks
from engines.config import LearnerSettings
from engines.elastic.learner import ElasticLearner, Joined, Recipe
from engines.elastic.torch_learner import TorchLearner, build
from engines.snapshots import Peer
from infra.errors import NodeLost
from models.llama import LlamaConfig
from tests.helpers.forks import FORKS

ROWS, TOKENS, STEPS = 13, 16, 8
"""Rows of a global batch (no number of ranks divides it), tokens of a row, steps of a run."""
DEADLINE = 120.0
MODEL = LlamaConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, vocab_size=40, context=TOKENS)
SETTINGS = LearnerSettings(learning_rate=1e-2, warmup_steps=2, total_steps=STEPS, max_grad_norm=0.5, eps=1e-4)


def loader(skipped: Sequence[int] = ()) -> Loader:
    return Loader(Mixture([Source("rows", 5000, 1.0)], seed=5), BatchSettings(size=ROWS), skipped)


def row(index: int) -> torch.Tensor:
    return torch.randint(0, 40, (TOKENS + 1,), generator=torch.Generator().manual_seed(index))


def take_step(learner: TorchLearner, train_step: Any) -> tuple[float, list[int]]:
    """This rank's share of the step's batch: (the batch's loss, ids of the samples in the share)."""
    ranks, ids = learner.ranks, loader(learner.data_position.get("skipped", ()))
    pieces = ids.micro_batches(learner.step, ranks.data_rank, ranks.data_size, size=4)
    shares = [[index for _, _, index in piece.tuples()] for piece in pieces]
    output = train_step([micro_batch(share) for share in shares], next_token_loss(ROWS * TOKENS))
    assert output.committed
    return float(ranks.sum(output.metrics)["loss"]), [index for share in shares for index in share]


def micro_batch(share: list[int]) -> dict[str, torch.Tensor]:
    """A micro-batch; without samples, one row without targets, so that all ranks join equal collectives."""
    rows = torch.stack([row(index) for index in share or [0]])
    return {"input_ids": rows[:, :-1], "targets": rows[:, 1:] if share else torch.full_like(rows[:, 1:], NO_TARGET)}


def quiet_curve(steps: int = STEPS, skipped: Sequence[int] = ()) -> list[float]:
    learner = build(MODEL, SETTINGS, Ranks(), fsdp=False, seed=3)
    learner.data_position = {"skipped": list(skipped)}
    return [take_step(learner, learner.train_step)[0] for _ in range(steps)]


Place = tuple[str, int, str]
"""Host, port and token of a replica server."""


@dataclass(frozen=True)
class Go:
    """Train in a generation; rank `victim` kills itself in step `at` while the others wait for it in a collective."""

    generation: int
    rank: int
    world_size: int
    victim: int = -1
    at: int = -1
    until: int = STEPS
    fresh: bool = False
    at_most: int | None = None
    skip: int = -1
    """A window of data that a policy drops before the first step of this generation."""
    sources: tuple[Place, ...] = ()
    holders: tuple[Place, ...] = ()
    stop: bool = False
    """Leave a snapshot of the last step, as at a boundary at which all stop."""


def worker(pipe: Connection, recipe: Recipe, run: str, shared: Path, address: StoreAddress) -> None:
    torch.set_num_threads(1)
    elastic = ElasticLearner(recipe, run, Rendezvous(address), shared=shared)
    elastic.warm_up()
    orders: queue.SimpleQueue[Go | None] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(pipe, elastic, orders), daemon=True).start()
    pipe.send(("ready", os.getpid()))
    while (go := orders.get()) is not None:
        try:
            train(pipe, elastic, go, run)
        except NodeLost as error:
            pipe.send(("lost", time.monotonic(), str(error)))
    elastic.leave()


def listen(pipe: Connection, elastic: ElasticLearner, orders: Any) -> None:
    """The control thread."""
    while True:
        order = pipe.recv()
        if isinstance(order, int):
            elastic.abort(order)
        else:
            orders.put(order)


def train(pipe: Connection, elastic: ElasticLearner, go: Go, run: str) -> None:
    joined = elastic.join(
        go.generation,
        go.rank,
        go.world_size,
        sources=[Peer(*place, run) for place in go.sources],
        holders=[Peer(*place, run) for place in go.holders],
        at_most=go.at_most,
        fresh=go.fresh,
    )
    learner = elastic.learner
    assert learner is not None and joined.step == learner.step
    pipe.send(("joined", joined.step, joined))
    if go.skip >= 0:
        learner.data_position = {"skipped": [go.skip]}
    while learner.step < go.until:
        step = learner.step
        if go.rank == go.victim and step == go.at:
            os.kill(os.getpid(), signal.SIGKILL)
        with elastic.groups.naming_lost_peers():  # the sum of the loss waits for peers that may be gone by now
            loss, ids = take_step(learner, elastic.train_step)
        pipe.send(("step", step, loss, time.monotonic(), ids))
    elastic.take_last() if go.stop else elastic.snapshots.settle()
    weights = {name: tensor.clone() for name, tensor in learner.export()}
    pipe.send(("done", weights))


class Group:
    """Worker processes and their messages. `shared`: the shared memory of their one node, or of each worker's node."""

    def __init__(self, count: int, recipe: Recipe, run: str, shared: Path | Sequence[Path]) -> None:
        self.store, address = host_store()
        memories = [shared] * count if isinstance(shared, Path) else shared
        self.pipes, self.processes = [], []
        for memory in memories:
            pipe, theirs = FORKS.Pipe()
            process = FORKS.Process(target=worker, args=(theirs, recipe, run, memory, address))
            process.start()
            theirs.close()
            self.pipes.append(pipe)
            self.processes.append(process)
        for worker_number in range(count):
            assert self.hear(worker_number)[0] == "ready"

    def hear(self, worker_number: int) -> Any:
        assert self.pipes[worker_number].poll(DEADLINE), f"worker {worker_number} is silent"
        return self.pipes[worker_number].recv()

    def hear_until(self, worker_number: int, kind: str) -> tuple[Any, list[Any]]:
        """The first message of `kind`, and those before it."""
        before = []
        while (message := self.hear(worker_number))[0] != kind:
            before.append(message)
        return message, before

    def send(self, members: list[int], **go: Any) -> None:
        """Worker members[r] becomes rank r."""
        for rank, member in enumerate(members):
            self.send_one(member, rank, len(members), **go)

    def send_one(self, member: int, rank: int, world_size: int, **go: Any) -> None:
        self.pipes[member].send(Go(rank=rank, world_size=world_size, **go))

    def lose(self, members: list[int], victim: int, generation: int) -> tuple[list[Any], float]:
        """Wait for the death and tell the survivors; returns all their messages, and the time of the death."""
        assert multiprocessing.connection.wait([self.processes[victim].sentinel], DEADLINE)
        died = time.monotonic()
        survivors = [member for member in members if member != victim]
        for member in survivors:
            self.pipes[member].send(generation)
        said = [message for member in survivors for message in self.hear_until(member, "lost")[1]]
        with contextlib.suppress(EOFError, ConnectionResetError):
            while self.pipes[victim].poll():
                said.append(self.pipes[victim].recv())
        return said, died

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def losses(messages: list[Any]) -> dict[int, float]:
    return {message[1]: message[2] for message in messages if message[0] == "step"}


def consumed(messages: list[Any]) -> dict[int, list[int]]:
    """Sample ids of each step, over all ranks that took it."""
    found: dict[int, list[int]] = {}
    for message in messages:
        if message[0] == "step":
            found.setdefault(message[1], []).extend(message[4])
    return {step: sorted(ids) for step, ids in found.items()}


@dataclass
class Finished:
    joined: Joined
    losses: dict[int, float]
    consumed: dict[int, list[int]]
    weights: dict[str, torch.Tensor]
    first_step_at: float


def finish(group: Group, members: list[int]) -> Finished:
    """The results of rank 0 and the samples of all ranks, when all have ended."""
    said = [group.hear_until(member, "done") for member in members]
    done, before = said[0]
    samples = consumed([message for _, messages in said for message in messages])
    joined = next(message[2] for message in before if message[0] == "joined")
    first = next((message[3] for message in before if message[0] == "step"), 0.0)
    return Finished(joined, losses(before), samples, done[1], first)


@contextlib.contextmanager
def running(count: int, recipe: Recipe, run: str, shared: Path | Sequence[Path]) -> Iterator[Group]:
    group = Group(count, recipe, run, shared)
    try:
        yield group
    finally:
        group.close()


def quiet_run(recipe: Recipe, count: int, shared: Path) -> Finished:
    members = list(range(count))
    with running(count, recipe, "quiet", shared) as group:
        group.send(members, generation=0, fresh=True)
        return finish(group, members)


@contextlib.contextmanager
def shared_memory() -> Iterator[Path]:
    """A test's own folder in this machine's shared memory."""
    folder = Path("/dev/shm") / f"recua-test-{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)
