"""A rank under torchrun: DDP on gloo, the whole state saved after every step by rank 0, restored after every restart.

If a worker is lost, torchrun ends and restarts all workers. It checks every 0.1 s, the shortest documented interval.
"""

import sys
from pathlib import Path

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bench.recovery.rank import BUCKET_MIB, Rank, load, save


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = Rank(folder, dist.get_rank())
    model = DistributedDataParallel(rank.network, bucket_cap_mb=BUCKET_MIB)
    optimizer = rank.optimizer(model)
    step = load(folder / "state.pt", model, optimizer)
    while True:
        optimizer.zero_grad()
        rank.backward(model, step)
        optimizer.step()
        step += 1
        rank.done(step, dist.get_world_size())
        if rank.number == 0:
            save(folder / "state.pt", model, optimizer, step)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
