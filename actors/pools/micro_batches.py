"""Micro-batches of tensors from rows of ids, the same number on every rank.

A row is one example as it is sent to a rank: a dict of plain lists. The caller plans which rank gets which rows
(`plan_micro_batches`); a rank turns its share into tensors (`pad`). A rank with fewer micro-batches than the others
gets empty ones, which become a dummy row with zero masks, so that every rank joins the same collectives.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]


def plan_micro_batches(lengths: Sequence[int], world_size: int, budget: int) -> list[list[list[int]]]:
    """Split one global batch into [rank][micro-batch][row index]; an empty micro-batch stands for a dummy.

    Rows are dealt by length, so that micro-batches that ranks process at the same time cost about the same. No
    micro-batch pads to more than `budget` tokens (a single longer row has its own).
    """
    ordered = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    shares: list[list[list[int]]] = []
    for rank in range(world_size):
        micro_batches: list[list[int]] = []
        for index in ordered[rank::world_size]:
            # The first row of a micro-batch is its longest and alone decides the padded width.
            if micro_batches and (len(micro_batches[-1]) + 1) * lengths[micro_batches[-1][0]] <= budget:
                micro_batches[-1].append(index)
            else:
                micro_batches.append([index])
        shares.append(micro_batches)
    most = max(len(share) for share in shares)
    for share in shares:
        share.extend([] for _ in range(most - len(share)))
    return shares


def pad(
    sequences: Sequence[Sequence[float] | np.ndarray], fill: float, dtype: torch.dtype, width: int | None = None
) -> torch.Tensor:
    """Lists of unequal length -> [B, width], filled on the right."""
    width = width or max(len(sequence) for sequence in sequences)
    out = torch.full((len(sequences), width), fill, dtype=dtype)
    for index, sequence in enumerate(sequences):
        out[index, : len(sequence)] = torch.tensor(sequence, dtype=dtype)
    return out


def tokens_batch(sequences: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Token ids -> {"input_ids" [B, T], "attention_mask" [B, T]}, padded on the right with id 0."""
    input_ids = pad(sequences, 0, torch.long)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    attention_mask = (torch.arange(input_ids.shape[1])[None, :] < lengths[:, None]).long()
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def epoch_batches(count: int, batch_size: int, epochs: float, seed: int) -> list[list[int]]:
    """Indices of every optimizer step's batch: a new permutation per epoch; a short last batch is kept.

    A function of its arguments only, so that the batch of step k is the same for every world size.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = round(count * epochs)
    order: list[int] = []
    while len(order) < wanted:
        order.extend(torch.randperm(count, generator=generator).tolist())
    order = order[:wanted]
    return [order[start : start + batch_size] for start in range(0, wanted, batch_size)]
