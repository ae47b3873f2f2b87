"""One rank of a torch-native model in training that survives the loss of others, in one process.

Who waits for whom: the training thread calls `join` and `train_step`, and waits there for its peers. A control thread
(the actor's) may call `abort` at any time; the training thread then gets `NodeLost`, and calls `join` again under the
next generation, with another rank and world size. Nothing is started anew: the groups are formed in-process, the
network is sharded over the new mesh, and its state is read from host memory. Who is in which generation, and where it
finds shards, is decided elsewhere.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engines.base import Batch, LossFn, StepOutput
from engines.collectives.join_signs import JoinSigns
from engines.collectives.process_groups import ProcessGroups, Rendezvous
from engines.collectives.ranks import Ranks
from engines.config import LearnerSettings, SnapshotSettings
from engines.elastic.torch_learner import LlamaConfig, TorchLearner, build
from engines.snapshots import (
    Flusher,
    FolderSource,
    Holder,
    Milestones,
    Reach,
    SnapshotName,
    Snapshots,
    Source,
    Sources,
    forget,
    node_folder,
    unheard,
)
from infra.errors import CheckpointError, NodeLost
from infra.storage import Store
from models.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Recipe:
    """What every generation of a run builds again."""

    model: LlamaConfig
    optimizer: LearnerSettings
    snapshots: SnapshotSettings = field(default_factory=SnapshotSettings)
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    fsdp: bool = True
    shard_over: int = 0
    compile_blocks: bool = False
    seed: int = 0
    tokenizer_dir: Path | None = None
    weights_dir: Path | None = None
    """An HF folder whose weights a fresh start takes instead of the seed's values."""


@dataclass(frozen=True)
class Joined:
    """How a rank came into a generation. `snapshot` is None at the very start; `refused` are copies that were not taken
    and why; times in seconds."""

    step: int
    snapshot: SnapshotName | None
    refused: tuple[str, ...]
    form_s: float
    build_s: float
    load_s: float


FLUSH_LOOK_S = 0.5
TINY = LlamaConfig(dim=8, layers=1, heads=2, kv_heads=1, ffn_dim=8, vocab_size=8, context=8)


