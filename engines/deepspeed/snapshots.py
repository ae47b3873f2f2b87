"""What a DeepSpeed learner puts into a snapshot, and how it takes one back.

Every stage describes its state in the same way: per parameter the flattened fp32 `weight/NAME`, `exp_avg/NAME` and
`exp_avg_sq/NAME`, of which a rank holds one range each (all of it at stage 0). So a snapshot resumes under any stage
and any number of ranks, without a collective. Pieces are live memory: they may be read while forward and backward run.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from engines.deepspeed.zero import MOMENTS, ZeroModel
from engines.snapshots import Piece, SnapshotReader, restore


def pieces(model: ZeroModel) -> list[Piece]:
    """This rank's part of the training state.

    Raises:
        ValueError: stage 0 in half precision, where DeepSpeed keeps the fp32 weights out of reach.
    """
    model.make_moments()
    if model.stage == 0:
        return list(_whole(model))
    return list(_of_stage_3(model) if model.stage == 3 else _of_flat_groups(model))


def load(model: ZeroModel, reader: SnapshotReader) -> dict[str, Any]:
    """Write a snapshot's weights and moments into `model`; the progress that the learner kept with them."""
    restore([*pieces(model), *_working_weights(model)], reader)
    progress = reader.progress(model.rank)
    model.set_adam_step(int(progress["step"]))
    return progress


def _whole(model: ZeroModel) -> Iterator[Piece]:
    """Stage 0: every rank has everything."""
    state = model.plain_state()
    if state is None:
        raise ValueError("snapshots of a half-precision model need learner.zero_stage 1, 2 or 3")
    for name, parameter in model.module.named_parameters():
        yield _range(f"weight/{name}", parameter.detach().view(-1), parameter.numel(), 0)
        for kind in MOMENTS:
            yield _range(f"{kind}/{name}", state[parameter][kind].view(-1), parameter.numel(), 0)


def _of_flat_groups(model: ZeroModel) -> Iterator[Piece]:
    """Stages 1 and 2: parameters lie one after the other in a flat group, of which every rank has an equal part."""
    optimizer = model.optimizer
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    for index, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        first = flat.numel() * dist.get_rank(group=optimizer.real_dp_process_group[index])
        state = model.adam().state[flat]
        tensors = {"weight": flat.detach(), **{kind: state[kind] for kind in MOMENTS}}
        group, offsets = optimizer.round_robin_bit16_groups[index], optimizer.round_robin_bit16_offsets[index]
        for parameter, offset in zip(group, offsets, strict=True):
            start, stop = max(offset, first), min(offset + parameter.numel(), first + flat.numel())
            if start < stop:
                name = names[id(parameter)]
                for kind, tensor in tensors.items():
                    part = tensor[start - first : stop - first]
                    yield _range(f"{kind}/{name}", part, parameter.numel(), start - offset)


def _of_stage_3(model: ZeroModel) -> Iterator[Piece]:
    """Every parameter is cut into equal flat parts, the last ones padded."""
    optimizer = model.optimizer
    for name, parameter in model.module.named_parameters():
        for kind, key in (("weight", None), *((kind, kind) for kind in MOMENTS)):
            part = optimizer._get_fp32_opt_state_partition(parameter, False, optim_state_key=key)[0]
            yield from _unpadded(f"{kind}/{name}", part, parameter, model.rank)


def _working_weights(model: ZeroModel) -> Iterator[Piece]:
    """The weights that forward and backward read, where they are not those of the state."""
    if model.stage == 0:
        return
    for name, parameter in model.module.named_parameters():
        if model.stage == 3:
            yield from _unpadded(f"weight/{name}", parameter.ds_tensor, parameter, model.rank)
        else:
            yield _range(f"weight/{name}", parameter.detach().view(-1), parameter.numel(), 0)


def _unpadded(name: str, part: torch.Tensor, parameter: Any, rank: int) -> Iterator[Piece]:
    offset = part.numel() * rank
    count = min(part.numel(), parameter.ds_numel - offset)
    if count > 0:
        yield _range(name, part.detach().view(-1)[:count], parameter.ds_numel, offset)


def _range(name: str, part: torch.Tensor, whole: int, offset: int) -> Piece:
    return Piece(name, part, (whole,), (offset,))
