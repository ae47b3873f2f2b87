"""One vLLM engine in a Ray actor, and the caller's view of several."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from engines.base import Completion, Sampling, WeightUpdate
from engines.config import GeneratorSettings


class GeneratorWorker:
    """A thin shell: the engine is built in the actor's process and lives as long as the actor."""

    def __init__(self, folder: str, settings: GeneratorSettings) -> None:
        from engines.vllm_generator import VllmGenerator

        self._engine = VllmGenerator(Path(folder), settings)

    def ready(self) -> str:
        """The version of the weights it carries; answers once the engine runs."""
        return self._engine.weight_version

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Completion]]:
        """Prompts [P][T] -> completions [P][n]."""
        return self._engine.generate(prompts, sampling)

    def connect(self, info: dict[str, Any]) -> None:
        """Meet the sender (nccl, ipc)."""
        self._engine.connect(info)

    def update_weights(self, update: WeightUpdate) -> str:
        """Apply a learner's published weights; returns the version now carried."""
        self._engine.update_weights(update)
        return self._engine.weight_version

    def load_weights(self, folder: str, version: str) -> str:
        """Apply the weights of a saved folder; returns the version now carried."""
        self._engine.load_weights(Path(folder), version)
        return self._engine.weight_version

    def close(self) -> None:
        """End the engine's own processes."""
        self._engine.close()


@dataclass(frozen=True)
class Generators:
    """A borrowed pool of generators. Every completion is checked to carry the version that was set last."""

    workers: Sequence[Any]

    def load_weights(self, folder: Path, version: str) -> None:
        """All engines carry `folder`'s weights as `version`, caches dropped."""
        carried = ray.get([worker.load_weights.remote(str(folder), version) for worker in self.workers])
        assert set(carried) == {version}, f"asked for {version}, engines carry {carried}"

    def update_weights(self, update: WeightUpdate) -> None:
        """All engines apply a learner's published weights."""
        carried = ray.get([worker.update_weights.remote(update) for worker in self.workers])
        assert set(carried) == {update.version}, f"asked for {update.version}, engines carry {carried}"

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """Prompts [P][T] -> completions [P][n], split over the engines in contiguous shares.

        A prompt's seed goes by its position in `prompts`, never by the engine that serves it.
        """
        share = -(-len(prompts) // len(self.workers))
        references = [
            worker.generate.remote([list(prompt) for prompt in prompts[start : start + share]], _shift(sampling, start))
            for worker, start in zip(self.workers, range(0, len(prompts), share), strict=False)
        ]
        return [completions for reference in references for completions in ray.get(reference)]


def _shift(sampling: Sampling, start: int) -> Sampling:
    if sampling.seed is None or start == 0:
        return sampling
    from dataclasses import replace

    return replace(sampling, seed=sampling.seed + start)
