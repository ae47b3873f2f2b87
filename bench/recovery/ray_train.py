"""Ray Train's controller and its workers: a TorchTrainer with DDP on gloo, on a local Ray.

If a worker is lost, Ray Train restarts all workers from the last reported checkpoint, here one per step. It looks for
dead workers every 0.1 s (default 2 s) and gives up a broken group after 1 s (default 30 s).
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.recovery.job import RANKS

ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
}


def train(settings: dict[str, Any]) -> None:
    """The loop of every worker."""
    import ray.train
    from ray.train.torch import prepare_model

    from bench.recovery.rank import BUCKET_MIB, Rank, load, save

    context = ray.train.get_context()
    rank = Rank(Path(settings["folder"]), context.get_world_rank())
    model = prepare_model(rank.network, parallel_strategy_kwargs={"bucket_cap_mb": BUCKET_MIB})
    optimizer, step = rank.optimizer(model), 0
    last = ray.train.get_checkpoint()
    if last is not None:
        with last.as_directory() as saved:
            step = load(Path(saved) / "state.pt", model, optimizer)
    while True:
        optimizer.zero_grad()
        rank.backward(model, step)
        optimizer.step()
        step += 1
        rank.done(step, context.get_world_size())
        with tempfile.TemporaryDirectory(dir=settings["folder"]) as draft:
            checkpoint = None
            if rank.number == 0:
                save(Path(draft) / "state.pt", model, optimizer, step)
                checkpoint = ray.train.Checkpoint.from_directory(draft)
            ray.train.report({"step": step}, checkpoint=checkpoint)


def main(folder: Path) -> None:
    os.environ.update(ENVIRONMENT)
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(address="local", num_cpus=RANKS, include_dashboard=False, log_to_driver=False)
    try:
        TorchTrainer(
            train,
            train_loop_config={"folder": str(folder)},
            scaling_config=ScalingConfig(num_workers=RANKS, use_gpu=False, resources_per_worker={"CPU": 0.25}),
            run_config=RunConfig(
                name="run",
                storage_path=str(folder / "ray"),
                failure_config=FailureConfig(max_failures=-1),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        ).fit()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
