"""One rank of pretraining that outlives the loss of others: the loop that all ranks run in step.

Who waits for whom: the training thread waits for the controller's word (`join`), and then for its peers in collectives.
The actor's methods only leave words and return at once, except `abort`, which wakes the training thread wherever it
waits. What comes of it all is in the beacon, for whoever leads the group then. Where tests break it is said in
`actors.pretrain_points`.
"""

import json
import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
import torch.nn.functional as F

from actors.burning_in import BurningIn
from actors.config import PretrainSettings
from actors.pretrain_points import FaultPoints
from actors.proving import Prover
from actors.rank_time import Aborted, RankTime
from cluster.beacons import SUFFIX, BeaconWriter
from cluster.host_memory import BEACONS, end_when_unwatched, group_folder, node_root
from cluster.own_time import OwnTime
from cluster.stopwatch import Stopwatch
from cluster.wire_speed import SinkAddress
from data.config import BatchSettings
from data.loader import DataLoader
from data.mixture import SampleIds
from data.tokenized import TokenWindows, document_segments
from engines.base import Batch, LossFn
from engines.config import SnapshotSettings
from engines.elastic import ElasticLearner, Recipe
from engines.process_groups import Rendezvous, StoreAddress
from engines.ranks import Ranks
from engines.snapshots import Peer, StoreSource
from engines.torch_learner import LlamaConfig, TorchLearner
from infra.errors import NodeLost, RecuaError, ResourceError, StepError
from infra.storage import open_store

log = logging.getLogger(__name__)

NO_TARGET = -100
REFUSED = "refused.jsonl"
"""In the state folder: which copies of snapshots were not taken, and why."""
SAMPLE_TOKENS = 512
"""As long as a sample needs to be to find a rank that computes wrongly."""


@dataclass(frozen=True)
class PretrainJob:
    """What every rank is told at its birth; see `actors.pretrain.pretrain`."""

    tokens_dir: Path
    tokenizer_dir: Path
    model: LlamaConfig
    settings: PretrainSettings
    out: Path
    state: Path
    seed: int
    faults: str = ""

    @property
    def snapshot_store(self) -> str:
        """URL of the store that snapshots are flushed to."""
        return self.settings.snapshot_store or str(self.state)


@dataclass(frozen=True)
class ReplicaPlace:
    """A replica server of another node."""

    host: str
    port: int
    token: str


@dataclass(frozen=True)
class Order:
    """A place in the next generation. `at_most`: load no later step; None: start afresh. `sources`: nodes that may hold
    shards; `holders`: nodes that keep replicas of this rank's. `skipped`: windows of data left out. `high_step`: steps
    below it were computed before. `verified`: the last step whose state is known to be right."""

    generation: int
    rank: int
    world_size: int
    store: StoreAddress
    at_most: int | None
    sources: tuple[ReplicaPlace, ...] = ()
    holders: tuple[ReplicaPlace, ...] = ()
    skipped: tuple[int, ...] = ()
    high_step: int = 0
    verified: int = 0


