"""One vLLM engine in a Ray actor, and the caller's view of several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import ray

from cluster.workers.gather import gather
from engines.base import Completion, Sampling, WeightUpdate
from engines.config import GeneratorSettings
from infra.telemetry import hide_secrets_in_logs

ENGINE = "generator"


class GeneratorWorker:
    """The actor: its engine is built in its process and lives as long as it does."""

    def __init__(self, folder: str, settings: GeneratorSettings) -> None:
        hide_secrets_in_logs()
        from engines.vllm.generator import VllmGenerator

        self._engine = VllmGenerator(Path(folder), settings, address=ray.util.get_node_ip_address())

    def ready(self) -> str:
        """The version of its weights; returns once the engine runs."""
        return self._engine.weight_version

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """Prompts [P][T] -> completions [P][n]."""
        return self._engine.generate(prompts, sampling)

    def connect(self, info: dict[str, Any]) -> None:
        """Connect to the sender (nccl, ipc)."""
        self._engine.connect(info)

    def sees(self, update: WeightUpdate) -> bool:
        """Whether this node can read published weights: a file in shared memory is on one node only."""
        path = update.location.get("path")
        return path is None or Path(path).exists()

    def update_weights(self, update: WeightUpdate, content: np.ndarray | None = None) -> str:
        """Apply a learner's published weights; returns their version. `content`: the bytes [N] of a file that was
        published on another node."""
        if content is None:
            self._engine.update_weights(update)
        else:
            from engines.weight_transfer import brought_here

            with brought_here(update, content) as here:
                self._engine.update_weights(here)
        return self._engine.weight_version

    def load_weights(self, folder: str, version: str) -> str:
        """Apply the weights of a saved folder; returns their version."""
        self._engine.load_weights(Path(folder), version)
        return self._engine.weight_version

    def close(self) -> None:
        """End the engine's own processes."""
        self._engine.close()


@dataclass(frozen=True)
class Generators:
    """A borrowed pool of generators. Every weight update checks that all engines report the new version."""

    workers: Sequence[Any]

    def load_weights(self, folder: Path, version: str) -> None:
        """Load `folder`'s weights as `version` into all engines, and drop their caches."""
        carried = gather([worker.load_weights.remote(str(folder), version) for worker in self.workers], ENGINE)
        assert set(carried) == {version}, f"asked for {version}, engines carry {carried}"

    def update_weights(self, update: WeightUpdate, content: Callable[[], Any]) -> None:
        """Apply a learner's published weights on all engines; `content()` returns a reference to the published file,
        for engines on other nodes."""
        seen = gather([worker.sees.remote(update) for worker in self.workers], ENGINE)
        there = None if all(seen) else content()
        carried = gather(
            [
                worker.update_weights.remote(update, None if near else there)
                for worker, near in zip(self.workers, seen, strict=True)
            ],
            ENGINE,
        )
        assert set(carried) == {update.version}, f"asked for {update.version}, engines carry {carried}"

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """Prompts [P][T] -> completions [P][n], in order.

        Equal prompts go to one engine. A seeded answer depends on the prompt and on its number among equal prompts, so
        that it is the same for any number of engines.
        """
        shares: list[list[int]] = [[] for _ in self.workers]
        for index, prompt in enumerate(prompts):
            shares[crc32(repr(tuple(prompt)).encode()) % len(shares)].append(index)
        references = [
            worker.generate.remote([list(prompts[index]) for index in share], sampling)
            for worker, share in zip(self.workers, shares, strict=True)
        ]
        completions: dict[int, list[Completion]] = {}
        for share, groups in zip(shares, gather(references, ENGINE), strict=True):
            completions.update(zip(share, groups, strict=True))
        return [completions[index] for index in range(len(prompts))]
