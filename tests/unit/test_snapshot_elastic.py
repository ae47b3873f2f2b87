"""Ranks that lose others, in real processes: survivors go on in-process, and the loss curve is that of a quiet run."""

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.pretrain_worker import NO_TARGET, next_token_loss
from data.config import BatchSettings
from data.loader import Loader
from data.mixture import Mixture, Source
from engines.config import LearnerSettings, SnapshotSettings
from engines.elastic import ElasticLearner, Joined, Recipe
from engines.process_groups import Rendezvous, StoreAddress, host_store
from engines.ranks import Ranks
from engines.snapshots import SnapshotName, StoreSource, node_folder, sealed
from engines.torch_learner import TorchLearner, build
from infra.errors import NodeLost
from infra.storage import FolderStore
from models.llama import LlamaConfig

ROWS, TOKENS, STEPS = 13, 16, 8
"""Rows of a global batch (no number of ranks divides them), tokens of a row, steps of a run."""
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
    """Without samples it is a row without targets, so that all ranks join equal collectives."""
    rows = torch.stack([row(index) for index in share or [0]])
    return {"input_ids": rows[:, :-1], "targets": rows[:, 1:] if share else torch.full_like(rows[:, 1:], NO_TARGET)}


def quiet_curve(steps: int = STEPS, skipped: Sequence[int] = ()) -> list[float]:
    learner = build(MODEL, SETTINGS, Ranks(), fsdp=False, seed=3)
    learner.data_position = {"skipped": list(skipped)}
    return [take_step(learner, learner.train_step)[0] for _ in range(steps)]


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
    """A window of data that a policy drops, before the first step of this generation."""


def worker(pipe: Connection, recipe: Recipe, run: str, shared: Path, address: StoreAddress) -> None:
    torch.set_num_threads(1)
    elastic = ElasticLearner(recipe, run, Rendezvous(address), shared=shared)
    elastic.warm_up()
    orders: queue.SimpleQueue[Go | None] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(pipe, elastic, orders), daemon=True).start()
    pipe.send(("ready", os.getpid()))
    while (go := orders.get()) is not None:
        try:
            train(pipe, elastic, go)
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


def train(pipe: Connection, elastic: ElasticLearner, go: Go) -> None:
    joined = elastic.join(go.generation, go.rank, go.world_size, fresh=go.fresh, at_most=go.at_most)
    learner = elastic.learner
    assert learner is not None and joined.step == learner.step
    pipe.send(("joined", joined.step, joined))
    if go.skip >= 0:
        learner.data_position = {"skipped": [go.skip]}
    while learner.step < go.until:
        step = learner.step
        if go.rank == go.victim and step == go.at:
            os.kill(os.getpid(), signal.SIGKILL)
        loss, ids = take_step(learner, elastic.train_step)
        pipe.send(("step", step, loss, time.monotonic(), ids))
    elastic.snapshots.settle()
    weights = {name: tensor.clone() for name, tensor in learner.export()}
    pipe.send(("done", weights))


class Group:
    """Worker processes and what they said, driven as a controller would."""

    def __init__(self, count: int, recipe: Recipe, run: str, shared: Path) -> None:
        self.store, address = host_store()
        context = multiprocessing.get_context("fork")
        self.pipes, self.processes = [], []
        for _ in range(count):
            pipe, theirs = context.Pipe()
            process = context.Process(target=worker, args=(theirs, recipe, run, shared, address))
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
            self.pipes[member].send(Go(rank=rank, world_size=len(members), **go))

    def lose(self, members: list[int], victim: int, generation: int) -> tuple[list[Any], float]:
        """Wait for the death, tell the survivors; returns what they and the victim said, and the moment."""
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


@pytest.fixture(autouse=True)
def quick_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers are forked from here, so what all import is imported once; a silent name server costs them 1 s; threads
    that wait for each other in tiny operations cost minutes where the machine is full."""
    importlib.import_module("torch._dynamo")
    monkeypatch.setenv("RES_OPTIONS", "timeout:1 attempts:1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A place in shared memory of this test's own."""
    folder = Path("/dev/shm") / f"recua-test-{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    yield folder
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


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
    """What rank 0 saw, and the samples of all; all end."""
    said = [group.hear_until(member, "done") for member in members]
    done, before = said[0]
    samples = consumed([message for _, messages in said for message in messages])
    joined = next(message[2] for message in before if message[0] == "joined")
    first = next((message[3] for message in before if message[0] == "step"), 0.0)
    return Finished(joined, losses(before), samples, done[1], first)


