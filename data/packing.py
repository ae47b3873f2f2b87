"""Packing: several short sequences share a row of fixed length, and none sees another.

Best fit: each sequence, longest first, goes into the fullest row that still has room for it. Rows are then sorted by
their first sequence, so that a shuffled input stays shuffled. Nothing is lost or cut silently.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from data.config import PackingSettings
from infra.errors import DataError

Sample = tuple[Sequence[int], Sequence[int]]
"""(token ids, loss mask), both [T]; the mask is 1 on training targets."""


@dataclass(frozen=True)
class Packed:
    """R rows of T tokens. Two sequences [5, 6, 7] and [8, 9] in a row of 6 give

        input_ids    5 6 7 8 9 pad
        position_ids 0 1 2 0 1 0
        segment_ids  1 1 1 2 2 0     (0 = padding)
        loss_mask    as given; 0 on padding and on the first token of each segment (nothing before it predicts it)

    `members[r]` are the indices of the sequences in row r, in segment order. `dropped` and `cut` are the indices of the
    sequences that `too_long` left out or shortened.
    """

    input_ids: torch.Tensor  # [R, T] int64
    position_ids: torch.Tensor  # [R, T] int64
    segment_ids: torch.Tensor  # [R, T] int64
    loss_mask: torch.Tensor  # [R, T] float32
    members: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()

    def batch(self, rows: slice | Sequence[int]) -> Mapping[str, torch.Tensor]:
        """Some rows as a micro-batch: name -> [B, T]."""
        names = ("input_ids", "position_ids", "segment_ids", "loss_mask")
        return {name: getattr(self, name)[rows] for name in names}


def pack(samples: Sequence[Sample], settings: PackingSettings, pad_id: int) -> Packed:
    """Pack (ids, mask) samples into rows of `settings.length` tokens.

    Raises:
        DataError: a sample is longer than a row and `too_long` is "error"; a sample is empty or its mask is of another
            length.
    """
    kept, dropped, cut = _fit(samples, settings)
    order = sorted(kept)
    rows = plan_rows([len(kept[index][0]) for index in order], settings.length)
    members = tuple(tuple(order[place] for place in row) for row in rows)
    shape = (len(members), settings.length)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    position_ids, segment_ids = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.float32)
    for row, indices in enumerate(members):
        start = 0
        for segment, index in enumerate(indices, start=1):
            ids, mask = kept[index]
            where = (row, slice(start, start + len(ids)))
            input_ids[where] = torch.as_tensor(ids, dtype=torch.int64)
            position_ids[where] = torch.arange(len(ids))
            segment_ids[where] = segment
            loss_mask[where] = torch.as_tensor(mask, dtype=torch.float32)
            loss_mask[row, start] = 0.0
            start += len(ids)
    return Packed(input_ids, position_ids, segment_ids, loss_mask, members, dropped, cut)


def pad(samples: Sequence[Sample], settings: PackingSettings, pad_id: int) -> Mapping[str, torch.Tensor]:
    """The same samples unpacked, one per row, padded on the right to the longest: input_ids, attention_mask, loss_mask
    [B, T]. Dropping is refused here, since rows and samples would no longer match.

    Raises:
        DataError: as `pack`, and for a too long sample with `too_long="drop"`.
    """
    kept, dropped, _ = _fit(samples, settings)
    if dropped:
        raise DataError(f"sample {dropped[0]} is longer than {settings.length} tokens; drop it before padding")
    longest = max((len(ids) for ids, _ in kept.values()), default=0)
    shape = (len(kept), longest)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.float32)
    for row, (ids, mask) in sorted(kept.items()):
        input_ids[row, : len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
        attention_mask[row, : len(ids)] = 1
        loss_mask[row, : len(ids)] = torch.as_tensor(mask, dtype=torch.float32)
        loss_mask[row, 0] = 0.0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}


def plan_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: rows of indices into `lengths`, every index exactly once, no row above `capacity`."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted: the first that is large enough fits best
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(open_rows, (lengths[index], -1))
        if place < len(open_rows):
            free, row = open_rows.pop(place)
            rows[row].append(index)
        else:
            free, row = capacity, len(rows)
            rows.append([index])
        if free > lengths[index]:
            insort(open_rows, (free - lengths[index], row))
    return sorted(sorted(row) for row in rows)


def block_causal_mask(segment_ids: torch.Tensor, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """segment_ids [B, T] -> mask [B, 1, T, T] for HF models: a token sees its own segment up to itself.

    Bool: True if attention is allowed (sdpa). A float dtype: 0 if allowed, else its most negative number (eager).
    Padding sees only itself, so that no softmax row is empty.
    """
    length = segment_ids.shape[-1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    real = segment_ids[:, None, :] != 0
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=segment_ids.device)
    allowed = ((same & real & causal) | itself)[:, None]
    if dtype == torch.bool:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def _fit(
    samples: Sequence[Sample], settings: PackingSettings
) -> tuple[dict[int, Sample], tuple[int, ...], tuple[int, ...]]:
    """(index -> sample that fits, dropped indices, cut indices)."""
    kept: dict[int, Sample] = {}
    dropped: list[int] = []
    cut: list[int] = []
    for index, (ids, mask) in enumerate(samples):
        if len(ids) != len(mask) or len(ids) == 0:
            raise DataError(
                f"sample {index}: {len(ids)} tokens and {len(mask)} mask values; the numbers must be equal and above 0"
            )
        if len(ids) <= settings.length:
            kept[index] = (ids, mask)
        elif settings.too_long == "error":
            raise DataError(
                f"sample {index} has {len(ids)} tokens, a row has {settings.length}: raise packing.length, or set "
                f"packing.too_long to drop, keep_start or keep_end"
            )
        elif settings.too_long == "drop":
            dropped.append(index)
        else:
            cut.append(index)
            part = slice(settings.length) if settings.too_long == "keep_start" else slice(-settings.length, None)
            kept[index] = (ids[part], mask[part])
    return kept, tuple(dropped), tuple(cut)
