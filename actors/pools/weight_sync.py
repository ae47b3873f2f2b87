"""Weight transfer from the learner pool to the generator pool, over the engines' backend.

Who waits for whom: `push` returns when every generator has the new version; the learners may then change their tensors.
With nccl both sides must be inside the transfer at the same time, so that all are called before any is waited for.
"""

from dataclasses import dataclass

from actors.pools.generators import ENGINE, Generators
from actors.pools.learners import Learners
from cluster.workers.gather import gather
from engines.config import GeneratorSettings


@dataclass(frozen=True)
class WeightSync:
    """Sends one learner role's weights to all generators."""

    learners: Learners
    generators: Generators
    role: str
    engine: GeneratorSettings

    def connect(self) -> None:
        """Once per borrow, before the first `push`."""
        sizes = [self.engine.tensor_parallel] * len(self.generators.workers)
        infos = self.learners.build_sender(self.engine, sizes)
        if self.engine.weight_backend == "shared_memory":
            return  # the file's path travels with every update
        waiting = [worker.connect.remote(info) for worker, info in zip(self.generators.workers, infos, strict=True)]
        self.learners.connect_sender()
        gather(waiting, ENGINE)

    def push(self, version: str) -> None:
        """Load the learners' current weights as `version` into every generator."""
        update = self.learners.publish(self.role, version)
        self.generators.update_weights(update, lambda: self.learners.published(update))
        self.learners.wait_published()