@contextlib.contextmanager
def running(count: int, recipe: Recipe, run: str, shared: Path) -> Iterator[Group]:
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


@pytest.mark.parametrize(("fsdp", "steps"), [(True, 14), (False, 106)], ids=["sharded", "a hundred steps"])
def test_shrunk_then_grown_it_stays_on_the_quiet_curve(fsdp: bool, steps: int, shared: Path) -> None:
    """4 ranks lose one in a collective, 3 go on, 5 after them; a window that was dropped before stays dropped."""
    skipped, grows_at = 6, steps // 2
    with running(6, Recipe(MODEL, SETTINGS, seed=3, fsdp=fsdp), "run", shared) as group:
        group.send([0, 1, 2, 3], generation=0, fresh=True, victim=1, at=3, skip=skipped, until=steps)
        said, died = group.lose([0, 1, 2, 3], victim=1, generation=0)
        group.send([2, 0, 3], generation=1, until=grows_at)
        shrunk = finish(group, [2, 0, 3])
        group.send([4, 2, 0, 3, 5], generation=2, until=steps)
        grown = finish(group, [4, 2, 0, 3, 5])
    print(f"pause {shrunk.first_step_at - died:.3f} s, {shrunk.joined}")
    assert shrunk.joined.step in (2, 3), "more than one committed step was lost"
    assert shrunk.joined.snapshot == SnapshotName(0, shrunk.joined.step)
    assert grown.joined.snapshot == SnapshotName(1, grows_at)
    curve = {**losses(said), **shrunk.losses, **grown.losses}
    assert sorted(curve) == list(range(steps))
    assert [curve[step] for step in range(steps)] == pytest.approx(quiet_curve(steps, [skipped]), rel=1e-4)
    samples = {**consumed(said), **shrunk.consumed, **grown.consumed}
    assert samples == {step: sorted(index for _, _, index in loader([skipped]).batch(step).tuples()) for step in curve}
    assert samples[skipped] != sorted(index for _, _, index in loader().batch(skipped).tuples())
    assert not [name for name in sealed(node_folder("run", shared)) if name.generation < 2], "old shards stay"


@pytest.mark.parametrize(
    ("recipe", "victims"),
    [
        (Recipe(MODEL, SETTINGS, seed=3), (2, 0)),
        (Recipe(MODEL, SETTINGS, seed=3, tensor_parallel=2), (3, 0)),
        (Recipe(MODEL, SETTINGS, seed=3, fsdp=False), (0, 1)),
        (Recipe(MODEL, SETTINGS, seed=3, pipeline_parallel=2), (3, 0)),
        (Recipe(MODEL, SETTINGS, seed=3, shard_over=2), (3, 0)),
    ],
    ids=["dp4", "dp2 x tp2", "replicas", "dp2 x pp2", "hsdp 2 x 2"],
)
def test_with_spares_the_curve_is_bitwise_that_of_a_quiet_run(
    recipe: Recipe, victims: tuple[int, int], shared: Path
) -> None:
    """Twice a rank is lost, and its place (in its tensor-parallel block) is taken by a process that was waiting."""
    quiet = quiet_run(recipe, 4, shared)
    members, curve = [0, 1, 2, 3], {}
    with running(6, recipe, "run", shared) as group:
        for generation, victim in enumerate(victims):
            at = 2 + 3 * generation
            group.send(members, generation=generation, fresh=generation == 0, victim=victim, at=at)
            said, _ = group.lose(members, members[victim], generation)
            curve |= losses(said)
            members = [*members]
            members[victim] = 4 + generation
        group.send(members, generation=2)
        last = finish(group, members)
    curve |= last.losses
    assert last.joined.snapshot is not None and last.joined.snapshot.generation == 1 and last.joined.step >= 4
    assert curve == quiet.losses
    assert all(torch.equal(last.weights[name], tensor) for name, tensor in quiet.weights.items())


