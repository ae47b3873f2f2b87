"""How the network is sharded: pipeline stages, tensor parallelism, activation checkpointing, compilation, FSDP2.

In this order.

Manner after torchtitan's llama3 parallelize (pytorch/torchtitan, `models/llama3`). Works on gloo/CPU and on NCCL.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from models.llama import Block, Llama, LlamaConfig, initial_tensor, whole_name


def parallelize(
    *,
    model: Llama,
    mesh: DeviceMesh | None,
    fsdp: bool = True,
    activation_checkpointing: bool = False,
    compile_blocks: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Llama:
    """Shard `model` in place over a mesh with the dimensions "dp" and "tp"; returns it.

    With a dimension "pp" the model becomes this rank's stage (see `cut`), which takes, or returns, hidden states. With
    "replicate" and "shard" in place of "dp", FSDP shards over the second and keeps copies over the first (HSDP).

    The model may be on the meta device; call `materialize` afterwards then. Every rank holds the same full weights
    otherwise. With tp > 1 the sequence length must divide by tp: between the matrices activations are split over the
    sequence (sequence parallelism, Korthikanti et al. 2022).

    Args:
        mesh: None for one process.
        fsdp: shard parameters, gradients and optimizer states over "dp" (ZeRO-3), one group per block. Backward then
            *sums* gradients over "dp" (FSDP2's default is the mean). False keeps whole replicas: sum them yourself.
        activation_checkpointing: keep only each block's input; recompute the rest in backward.
        compile_blocks: torch.compile each block; equal blocks share one compilation.
        dtype: of activations and gathered weights under FSDP; the sharded weights, gradients and reductions stay fp32.

    Raises:
        ValueError: there are more stages than layers; tp does not divide the heads, the key/value heads or the
            feed-forward width; a dtype below fp32 without FSDP.
    """
    if dtype != torch.float32 and not (fsdp and mesh is not None):
        raise ValueError(f"dtype {dtype} needs fsdp: replicated weights are kept and used in float32")
    names = (mesh.mesh_dim_names or ()) if mesh is not None else ()
    if mesh is not None and "pp" in names:
        cut(model, mesh["pp"].get_local_rank(), mesh["pp"].size())
    if mesh is not None and mesh["tp"].size() > 1:
        _split_tensors(model, mesh["tp"])
    blocks = [block for block in model.layers.values() if isinstance(block, Block)]
    for block in blocks:
        if activation_checkpointing:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        if compile_blocks:
            block.compile()
    if fsdp and mesh is not None:
        _shard_replicas(model, blocks, mesh["replicate", "shard"] if "replicate" in names else mesh["dp"], dtype)
    return model


def cut(model: Llama, stage: int, stages: int) -> Llama:
    """Leave of `model`, in place, what one stage holds; returns it. A tied embedding is held by both ends."""
    own = stage_layers(model.config, stages)[stage]
    for number in range(model.config.layers):
        if number not in own:
            del model.layers[str(number)]
    if stage > 0:
        model.tok_embeddings = None
    if stage < stages - 1:
        model.norm = model.output = None
    return model


def stage_layers(config: LlamaConfig, stages: int) -> list[range]:
    """The layers of every stage. Embedding and output count as one layer each, as in Llama 3 (2024, section 3.3.2).

    What is left over goes to the first stage, then to the last, then to those between.
    """
    if stages > config.layers:
        raise ValueError(f"pipeline_parallel {stages} exceeds the network's {config.layers} layers")
    share, left = divmod(config.layers + 2, stages)
    favoured = [0, stages - 1, *range(1, stages - 1)][:left]
    starts, start = [], 0
    for stage in range(stages):
        starts.append(start)
        start += share + (stage in favoured) - (stage == 0) - (stage == stages - 1)
    return [range(*ends) for ends in zip(starts, [*starts[1:], config.layers], strict=True)]


def stage_of(config: LlamaConfig, name: str, stages: int) -> int:
    """The stage that holds a parameter of the whole network; of a tied embedding, the first."""
    if not name.startswith("layers."):
        return 0 if name.startswith("tok_embeddings.") else stages - 1
    number = int(name.split(".")[1])
    return next(stage for stage, own in enumerate(stage_layers(config, stages)) if number in own)


def materialize(model: Llama, device: torch.device, seed: int, moved: Callable[[], None] = lambda: None) -> Llama:
    """Give a (sharded) model on the meta device memory and its start values; returns it.

    The values are those of `Llama.init_weights(seed)` whatever the mesh, without communication; one full parameter at a
    time is in memory. `moved` is called before each.
    """
    model.to_empty(device=device)
    model.tie()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            moved()
            start = initial_tensor(model.config, whole_name(model.config, name), tuple(parameter.shape), seed)
            parameter.copy_(_placed(start, parameter))
    return model


def fill(model: Llama, tensors: Iterable[tuple[str, Tensor]], moved: Callable[[], None] = lambda: None) -> None:
    """Copy whole tensors, by the whole network's names, into this rank's part of a (sharded) model, one at a time. What
    this rank's stage does not hold is passed over. `moved` is called with every one."""
    own: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        own.setdefault(whole_name(model.config, name), []).append(parameter)
    with torch.no_grad():
        for name, tensor in tensors:
            moved()
            for parameter in own.get(name, ()):
                parameter.copy_(_placed(tensor, parameter))


def _placed(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that every rank has."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device_mesh.device_type)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _split_tensors(model: Llama, mesh: DeviceMesh) -> None:
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


def _shard_replicas(model: Llama, blocks: list[Block], mesh: DeviceMesh, dtype: torch.dtype) -> None:
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
