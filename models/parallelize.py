"""How the network is sharded: pipeline stages, tensor parallelism, activation checkpointing, compilation, FSDP2.

In this order.

Manner after torchtitan's llama3 parallelize (pytorch/torchtitan, `models/llama3`). Works on gloo/CPU and on NCCL.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from models.llama import Block, Llama, LlamaConfig, initial_tensor, whole_name

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

DTENSOR = "torch.distributed.tensor"


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

    If the model is on the meta device, call `materialize` afterwards; otherwise every rank holds the same full weights.
    With tp > 1 the sequence length must divide by tp, because activations between the matrices are split over the
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
        from models.sharding import split_tensors

        split_tensors(model, mesh["tp"])
    blocks = [block for block in model.layers.values() if isinstance(block, Block)]
    for block in blocks:
        if activation_checkpointing:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        if compile_blocks:
            block.compile()
    if fsdp and mesh is not None:
        from models.sharding import shard_replicas

        shard_replicas(model, blocks, mesh["replicate", "shard"] if "replicate" in names else mesh["dp"], dtype)
    return model


def cut(model: Llama, stage: int, stages: int) -> Llama:
    """Reduce `model`, in place, to the part of one stage; returns it. Both ends hold a tied embedding."""
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

    Remaining layers go to the first stage, then to the last, then to those between.
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
    """The stage that holds a parameter of the whole network; for a tied embedding, the first."""
    if not name.startswith("layers."):
        return 0 if name.startswith("tok_embeddings.") else stages - 1
    number = int(name.split(".")[1])
    return next(stage for stage, own in enumerate(stage_layers(config, stages)) if number in own)


def allocate(model: Llama, device: torch.device) -> None:
    """Give a (sharded) model on the meta device memory, with whatever lies in it: `Module.to_empty`, which for plain
    tensors would import sympy, 0.4 s of CPU."""
    if any(map(is_sharded, model.parameters())):
        model.to_empty(device=device)
    else:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                setattr(module, name, nn.Parameter(memory, parameter.requires_grad))
    model.tie()


def materialize(model: Llama, device: torch.device, seed: int, moved: Callable[[], None] = lambda: None) -> Llama:
    """Give a (sharded) model on the meta device its memory and start values; returns it.

    The values are those of `Llama.init_weights(seed)` on every mesh, without communication. One full parameter at a
    time is in memory. `moved` is called before each.
    """
    allocate(model, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            moved()
            start = initial_tensor(model.config, whole_name(model.config, name), tuple(parameter.shape), seed)
            parameter.copy_(_placed(start, parameter))
    return model


def fill(model: Llama, tensors: Iterable[tuple[str, Tensor]], moved: Callable[[], None] = lambda: None) -> None:
    """Copy whole tensors, by the whole network's names, into this rank's part of a (sharded) model, one at a time.
    Tensors of other stages are skipped. `moved` is called for each tensor."""
    own: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        own.setdefault(whole_name(model.config, name), []).append(parameter)
    with torch.no_grad():
        for name, tensor in tensors:
            moved()
            for parameter in own.get(name, ()):
                parameter.copy_(_placed(tensor, parameter))


def is_sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether it is a DTensor. Asked without importing their package, which takes a second of CPU: a process that has
    not imported it has none."""
    package = sys.modules.get(DTENSOR)
    return package is not None and isinstance(tensor, package.DTensor)


def _placed(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that every rank has."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device_mesh.device_type)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