def test_a_tensor_parallel_block_short_of_a_rank_is_left_out(shared: Path) -> None:
    """dp2 x tp2 loses a rank without a spare: the other block goes on alone."""
    recipe = Recipe(MODEL, SETTINGS, seed=3, tensor_parallel=2)
    with running(4, recipe, "run", shared) as group:
        group.send([0, 1, 2, 3], generation=0, fresh=True, victim=1, at=4)
        said, _ = group.lose([0, 1, 2, 3], victim=1, generation=0)
        group.send([2, 3], generation=1)
        after = finish(group, [2, 3])
    expected = quiet_curve()
    assert {**losses(said), **after.losses} == pytest.approx(dict(enumerate(expected)), rel=1e-4)


def test_a_fault_during_recovery_and_two_at_once(shared: Path) -> None:
    """The second rank dies while generation 1 is formed, which is given up; then two more die together."""
    with running(6, Recipe(MODEL, SETTINGS, seed=3), "run", shared) as group:
        group.send([0, 1, 2, 3, 4, 5], generation=0, fresh=True, victim=5, at=2, until=STEPS)
        group.lose([0, 1, 2, 3, 4, 5], victim=5, generation=0)
        os.kill(group.processes[4].pid, signal.SIGSTOP)  # it will not come
        group.send([0, 1, 2, 3, 4], generation=1)
        group.processes[4].kill()
        group.lose([0, 1, 2, 3, 4], victim=4, generation=1)
        group.send([3, 2, 1, 0], generation=2, victim=0, at=5)
        group.lose([3, 2, 1, 0], victim=3, generation=2)
        group.processes[2].kill()
        group.send([0, 1], generation=3)
        after = finish(group, [0, 1])
    assert after.joined.step in (4, 5)
    assert after.losses == pytest.approx(dict(list(enumerate(quiet_curve()))[after.joined.step :]), rel=1e-4)


def test_a_damaged_newest_snapshot_gives_way_to_the_one_before(shared: Path) -> None:
    recipe = Recipe(MODEL, SETTINGS, seed=3)
    with running(2, recipe, "run", shared) as group:
        group.send([0, 1], generation=0, fresh=True, until=5)
        finish(group, [0, 1])
        folder = node_folder("run", shared)
        assert [name.step for name in sealed(folder)][-2:] == [5, 5]
        newest = folder / str(sealed(folder)[-1])
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
        group.send([1, 0], generation=1)
        after = finish(group, [1, 0])
        assert after.joined.step == 4
        assert after.losses == pytest.approx(dict(list(enumerate(quiet_curve()))[4:]), rel=1e-4)
        group.send([0, 1], generation=2, at_most=STEPS - 1, until=STEPS)  # roll back on demand
        assert finish(group, [0, 1]).joined.step == STEPS - 1


def test_when_all_memory_is_lost_it_goes_on_from_the_store(shared: Path, tmp_path: Path) -> None:
    store, settings = FolderStore(tmp_path / "store"), SnapshotSettings(flush_every=2)
    host, address = host_store()
    recipe = Recipe(MODEL, SETTINGS, settings, fsdp=False, seed=3)
    first = ElasticLearner(recipe, "run", Rendezvous(address), shared=shared / "first", store=store)
    first.join(0, 0, 1, fresh=True)
    for _ in range(6):
        assert first.learner is not None and first.flusher is not None
        take_step(first.learner, first.train_step)
        assert first.flusher.wait(DEADLINE)
    assert first.flusher.flushed == [0, 2, 4] and not first.flusher.problems
    first.leave()
    second = ElasticLearner(recipe, "run", Rendezvous(address), shared=shared / "second", store=store)
    joined = second.join(1, 0, 1, sources=[StoreSource(store, "run", tmp_path / "scratch")])
    assert joined.snapshot == SnapshotName(0, 4) and second.learner is not None
    curve = [take_step(second.learner, second.train_step)[0] for _ in range(STEPS - 4)]
    second.leave()
    assert curve == quiet_curve()[4:]
    del host
