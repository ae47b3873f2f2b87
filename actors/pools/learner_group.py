"""Starts the learner pool's processes."""

from actors.pools.config import LearnerPoolSettings
from actors.pools.learner_worker import LearnerWorker
from cluster.workers.group import WorkerGroup


def start_learners(pool: LearnerPoolSettings, name: str) -> WorkerGroup:
    """Start one rank per worker, ready to open models. Raises as `WorkerGroup.start`."""
    threads = str(pool.threads)
    return WorkerGroup(
        LearnerWorker,
        pool.workers,
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        env={"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"},
        name=name,
    ).start()
