"""The ranks that train one torch-native model together, what they decide together, how long they wait for it."""

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from engines.collectives.wait_times import Waits


class Ranks:
    """A device mesh, or one process without torch.distributed. Its dimensions: "dp", or "replicate" and "shard" where
    FSDP shards over some of the replicas only (HSDP); "pp" where there are stages; "tp".

    Ranks with the same `data_rank` hold pieces of the same replica and read the same batch; `data_size` replicas
    divide a batch between them. `stage` of `stages` is the part of the layers that this rank holds.
    """

    def __init__(
        self, mesh: DeviceMesh | None = None, device: torch.device | None = None, data: DeviceMesh | None = None
    ) -> None:
        self.mesh = mesh
        self.device = device or torch.device("cpu")
        self.rank = dist.get_rank() if mesh is not None else 0
        self.world_size = dist.get_world_size() if mesh is not None else 1
        self.data = data or (mesh["dp"] if mesh is not None else None)
        """The ranks that hold the same part of other replicas."""
        self.data_rank = self.data.get_local_rank() if self.data is not None else 0
        self.data_size = self.data.size() if self.data is not None else 1
        staged = mesh is not None and "pp" in (mesh.mesh_dim_names or ())
        self.stage = mesh["pp"].get_local_rank() if mesh is not None and staged else 0
        self.stages = mesh["pp"].size() if mesh is not None and staged else 1
        self.stop_asked = False
        """Set by any thread: this rank wants to stop after the step under way."""
        self.stop_agreed = False
        """Some rank had asked before the last vote: all stop after that step."""
        self.copies_missing = False
        """This rank's last snapshot lacks replicas."""
        self.copies_agreed = False
        """No rank's snapshot lacked any at the last vote."""
        self.totals: dict[str, float] = {}
        """What the last vote added up over the replicas."""
        self.on_vote: Callable[[], None] = lambda: None
        """Called before every vote: from there on this rank waits for the others."""
        self.waits = Waits(self.device, alone=mesh is None)
        """How long this rank waited for the others within steps."""

    @classmethod
    def over_all(
        cls,
        tensor_parallel: int = 1,
        device: torch.device | None = None,
        pipeline_parallel: int = 1,
        shard_over: int = 0,
    ) -> "Ranks":
        """All ranks of the default process group.

        Neighbours share a model-parallel block, the unit of capacity: one replica's stages after each other, and in
        each the ranks that share its matrices. `shard_over` is the number of replicas that FSDP shards over; 0, or a
        number that does not divide the replicas there are, is all of them.
        """
        device = device or torch.device("cpu")
        world_size = dist.get_world_size()
        block = tensor_parallel * pipeline_parallel
        if world_size % block:
            size = f"tensor_parallel {tensor_parallel}"
            size += f" x pipeline_parallel {pipeline_parallel}" if pipeline_parallel > 1 else ""
            raise ValueError(f"{size} does not divide the {world_size} ranks")
        replicas = world_size // block
        sizes = {"dp": replicas}
        if hybrid := 0 < shard_over < replicas and replicas % shard_over == 0:
            sizes = {"replicate": replicas // shard_over, "shard": shard_over}
        if pipeline_parallel > 1:
            sizes["pp"] = pipeline_parallel
        sizes["tp"] = tensor_parallel
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        return cls(mesh, device, mesh["replicate", "shard"]._flatten("dp") if hybrid else None)

    def should_commit(self, grad_norm: float, metrics: Mapping[str, float] | None = None) -> bool:
        """(collective) True on every rank or on none: whether the gradient is finite everywhere.

        The same exchange adds up `metrics` over the replicas (`totals`; every rank passes the same names) and settles
        whether to stop after this step (`stop_agreed`) and whether the snapshot before it has all its replicas
        (`copies_agreed`): a rank that has voted knows all that there is to know of the step.
        """
        self.on_vote()
        finite = math.isfinite(grad_norm)
        values = dict(metrics or {})
        if self.mesh is None:
            self.totals, self.stop_agreed, self.copies_agreed = values, self.stop_asked, not self.copies_missing
            return finite
        counts = self.stage == self.mesh["tp"].get_local_rank() == 0  # the others of its block have the same numbers
        own = [values[name] if counts else 0.0 for name in sorted(values)]
        words = [float(word) for word in (not finite, self.stop_asked, self.copies_missing)]
        vote = torch.tensor([*words, *own], dtype=torch.float64, device=self.device)
        dist.all_reduce(vote)
        broken, stop, missing, *sums = vote.tolist()
        self.totals = dict(zip(sorted(values), sums, strict=True))
        self.stop_agreed, self.copies_agreed = stop > 0, missing == 0
        return bool(broken == 0)

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """(collective) Sum over the replicas; every rank passes the same names."""
        if self.data is None:
            return dict(values)
        total = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.data.get_group())
        return dict(zip(sorted(values), total.tolist(), strict=True))

    def gather(self, value: object) -> list[object]:
        """(collective) Every rank's value, in rank order, on every rank."""
        if self.mesh is None:
            return [value]
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """(collective) Return once every rank has called it."""
        if self.mesh is not None:
            dist.barrier()
