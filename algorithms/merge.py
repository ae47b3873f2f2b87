"""Averaging the weights of models of one stage (Llama 3, section 4.1.5; "model soups", Wortsman et al. 2022)."""

from collections.abc import Mapping, Sequence

import torch

from infra.errors import CheckpointError


def weighted_average(
    states: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float] | None = None
) -> dict[str, torch.Tensor]:
    """sum_i w_i * state_i / sum_i w_i, accumulated in fp64 and returned in each tensor's own dtype.

    Args:
        states: state dicts with the same names, shapes and dtypes.
        weights: one per state, sum not 0; None averages equally. A tensor that is no floating point (a buffer of
            indices) must be equal in all states and is taken over.

    Raises:
        CheckpointError: names, shapes or dtypes differ, with the first that does.
        ValueError: no states, or weights that do not fit.
    """
    weights = [1.0] * len(states) if weights is None else list(weights)
    if not states or len(weights) != len(states) or sum(weights) == 0:
        raise ValueError(
            f"need at least one state and one weight each with a sum other than 0, got {len(states)} states"
        )
    for number, state in enumerate(states):
        _check_same(states[0], state, number)
    return {name: _average([state[name] for state in states], weights, name) for name in states[0]}


def _average(tensors: list[torch.Tensor], weights: list[float], name: str) -> torch.Tensor:
    first = tensors[0]
    if not first.is_floating_point():
        if any(not torch.equal(first, other) for other in tensors[1:]):
            raise CheckpointError(f"cannot average {name}: {first.dtype} and different between the models")
        return first.clone()
    result = torch.zeros_like(first, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        result += tensor.double() * (weight / sum(weights))
    return result.to(first.dtype)


def _check_same(first: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], number: int) -> None:
    for name in sorted(first.keys() ^ other.keys()):
        raise CheckpointError(f"cannot average models 0 and {number}: only one of them has {name}")
    for name, tensor in first.items():
        if tensor.shape != other[name].shape or tensor.dtype != other[name].dtype:
            here, there = (f"{t.dtype} {list(t.shape)}" for t in (tensor, other[name]))
            raise CheckpointError(f"cannot average models 0 and {number}: {name} is {here} and {there}")
