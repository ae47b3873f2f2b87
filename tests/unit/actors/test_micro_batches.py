"""Rows to micro-batches: nothing lost, equal counts on all ranks, batches that do not depend on the world size."""

import random

import pytest
import torch

from actors.pools.micro_batches import epoch_batches, pad, plan_micro_batches, tokens_batch


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_row_is_seen_once_and_ranks_have_equally_many_micro_batches(world_size: int) -> None:
    rng = random.Random(world_size)
    lengths = [rng.randint(1, 90) for _ in range(53)]
    plan = plan_micro_batches(lengths, world_size, budget=200)
    assert sorted(index for share in plan for micro in share for index in micro) == list(range(53))
    assert len({len(share) for share in plan}) == 1
    for micro in (micro for share in plan for micro in share if len(micro) > 1):
        assert len(micro) * max(lengths[index] for index in micro) <= 200


def test_more_ranks_than_rows_leaves_dummies() -> None:
    plan = plan_micro_batches([5, 9], world_size=3, budget=100)
    assert plan == [[[1]], [[0]], [[]]]


def test_a_row_longer_than_the_budget_stands_alone() -> None:
    assert plan_micro_batches([300, 300, 10], world_size=1, budget=100) == [[[0], [1], [2]]]


def test_pad_and_attention_mask() -> None:
    batch = tokens_batch([[5, 6, 7], [8]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert pad([[1.5]], -1.0, torch.float32, width=2).tolist() == [[1.5, -1.0]]


def test_epochs_are_permutations_and_fractions_are_kept() -> None:
    batches = epoch_batches(count=10, batch_size=4, epochs=2.5, seed=3)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 4, 1]
    order = [index for batch in batches for index in batch]
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert epoch_batches(10, 4, 2.5, seed=3) == batches != epoch_batches(10, 4, 2.5, seed=4)
