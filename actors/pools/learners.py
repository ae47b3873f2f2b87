"""A borrowed learner pool for its caller: a whole batch in, one result out.

Who waits for whom: the caller waits for all ranks; a rank waits for the others inside collectives. The first rank that
fails ends the call at once: a rank blocked on a dead peer would otherwise delay it until gloo's own timeout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.pools.config import LearnerPoolSettings
from actors.pools.micro_batches import Row, plan_micro_batches
from cluster.workers.gather import gather
from engines.base import WeightUpdate
from engines.config import GeneratorSettings, LearnerSettings

RANK = "learner rank"


@dataclass(frozen=True)
class Learners:
    """All ranks of the pool, called in lock-step."""

    workers: Sequence[Any]
    settings: LearnerPoolSettings

    def open(self, role: str, folder: Path, optimizer: LearnerSettings | None = None, head: str = "lm") -> None:
        """Build `folder` on every rank under the name `role`; without an optimizer the model only scores."""
        settings = (optimizer or LearnerSettings()).model_copy(
            update={"zero_stage": self.settings.zero_stage, "threads": self.settings.threads}
        )
        self._all("open", role, str(folder), settings, head, optimizer is None)

    def train_step(self, role: str, kind: str, rows: Sequence[Row], params: dict[str, Any]) -> dict[str, float]:
        """One optimizer step over the whole batch `rows`; metric sums over all ranks, plus grad_norm, lr, committed."""
        outputs = gather(
            [
                worker.train_step.remote(role, kind, _rows(rows, share), params)
                for worker, share in zip(self.workers, self._plan(rows), strict=True)
            ],
            RANK,
        )
        metrics: dict[str, float] = {}
        for output in outputs:
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value
        first = outputs[0]
        return {**metrics, "grad_norm": first.grad_norm, "lr": first.learning_rate, "committed": float(first.committed)}

    def score(self, role: str, kind: str, rows: Sequence[Row]) -> list[np.ndarray]:
        """What `kind` computes for each row, in the order of `rows`."""
        plan = self._plan(rows)
        outputs = gather(
            [
                worker.score.remote(role, kind, _rows(rows, share))
                for worker, share in zip(self.workers, plan, strict=True)
            ],
            RANK,
        )
        results: list[np.ndarray | None] = [None] * len(rows)
        for share, output in zip(plan, outputs, strict=True):
            for micro, values in zip(share, output, strict=True):
                for index, value in zip(micro, values, strict=False):
                    results[index] = value
        return [result for result in results if result is not None]

    def build_sender(self, engine: GeneratorSettings, receiver_sizes: list[int]) -> list[dict[str, Any]]:
        """See `actors.pools.weight_sync`."""
        return self._all("build_sender", engine, receiver_sizes)[0]

    def connect_sender(self) -> None:
        """See `actors.pools.weight_sync`."""
        self._all("connect_sender")

    def publish(self, role: str, version: str) -> WeightUpdate:
        """Publish the current weights for the generators."""
        return self._all("publish", role, version)[0]

    def published(self, update: WeightUpdate) -> Any:
        """A reference to the bytes of a file that rank 0 published, for generators on other nodes."""
        return self.workers[0].published.remote(update)

    def wait_published(self) -> None:
        """Wait until the published tensors may change again."""
        self._all("wait_published")

    def save(self, role: str, folder: Path) -> None:
        """Write an HF folder."""
        self._all("save", role, str(folder))

    def close(self, roles: list[str] | None = None) -> None:
        """Free the named models, or all."""
        self._all("close", roles)

    def _plan(self, rows: Sequence[Row]) -> list[list[list[int]]]:
        lengths = [row["length"] for row in rows]
        return plan_micro_batches(lengths, len(self.workers), self.settings.micro_batch_tokens)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return gather([getattr(worker, method).remote(*arguments) for worker in self.workers], RANK)


def _rows(rows: Sequence[Row], share: list[list[int]]) -> list[list[Row]]:
    """One rank's micro-batches, from the indices in its share."""
    return [[rows[index] for index in micro] for micro in share]