class ElasticLearner:
    """See the module's docstring.

    Args:
        run: names the shards; one for all generations.
        rendezvous: over a store that no rank hosts.
        device: of this rank.
        address: of this machine, see `ProcessGroups`.
        shared: this node's memory file system.
        store: where every `snapshots.flush_every`-th step goes too, in the background.
        reach: of "load" (its third argument is the generation: the groups are formed, nothing is read), "snapshot" and
            "flush"; see `engines.snapshots.memory`.
        progress: called between two blocks of the network, forward and backward.
        signs: called within `join`.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: str,
        rendezvous: Rendezvous,
        *,
        device: torch.device | None = None,
        address: str | None = None,
        shared: Path = Path("/dev/shm"),
        store: Store | None = None,
        reach: Reach = unheard,
        progress: Callable[[], None] = lambda: None,
        signs: JoinSigns | None = None,
    ) -> None:
        self._reach, self._progress, self._signs = reach, progress, signs or JoinSigns()
        self.recipe, self.run, self.rendezvous = recipe, run, rendezvous
        self.device = device or torch.device("cpu")
        self.address = address
        self.folder = node_folder(run, shared)
        self.groups: ProcessGroups | None = None
        self.learner: TorchLearner | None = None
        self.snapshots: Snapshots | None = None
        self.flusher: Flusher | None = None
        self._store = store
        self.milestones = Milestones(recipe.snapshots.every, recipe.snapshots.milestones)
        self._older_kept = False
        self._began = 0
        self._aborted = -1

    def warm_up(self) -> None:
        """Pay here, on standby, for what only the first step of a process costs: imports, mostly (0.2 s of CPU, 2 with
        DTensors and torch's compiler, where the recipe needs them)."""
        if self.recipe.pipeline_parallel > 1:
            import engines.elastic.pipeline  # noqa: F401
        shards = self.recipe.fsdp or self.recipe.tensor_parallel > 1
        if shards or self.recipe.compile_blocks:
            from torch import _dynamo  # noqa: F401
        if shards:
            from torch.distributed import checkpoint  # noqa: F401  # DTensors describe their pieces with it

            import models.sharding  # noqa: F401
        if self.recipe.tokenizer_dir is not None:
            load_tokenizer(self.recipe.tokenizer_dir)  # needed at the end, but what is wrong with it is said now
        groups = ProcessGroups(0, 0, 1, dist.HashStore(), device=self.device, address=self.address)
        ranks = groups.form(lambda: Ranks.over_all(1, self.device))
        learner = build(TINY, self.recipe.optimizer, ranks, fsdp=self.recipe.fsdp)
        tokens = torch.zeros(1, TINY.context, dtype=torch.long, device=self.device)
        learner.train_step([{"input_ids": tokens}], lambda module, batch: (module(batch["input_ids"]).sum(), {}))
        learner.close()
        del learner, ranks
        groups.leave()
        gc.freeze()  # what was imported stays; collecting what a lost generation left behind then takes no time

    def join(
        self,
        generation: int,
        rank: int,
        world_size: int,
        *,
        sources: Sequence[Source] = (),
        stores: Sequence[Source] = (),
        holders: Sequence[Holder] = (),
        at_most: int | None = None,
        fresh: bool = False,
    ) -> Joined:
        """(collective) Take a place in a new generation and load the newest snapshot that all its ranks can read.

        Args:
            sources: where shards may be beside this node's memory.
            stores: places that are asked only where memory has neither the state after `at_most` steps nor the one
                before it: they may be slow, or fail.
            holders: who keeps replicas of this rank's shards from here on.
            at_most: ignore snapshots after this step (roll back).
            fresh: start from the recipe's weights (or the seed's values) instead of a snapshot.

        Raises:
            NodeLost: a peer was lost meanwhile, or `abort` was called: join the next generation.
            CheckpointError: no snapshot is whole and intact.
        """
        self.leave()
        optimizer = self.recipe.optimizer
        groups = ProcessGroups(
            generation,
            rank,
            world_size,
            self.rendezvous,
            device=self.device,
            address=self.address,
            timeout_s=optimizer.timeout,
        )
        self.groups = groups
        if generation <= self._aborted:
            raise NodeLost(f"{groups} was aborted before it was formed")
        watch, signs = _Watch(), self._signs
        with groups.naming_lost_peers():
            ranks = groups.form(self._ranks, lambda: signs.stage("form"))
            form_s = watch.lap()
            signs.stage("build")
            learner = build(
                self.recipe.model,
                optimizer,
                ranks,
                fsdp=self.recipe.fsdp,
                compile_blocks=self.recipe.compile_blocks,
                seed=self.recipe.seed if fresh else None,
                weights_dir=self.recipe.weights_dir if fresh else None,
                tokenizer_dir=self.recipe.tokenizer_dir,
                moved=lambda: signs.moved("build"),
            )
            self.learner = learner
            if not self.recipe.compile_blocks:
                self._listen_between_blocks(learner)
            build_s = watch.lap()
            signs.stage("load")
            self._reach("load", rank, generation)
            available = Sources([FolderSource(self.folder), *sources], signs.moved)
            snapshot = None if fresh else self._load(learner, available, stores, at_most)
            load_s = watch.lap()
            signs.stage("build")
        self.snapshots = learner.snapshots = Snapshots(
            self.folder,
            self.run,
            generation,
            rank,
            world_size,
            keep=self.recipe.snapshots.keep,
            every=self.recipe.snapshots.every,
            milestones=self.milestones,
            holders=holders,
            reach=self._reach,
        )
        if self._store is not None and self.recipe.snapshots.flush_every:
            flush_keep = self.recipe.snapshots.flush_keep
            self.flusher = Flusher(self._store, self.run, self.snapshots.reading, keep=flush_keep, reach=self._reach)
        # Under the new mesh and on the new holders, while the next step runs: from its commit on every shard of the
        # step that was loaded has all its copies again. Until then the older generation's are kept.
        learner.take_snapshot(due=True)
        self._older_kept, self._began = True, learner.step
        return Joined(learner.step, snapshot, tuple(available.refused), form_s, build_s, load_s)

    def train_step(self, micro_batches: Sequence[Batch], loss_fn: LossFn) -> StepOutput:
        """(collective) See `engines.base.Learner`. Raises NodeLost where a peer is gone."""
        assert self.learner is not None and self.groups is not None and self.snapshots is not None, "join() first"
        with self.groups.naming_lost_peers():
            output = self.learner.train_step(micro_batches, loss_fn)
        if self._older_kept and self.learner.ranks.copies_agreed:
            # The ranks agreed on a step after a snapshot of this generation was sealed on all of them, with all copies.
            self._older_kept = False
            self._forget_older()
        elif not self._older_kept and self.milestones.has(self.learner.step - 1):
            self._forget_older()
        self._flush()
        return output

    def abort(self, generation: int, deadline_s: float = 5.0) -> bool:
        """Give up `generation`: wake the training thread wherever it waits for others; callable from any thread.

        A later generation is left alone. False: the device did not let go in time, end the process.
        """
        self._aborted = max(self._aborted, generation)
        snapshots, groups = self.snapshots, self.groups
        if groups is None or groups.generation > generation:
            return True
        if snapshots is not None and snapshots.generation <= generation:
            snapshots.cut()
        return groups.abort(deadline_s)

    def leave(self) -> None:
        """Free network and groups. The shards in shared memory stay; what is being flushed is flushed meanwhile."""
        if self.flusher is not None:
            self.flusher.close(wait=False)
            self.flusher = None
        if self.snapshots is not None:
            self.snapshots.cut()
            self.snapshots.close()
            self.snapshots = None
        if self.learner is not None:
            self.learner.close()
            self.learner = None
        if self.groups is not None:
            self.groups.leave()
            self.groups = None

    def take_last(self) -> int:
        """Snapshot the state as it is now, whatever `snapshots.every` says, and wait until it is sealed; its step."""
        assert self.learner is not None and self.snapshots is not None, "join() first"
        self.snapshots.settle()
        if self.snapshots.last is None or self.snapshots.last.step != self.learner.step:
            self.learner.take_snapshot(due=True)
            self.snapshots.settle()
        return self.learner.step

    def flush_last(self, waiting: Callable[[], None] = lambda: None) -> None:
        """The same, and wait until this rank's part is in the store too; `waiting` is called while that takes time."""
        step = self.take_last()
        if self.flusher is None:
            return
        for last in (False, True):
            if last and self.flusher.flushed[-1:] != [step]:
                self.flusher.offer(step)
            while not self.flusher.wait(FLUSH_LOOK_S):
                waiting()

    def _listen_between_blocks(self, learner: TorchLearner) -> None:
        """A rank that computes hears of `abort` there; it does not finish a step that is lost."""

        def after(block: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda _: self._between_blocks())

        for block in learner.module.layers.values():  # type: ignore[union-attr,operator]
            block.register_forward_pre_hook(lambda *_: self._between_blocks())
            block.register_forward_hook(after)

    def _between_blocks(self) -> None:
        self._progress()
        if self.groups is not None and self.groups.aborted:
            raise NodeLost(f"{self.groups} was aborted")

    def _forget_older(self) -> None:
        """Free what earlier generations left on this node, but milestones that are still wanted."""
        assert self.groups is not None and self.snapshots is not None
        folder, generation, until, stay = self.folder, self.groups.generation, self._began, self.milestones
        self.snapshots.soon(lambda: forget(folder, before=generation, milestones=stay, until=until))

    def _ranks(self) -> Ranks:
        recipe = self.recipe
        return Ranks.over_all(recipe.tensor_parallel, self.device, recipe.pipeline_parallel, recipe.shard_over)

    def _flush(self) -> None:
        """Send what was sealed before the last commit on to the store, where it is one of those to send."""
        if self.flusher is None or self.learner is None:
            return
        sealed, snapshots = self.learner.step - 1, self.recipe.snapshots
        if sealed % snapshots.flush_every == 0 and sealed % snapshots.every == 0:
            self.flusher.offer(sealed)

    def _load(
        self, learner: TorchLearner, sources: Sources, stores: Sequence[Source], at_most: int | None
    ) -> SnapshotName:
        """(collective) The best snapshot that every rank can read, read by every rank."""
        problems: list[str] = []
        if at_most is not None and stores:
            recent = range(at_most - self.recipe.snapshots.every, at_most + 1)
            if (snapshot := self._load_one(learner, sources, lambda step: step in recent, problems)) is not None:
                return snapshot
        sources.add(stores)
        found = self._load_one(learner, sources, lambda step: at_most is None or step <= at_most, problems)
        if found is None:
            why = "; ".join(problems) or "none is whole"
            raise CheckpointError(f"run {self.run}: no snapshot to resume from; {why}")
        return found

    def _load_one(
        self, learner: TorchLearner, sources: Sources, wanted: Callable[[int], bool], problems: list[str]
    ) -> SnapshotName | None:
        """(collective) The same of the steps that are `wanted`; why one was not taken is added to `problems`."""
        seen = [name for name in sources.snapshots() if wanted(name.step)]
        common = set.intersection(*(set(names) for names in self._gather(learner, seen)))  # type: ignore[call-overload]
        for snapshot in sorted(common, reverse=True):
            problem = None
            try:
                learner.load_snapshot(sources.reader(snapshot, learner.rank))
            except CheckpointError as error:
                problem = f"rank {learner.rank}, {snapshot}: {error}"
            found = [str(text) for text in self._gather(learner, problem) if text is not None]
            if not found:
                return snapshot
            problems += found
        return None

    def _gather(self, learner: TorchLearner, value: object) -> list[object]:
        """(collective) Between two parts of this rank's own work."""
        self._signs.stage("wait")
        values = learner.ranks.gather(value)
        self._signs.stage("load")
        return values


class _Watch:
    """A stopwatch with laps, in seconds."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        lap, self._last = now - self._last, now
        return lap
