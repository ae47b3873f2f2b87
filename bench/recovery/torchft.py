"""A replica under torchft, or its lighthouse: fault-tolerant DDP on gloo, like torchft's train_ddp.py.

Every rank is a replica group of its own. The survivors agree on a smaller quorum and continue; a restarted rank gets
its state from a live one. The settings below bound all waiting times far below torchft's defaults of seconds to a
minute.
"""

import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

LIGHTHOUSE = {"min_replicas": 1, "join_timeout_ms": 1000, "quorum_tick_ms": 20, "heartbeat_timeout_ms": 1000}
HEARTBEAT = timedelta(milliseconds=50)
COLLECTIVE = timedelta(seconds=5)
"""Timeout of gloo's collectives, as in train_ddp.py."""
EVERYTHING_ELSE = timedelta(seconds=30)
ADDRESS = "lighthouse.txt"


def lighthouse(folder: Path) -> None:
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="[::]:0", **LIGHTHOUSE)
    (folder / "lighthouse.draft").write_text(server.address())
    (folder / "lighthouse.draft").replace(folder / ADDRESS)
    signal.pause()


def replica(folder: Path, number: int) -> None:
    import torch
    from torch.distributed import GradBucket, TCPStore
    from torch.futures import Future
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

    from bench.recovery.rank import BUCKET_MIB, Rank

    class Replicated(DistributedDataParallel):
        """torchft 0.2.0's own hook ends the process if gloo's wait raises (`assert fut._fut`). Here the manager, which
        has recorded that error, skips the step."""

        @staticmethod
        def _comm_hook(state: Manager, bucket: GradBucket) -> Future[torch.Tensor]:
            state.allreduce(bucket.buffer()).wait()
            reduced: Future[torch.Tensor] = Future()
            reduced.set_result(bucket.buffer())
            return reduced

    while not (folder / ADDRESS).exists():
        time.sleep(0.01)
    rank = Rank(folder, number)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def load_state(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    manager = Manager(
        pg=ProcessGroupGloo(timeout=COLLECTIVE),
        load_state_dict=load_state,
        state_dict=state,
        min_replica_size=1,
        timeout=EVERYTHING_ELSE,
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        lighthouse_addr=(folder / ADDRESS).read_text(),
        replica_id=f"replica_{number}",
        heartbeat_interval=HEARTBEAT,
        init_sync=False,  # all replicas start from the same seed
    )
    model = Replicated(manager, rank.network, bucket_cap_mb=BUCKET_MIB)
    optimizer = Optimizer(manager, rank.optimizer(model))
    while True:
        step = manager.current_step()
        optimizer.zero_grad()  # asks for the quorum of this step
        rank.backward(model, step)
        optimizer.step()  # the quorum commits here
        if manager.current_step() > step:
            rank.done(manager.current_step(), manager.num_participants())


def settings() -> dict[str, Any]:
    return {"lighthouse": LIGHTHOUSE, "heartbeat_s": HEARTBEAT.total_seconds(), "gloo_s": COLLECTIVE.total_seconds()}


if __name__ == "__main__":
    if sys.argv[2] == "lighthouse":
        lighthouse(Path(sys.argv[1]))
    else:
        replica(Path(sys.argv[1]), int(sys.argv[2]))