class PretrainRank:
    """The actor class; `cluster.fleet.Fleet` makes one per rank.

    Args:
        name: of this worker. group: names its shards in shared memory.
        ordered_at: seconds since the epoch; Ray may have kept the process for a while before.
        store: where ranks meet, as long as the controller that started this worker leads.
    """

    def __init__(self, name: str, group: str, ordered_at: float, job: PretrainJob, store: StoreAddress) -> None:
        self.name, self.group, self.job = name, group, job
        settings = job.settings
        self.node = ray.get_runtime_context().get_node_id()
        if not job.state.exists():
            what = f"node {self.node[:12]} does not see {job.state}"
            raise ResourceError(f"{what}: ranks on several nodes need a --store in a folder that all nodes share")
        self.shared = node_root(self.node)
        born = time.monotonic() - (time.time() - max(ordered_at, psutil.Process().create_time()))
        folder = group_folder(self.node, group)
        self.beacon = BeaconWriter(folder / BEACONS / f"{name}{SUFFIX}")
        end_when_unwatched(folder, settings.elastic.orphan_s)
        self.fetched = folder / "fetched"
        self.ledger = RankTime(Stopwatch(born=born, memory=self.beacon.account))
        self.ledger.enter("init")
        self.points = FaultPoints(job.faults, job.state / "faults")
        self._store = store
        self._words: queue.SimpleQueue[Order | Aborted | None] = queue.SimpleQueue()
        self._stop_generation = -1
        self._failure: Exception | None = None
        torch.set_num_threads(settings.threads)
        self._snapshot_store = open_store(job.snapshot_store)
        self.elastic = ElasticLearner(
            _recipe(job),
            group,
            Rendezvous(store),
            device=torch.device("cuda", 0) if settings.num_gpus > 0 else torch.device("cpu"),
            shared=self.shared,
            store=self._snapshot_store,
            reach=self.points.reach,
        )
        self.burning_in = BurningIn(self.beacon, self.elastic.device)
        threading.Thread(target=self._live, name="training", daemon=True).start()

    # ---- words of the controller

    def describe(self) -> tuple[int, str]:
        """(pid, node id): the process answers."""
        return os.getpid(), self.node

    def join(self, order: Order | None) -> None:
        """Take a place in a new generation, as soon as the last one is left. None: it has none for this rank."""
        self._words.put(order)

    def abort(self, generation: int, deadline_s: float, fault_age_s: float = 0.0) -> None:
        """Out of the collectives of this generation and of any older one; what is wrong with it is so old."""
        now = time.monotonic()
        self._words.put(Aborted(generation, now, now - fault_age_s))
        self.elastic.abort(generation, deadline_s)

    def stop_at_boundary(self, generation: int) -> None:
        """Ask the others to stop after the same step; see `Ranks.should_commit`."""
        self._stop_generation = max(self._stop_generation, generation)

    def burn_in(self, again: bool, peer: SinkAddress | None) -> None:
        """Measure this machine again, and the way to another node."""
        self.burning_in.run(again, peer)

    def failure(self) -> Exception | None:
        """What this rank raised by itself."""
        return self._failure

    # ---- the training thread

    def _live(self) -> None:
        self.beacon.set(thread=threading.get_native_id())
        try:
            self.elastic.warm_up()
            self._meet()
            self.burning_in.run(again=True, peer=None)
            self.beacon.set(state="standby")
            self.ledger.enter("idle")
            while True:
                word = self._words.get()
                if word is None:
                    self.ledger.enter("idle")
                elif isinstance(word, Aborted):
                    self.ledger.heard(word)
                else:
                    self._serve(word)
        except Exception as error:
            self._fail(error)

    def _meet(self) -> None:
        """Connect to where ranks meet, which can take seconds. The controller may be gone by now: the order that comes
        from the next one says where its own is."""
        try:
            self.elastic.rendezvous.store()
        except RuntimeError as error:
            log.warning("worker %s: %s", self.name, error)

    def _serve(self, order: Order) -> None:
        """One generation, from its order to its end."""
        try:
            state = self._train(order)
            self.ledger.enter("idle" if state == "finished" else "re_forming")
            self.elastic.leave()
        except Exception as error:
            waits = None if self.elastic.learner is None else self.elastic.learner.ranks.waits
            self.ledger.broken(order.generation, waits)
            groups = self.elastic.groups
            lost = isinstance(error, NodeLost) or (groups is not None and groups.aborted)
            self.elastic.leave()
            if not lost:
                self._fail(error)
                return
            state = "aborted"
        self.beacon.set(state=state, phase="wait")

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, RecuaError):
            text = f"worker {self.name}: {type(error).__name__}: {error}".strip().splitlines()[0]
            error = StepError(text, user_traceback=traceback.format_exc())
        self._failure = error
        self.beacon.set(state="failed", phase="wait")

    def _train(self, order: Order) -> str:
        """(collective) Returns how the generation ended here: "finished" or "boundary"."""
        seat = {"generation": order.generation, "rank": order.rank, "world_size": order.world_size}
        self.beacon.set(state="joining", phase="wait", ticks=0, **seat)
        self.ledger.enter("re_forming")
        self.points.reach("join", order.rank, order.generation)
        learner = self._join(order)
        loader = BatchLoader(self.job, learner.ranks, order.skipped)
        own, own_s = OwnTime(self.job.settings.elastic.straggler_crowding), 0.0
        prover = Prover(self.beacon, self.elastic, self.job.settings.elastic, self.job.settings.steps)
        if learner.last_step:
            self._say(learner, order, loader.tokens(learner.step - 1))
        self.beacon.set(state="joined", start=learner.step, step=learner.step, own_s=own_s)
        steps = self.job.settings.steps
        while learner.step < steps:
            step, started = learner.step, time.perf_counter()
            self.beacon.enter("data")
            self.ledger.enter("data_wait")
            self.points.reach("data", order.rank, step)
            own.begin()
            micro_batches, tokens = loader.micro_batches(step)
            own.fetched()
            self.points.count_step(order.rank, order.generation)
            self.beacon.enter("collective")
            learner.ranks.stop_asked = self._stop_generation >= order.generation
            ask = self.points.in_answer(next_token_loss(tokens, self.beacon.tick), order.rank, order.generation)
            with self.ledger.step(learner.ranks.waits, again=step < order.high_step):
                self.elastic.train_step(micro_batches, self.points.in_loss(ask, order.rank, step, loader.window(step)))
            own_s += own.end() / loader.weight(step)
            rate = round(tokens / (time.perf_counter() - started), 1)
            self._say(learner, order, tokens, tokens_per_s=rate)
            self.beacon.set(step=learner.step, phase="wait", own_s=own_s)
            prover.leave()
            if (replica := prover.wants_replay(learner.step)) is not None:
                self.beacon.enter("collective")
                self.ledger.enter("detection")
                prover.prove(loader.sample(step, replica), ask)
                self.beacon.set(phase="wait")
            if learner.ranks.stop_agreed and learner.step < steps:
                self.ledger.enter("checkpoint_stall")
                self.elastic.take_last()
                prover.leave()
                return "boundary"
            self.points.flip_weight(self.elastic, order.rank, order.generation)
        self._finish(learner, order)
        prover.leave()
        return "finished"

    def _join(self, order: Order) -> TorchLearner:
        if order.store != self._store:
            self._store, self.elastic.rendezvous = order.store, Rendezvous(order.store)
        self.elastic.milestones.verified = order.verified
        joined = self.elastic.join(
            order.generation,
            order.rank,
            order.world_size,
            sources=[Peer(p.host, p.port, p.token, self.group) for p in order.sources],
            stores=[StoreSource(self._snapshot_store, self.group, self.fetched)],
            holders=[
                Peer(p.host, p.port, p.token, self.group, milestones=self.elastic.milestones) for p in order.holders
            ],
            at_most=order.at_most,
            fresh=order.at_most is None,
        )
        if joined.refused:
            self._note_refused(order, joined.refused)
        learner = self.elastic.learner
        assert learner is not None
        learner.ranks.on_vote = self.beacon.tick
        if not self.job.settings.compile:
            for block in learner.module.layers.values():  # type: ignore[union-attr,operator]
                block.register_forward_pre_hook(lambda *_: self.beacon.tick())
        return learner

    def _note_refused(self, order: Order, refused: Sequence[str]) -> None:
        """Copies of shards that were damaged, or could not be reached."""
        note = {"generation": order.generation, "rank": order.rank, "refused": refused, "time": round(time.time(), 3)}
        with (self.job.state / REFUSED).open("a") as file:
            file.write(json.dumps(note) + "\n")

    def _say(self, learner: TorchLearner, order: Order, tokens: int, **more: Any) -> None:
        """Leave the outcome of the last step where the node agent reads it."""
        step = learner.step - 1
        row = {"step": step, "steps": self.job.settings.steps, **learner.last_step, "tokens": tokens, **more}
        self.beacon.say(step, {**row, "time": round(time.time(), 4), "generation": order.generation})

    def _finish(self, learner: TorchLearner, order: Order) -> None:
        """(collective) The last state into storage, the model into its folder."""
        self.beacon.enter("save")
        self.ledger.enter("checkpoint_stall")
        self.points.reach("finish", order.rank, order.generation)
        deadline = time.monotonic() + self.job.settings.elastic.flush_timeout_s

        def moving() -> None:  # for whoever looks for hangs
            if time.monotonic() < deadline:
                self.beacon.tick()

        self.elastic.flush_last(moving)
        self.beacon.tick()
        assert self.elastic.groups is not None
        with self.elastic.groups.naming_lost_peers():
            learner.save_hf(self.job.out)


