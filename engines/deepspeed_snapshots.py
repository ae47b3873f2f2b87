"""What a DeepSpeed learner puts into a snapshot, and how it takes one back.

Every stage describes its state in the same way: per parameter the flattened fp32 `weight/NAME`, `exp_avg/NAME` and
`exp_avg_sq/NAME`, of which a rank holds one range each (all of it at stage 0). So a snapshot goes on under any stage
and any number of ranks, without a collective. Pieces are live memory: they may be read while forward and backward run.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from engines import random_state
from engines.deepspeed_state import MOMENTS, _base, _make_moments, _plain_state, _set_adam_step
from engines.snapshots import Piece, SnapshotReader, restore

if TYPE_CHECKING:
    from engines.deepspeed_learner import DeepSpeedLearner


def pieces(learner: "DeepSpeedLearner") -> list[Piece]:
    """This rank's part of the training state.

    Raises:
        ValueError: stage 0 in half precision, where DeepSpeed keeps the fp32 weights out of reach.
    """
    optimizer = learner._engine.optimizer
    _make_moments(optimizer)
    if learner.settings.zero_stage == 0:
        return list(_whole(learner))
    return list(_of_stage_3(learner) if learner.settings.zero_stage == 3 else _of_flat_groups(learner))


def progress(learner: "DeepSpeedLearner") -> dict[str, Any]:
    return {
        "step": learner.step,
        "data": learner.data_position,
        "random": random_state.capture(learner._device),
    }


def load(learner: "DeepSpeedLearner", reader: SnapshotReader) -> None:
    """Go on from a snapshot; see `DeepSpeedLearner.load_snapshot`."""
    restore([*pieces(learner), *_working_weights(learner)], reader)
    found = reader.progress(learner.rank)
    learner.step, learner.data_position = int(found["step"]), found["data"]
    _set_adam_step(learner._engine.optimizer, learner.step)
    if (found["of_rank"], found["of_world"]) == (learner.rank, learner.world_size):
        random_state.apply(found["random"], learner._device)


def _whole(learner: "DeepSpeedLearner") -> Iterator[Piece]:
    """Stage 0: every rank has everything."""
    state = _plain_state(learner)
    if state is None:
        raise ValueError("snapshots of a half-precision model need learner.zero_stage 1, 2 or 3")
    for name, parameter in learner._model.named_parameters():
        yield _range(f"weight/{name}", parameter.detach().view(-1), parameter.numel(), 0)
        for kind in MOMENTS:
            yield _range(f"{kind}/{name}", state[parameter][kind].view(-1), parameter.numel(), 0)


def _of_flat_groups(learner: "DeepSpeedLearner") -> Iterator[Piece]:
    """Stages 1 and 2: parameters lie one after the other in a flat group, of which every rank has an equal part."""
    optimizer = learner._engine.optimizer
    names = {id(parameter): name for name, parameter in learner._model.named_parameters()}
    for index, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        first = flat.numel() * dist.get_rank(group=optimizer.real_dp_process_group[index])
        state = _base(optimizer).state[flat]
        tensors = {"weight": flat.detach(), **{kind: state[kind] for kind in MOMENTS}}
        group, offsets = optimizer.round_robin_bit16_groups[index], optimizer.round_robin_bit16_offsets[index]
        for parameter, offset in zip(group, offsets, strict=True):
            start, stop = max(offset, first), min(offset + parameter.numel(), first + flat.numel())
            if start < stop:
                name = names[id(parameter)]
                for kind, tensor in tensors.items():
                    part = tensor[start - first : stop - first]
                    yield _range(f"{kind}/{name}", part, parameter.numel(), start - offset)


def _of_stage_3(learner: "DeepSpeedLearner") -> Iterator[Piece]:
    """Every parameter is cut into equal flat parts, the last ones padded."""
    optimizer = learner._engine.optimizer
    for name, parameter in learner._model.named_parameters():
        for kind, key in (("weight", None), *((kind, kind) for kind in MOMENTS)):
            part = optimizer._get_fp32_opt_state_partition(parameter, False, optim_state_key=key)[0]
            yield from _unpadded(f"{kind}/{name}", part, parameter, learner.rank)


def _working_weights(learner: "DeepSpeedLearner") -> Iterator[Piece]:
    """The weights that forward and backward read, where they are not those of the state."""
    if learner.settings.zero_stage == 0:
        return
    for name, parameter in learner._model.named_parameters():
        if learner.settings.zero_stage == 3:
            yield from _unpadded(f"weight/{name}", parameter.ds_tensor, parameter, learner.rank)
        else:
            yield _range(f"weight/{name}", parameter.detach().view(-1), parameter.numel(), 0)


def _unpadded(name: str, part: torch.Tensor, parameter: Any, rank: int) -> Iterator[Piece]:
    offset = part.numel() * rank
    count = min(part.numel(), parameter.ds_numel - offset)
    if count > 0:
        yield _range(name, part.detach().view(-1)[:count], parameter.ds_numel, offset)


def _range(name: str, part: torch.Tensor, whole: int, offset: int) -> Piece:
    return Piece(name, part, (whole,), (offset,))
