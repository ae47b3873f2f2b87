"""One rank of the learner pool: several named models in one process (policy, reference, critic, reward models).

The caller drives all ranks with the same calls in the same order; every method that trains or gathers is a collective
over the pool. Models are opened by role and closed when the borrower returns the pool.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.pools.micro_batches import Row
from actors.pools.objectives import OBJECTIVES, SCORES
from actors.pools.process_group import process_groups
from cluster.workers.seat import Worker
from engines.base import StepOutput, WeightUpdate
from engines.collectives.process_groups import ProcessGroups
from engines.config import GeneratorSettings, LearnerSettings
from engines.hf_folder import Head


class LearnerWorker(Worker):
    """The actor class of the learner pool; `cluster.workers.group.WorkerGroup` makes one per rank."""

    def __init__(self) -> None:
        self._learners: dict[str, Any] = {}
        self._groups: ProcessGroups | None = None
        self._sender: Any = None

    def open(self, role: str, folder: str, settings: LearnerSettings, head: Head, frozen: bool) -> None:
        """(collective) Build a model from an HF folder: `head` "lm" or "scalar"; `frozen` ones only score."""
        from engines.deepspeed.learner import build

        assert self.seat is not None, "open() before join()"
        self.close([role])
        if self._groups is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
            self._groups = process_groups(self.seat, device or torch.device("cpu"), settings.timeout)
            self._groups.form(lambda: None)
        rank, world_size = self.seat.rank, self.seat.world_size
        self._learners[role] = build(Path(folder), settings, rank=rank, world_size=world_size, head=head, frozen=frozen)

    def train_step(self, role: str, kind: str, micro_batches: list[list[Row]], params: dict[str, Any]) -> StepOutput:
        """(collective) One optimizer step of objective `kind` over this rank's micro-batches of rows."""
        objective = OBJECTIVES[kind]
        batches = [objective.collate(rows) for rows in micro_batches]
        assert self._groups is not None, "train_step() before open()"
        with self._groups.naming_lost_peers():
            return self._learners[role].train_step(batches, objective.loss(params))

    def score(self, role: str, kind: str, micro_batches: list[list[Row]]) -> list[list[np.ndarray]]:
        """(collective under ZeRO-3) What `kind` computes for each row: log-probs, values, or one reward."""
        score = SCORES[kind]
        batches = [score.collate(rows) for rows in micro_batches]
        return self._learners[role].evaluate(batches, score.compute)

    def build_sender(self, engine: GeneratorSettings, receiver_sizes: list[int]) -> list[dict[str, Any]]:
        """Prepare to send on rank 0; returns the data that each generator needs to connect ([] on other ranks)."""
        from engines.weight_transfer import build_sender

        assert self.seat is not None, "build_sender() before join()"
        if self.seat.rank != 0:
            return []
        options: dict[str, Any] = {}
        if engine.weight_backend == "nccl":
            options = {
                "master_address": self.seat.master_address,
                "master_port": self.reserve_port(),
                "receiver_sizes": receiver_sizes,
            }
        self._sender = build_sender(engine.weight_backend, engine.shared_folder, **options)
        return [self._sender.receiver_info(receiver) for receiver in range(len(receiver_sizes))]

    def connect_sender(self) -> None:
        """Connect to the generators, which call `connect` at the same time."""
        if self._sender is not None:
            self.release_port()
            self._sender.connect()

    def publish(self, role: str, version: str) -> WeightUpdate | None:
        """(collective) Publish the current weights for the generators; rank 0 returns the update."""
        tensors = self._learners[role].export()
        if self._sender is not None:
            return self._sender.publish(tensors, version)
        for _ in tensors:  # the other ranks take part in the gathers
            pass
        return None

    def published(self, update: WeightUpdate) -> np.ndarray:
        """The bytes [N] of a file that `publish` left in this node's memory."""
        return np.fromfile(update.location["path"], dtype=np.uint8)

    def wait_published(self) -> None:
        """Wait until the published tensors may change again."""
        if self._sender is not None:
            self._sender.wait()

    def save(self, role: str, folder: str) -> None:
        """(collective) Write an HF folder that plain transformers and vLLM load; rank 0 writes."""
        self._learners[role].save_hf(Path(folder))

    def close(self, roles: list[str] | None = None) -> None:
        """Free the named models, or all of them."""
        for role in list(self._learners) if roles is None else roles:
            learner = self._learners.pop(role, None)
            if learner is not None:
                learner.close()
        if roles is None and self._sender is not None:
            self._sender.close()
            self._sender = None
