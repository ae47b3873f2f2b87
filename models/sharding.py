"""Tensor parallelism and FSDP2 of the network: the part of `models.parallelize` that needs DTensors.

Only a process that shards imports this: DTensors take a second of CPU to import.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from models.llama import Block, Llama


def split_tensors(model: Llama, mesh: DeviceMesh) -> None:
    """Tensor parallelism, in place. Raises ValueError if the mesh does not divide the heads or the width."""
    config, size = model.config, mesh.size()
    for what, count in {"heads": config.heads, "kv_heads": config.kv_heads, "ffn_dim": config.ffn_dim}.items():
        if count % size:
            raise ValueError(f"tensor_parallel {size} does not divide {what} {count}")
    ends: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    present = {name: style for name, style in ends.items() if getattr(model, name) is not None}
    parallelize_module(model, mesh, present)
    for block in model.layers.values():
        parallelize_module(block, mesh, _block_plan())
    model.tie()


def _block_plan() -> dict[str, ParallelStyle]:
    """Split over the sequence outside, over heads and feed-forward width inside."""
    return {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w3": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
    }


def shard_replicas(model: Llama, blocks: list[Block], mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """FSDP2 in place, one group per block; gradients are summed."""
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if not model.config.tied and model.tok_embeddings is not None:
        fully_shard(model.tok_embeddings, mesh=mesh, mp_policy=policy)
    if not model.config.tied and model.norm is not None and model.output is not None:
        fully_shard([model.norm, model.output], mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # tied ends share one tensor, so they stay in one group
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
