"""The data that ranks of a pretraining get: the job at their start, an order for every generation."""

from dataclasses import dataclass, replace
from pathlib import Path

from actors.pretrain.agent import ReplicaPlace
from actors.pretrain.config import PretrainSettings
from actors.pretrain.handover import Folder, local
from engines.collectives.process_groups import StoreAddress
from engines.config import SnapshotSettings
from engines.elastic.learner import Recipe
from engines.elastic.torch_learner import LlamaConfig


@dataclass(frozen=True)
class PretrainJob:
    """A pretraining. Every rank gets it at its start."""

    tokens: Folder
    """Shards written by `data.tokenized`, on a file system that all workers see or `handover.Stored`."""
    tokenizer: Folder
    """Copied beside the model."""
    model: LlamaConfig
    settings: PretrainSettings
    state: str
    """A store, or a folder that all workers see: the group's journal, the steps' outcomes and, unless
    `settings.snapshot_store` says otherwise, flushed snapshots. The model passes through it."""
    seed: int = 0
    """Seed of initialisation and data order."""
    faults: str | None = None
    """Schedule for the ranks' fault points (tests, demos); None: RECUA_FAULTS of the process that calls `pretrain`."""
    weights: Folder | None = None
    """An HF folder of the same network to start from (another stage's model)."""
    held_out: Folder | None = None
    """Token shards for the held-out loss, see `settings.validate_every`."""
    out: Path | None = None
    """Folder for the model; None: the ranks put it into the state's store (`actors.pretrain.handover`)."""

    def absolute(self) -> "PretrainJob":
        """The same job with absolute paths."""
        weights, held_out = self.weights and _absolute(self.weights), self.held_out and _absolute(self.held_out)
        tokens, tokenizer = _absolute(self.tokens), _absolute(self.tokenizer)
        return replace(self, tokens=tokens, tokenizer=tokenizer, weights=weights, held_out=held_out)

    def here(self) -> "PretrainJob":
        """The same job with all inputs on this node."""
        weights, held_out = self.weights and local(self.weights), self.held_out and local(self.held_out)
        return replace(
            self, tokens=local(self.tokens), tokenizer=local(self.tokenizer), weights=weights, held_out=held_out
        )

    @property
    def snapshot_store(self) -> str:
        """URL of the store that snapshots are flushed to."""
        return self.settings.snapshot_store or self.state


@dataclass(frozen=True)
class Order:
    """A place in the next generation. `at_most`: latest step to load; None: start afresh. `sources`: nodes that may
    hold shards; `holders`: nodes that keep replicas of this rank's. `skipped`: data windows left out. `high_step`:
    steps below it were computed before. `verified`: the last step with a verified state."""

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


def _absolute(folder: Folder) -> Folder:
    return folder.resolve() if isinstance(folder, Path) else folder


def recipe_of(job: PretrainJob) -> Recipe:
    """The recipe by which every generation builds the learner."""
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
        tokenizer_dir=local(job.tokenizer),
        weights_dir=None if job.weights is None else local(job.weights),
    )