def _recipe(job: PretrainJob) -> Recipe:
    settings, elastic = job.settings, job.settings.group()
    optimizer = settings.optimizer
    if optimizer.total_steps == 0:
        optimizer = optimizer.model_copy(update={"total_steps": settings.steps})
    snapshots = SnapshotSettings(
        every=elastic.snapshot_every,
        replicas=elastic.snapshot_replicas,
        milestones=elastic.verify_every,
        flush_every=settings.save_every,
        flush_keep=settings.keep_states,
    )
    return Recipe(
        job.model,
        optimizer,
        snapshots,
        tensor_parallel=settings.tensor_parallel,
        pipeline_parallel=settings.pipeline_parallel,
        fsdp=settings.sharding == "fsdp",
        shard_over=settings.shard_over,
        compile_blocks=settings.compile,
        seed=job.seed,
        tokenizer_dir=job.tokenizer_dir,
    )


class BatchLoader:
    """This rank's tensors of any step: a function of the step, the seed, the windows left out, and the replicas."""

    def __init__(self, job: PretrainJob, ranks: Ranks, skipped: tuple[int, ...] = ()) -> None:
        settings = job.settings
        self._windows = TokenWindows(job.tokens_dir, settings.sequence_length)
        batch = BatchSettings(size=settings.batch_size)
        self._loader = DataLoader({"tokens": self._windows}, batch, job.seed, skipped=skipped)
        self._settings, self._ranks = settings, ranks

    def tokens(self, step: int) -> int:
        """Target tokens in the global batch of a step."""
        return self._loader.ids.batch_size(step) * self._settings.sequence_length

    def window(self, step: int) -> int:
        """Of the data order, that a step takes."""
        return self._loader.ids.window(step)

    def weight(self, step: int) -> float:
        """How much more than the average replica this one has to compute in a step: 1 where it is not more."""
        ids, replicas = self._loader.ids, self._ranks.data_size
        first, end = ids.share_range(step, self._ranks.data_rank, replicas)
        return max(1.0, (end - first) * replicas / ids.batch_size(step))

    def micro_batches(self, step: int) -> tuple[list[Batch], int]:
        """(micro-batches, target tokens in the whole global batch).

        Equally many on every rank; one that got no row holds a row without targets, so that all join equal collectives.
        """
        size, ranks = self._settings.micro_batch_size, self._ranks
        pieces = self._loader.ids.micro_batches(step, ranks.data_rank, ranks.data_size, size)
        return [self._tensors(piece) for piece in pieces], self.tokens(step)

    def sample(self, step: int, replica: int) -> Batch:
        """The beginning of the first row of a replica's batch: the same on all of them."""
        first, _ = self._loader.ids.share_range(step, replica, self._ranks.data_size)
        batch = self._tensors(self._loader.ids.batch(step)[first : first + 1])
        return {name: tensor[:, :SAMPLE_TOKENS] for name, tensor in batch.items() if tensor.dim() > 1}

    def _tensors(self, ids: SampleIds) -> Batch:
        piece = self._loader.fetch(ids)
        rows = np.stack(piece or [self._windows[0]])  # [B, T + 1]
        inputs, targets = rows[:, :-1], rows[:, 1:] if piece else np.full_like(rows[:, 1:], NO_TARGET)
        arrays = {"input_ids": inputs, "targets": targets}
        if self._settings.within_documents:
            segments, positions = document_segments(inputs, self._windows.index["end_id"])
            arrays |= {"segment_ids": segments, "position_ids": positions}
        batch = {name: torch.from_numpy(np.ascontiguousarray(a)).to(self._ranks.device) for name, a in arrays.items()}
        return {**batch, "samples": torch.tensor(ids.checksum())}


def next_token_loss(tokens: int, tick: Callable[[], None] | None = None) -> LossFn:
    """Sum of -log p(target) over this micro-batch / target tokens of the global batch, in nats per token.

    `tick` is called where backward begins. The metric "samples" adds up the checksums of the samples' ids.
    """

    def loss_fn(module: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        logits = module(batch["input_ids"], batch.get("position_ids"), batch.get("segment_ids"))  # [B, T, V]
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), batch["targets"].flatten(), ignore_index=NO_TARGET, reduction="sum"
        )
        loss = losses / tokens
        if tick is not None and loss.requires_grad:
            loss.register_hook(lambda gradient: tick())
        samples = {"samples": float(batch["samples"])} if "samples" in batch else {}
        return loss, {"loss": float(loss.detach()), **samples}

    return loss_fn
