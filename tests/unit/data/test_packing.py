"""Packing: nothing lost, segments do not see each other, packed equals unpacked."""

import random

import pytest
import torch

from data.config import PackingSettings
from data.packing import block_causal_mask, pack, pad, plan_rows
from infra.errors import DataError


def _samples(count: int, longest: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        length = rng.randint(1, longest)
        made.append(([rng.randint(3, 60) for _ in range(length)], [rng.randint(0, 1) for _ in range(length)]))
    return made


def test_example_by_hand():
    packed = pack([([5, 6, 7], [1, 1, 1]), ([8, 9], [0, 1])], PackingSettings(length=6), pad_id=2)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 2]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert packed.loss_mask.tolist() == [[0, 1, 1, 0, 1, 0]]
    assert packed.members == ((0, 1),)


def test_nothing_is_lost_or_changed():
    samples = _samples(500, 40)
    packed = pack(samples, PackingSettings(length=48), pad_id=0)
    found = {}
    for row, indices in enumerate(packed.members):
        for segment, index in enumerate(indices, start=1):
            where = packed.segment_ids[row] == segment
            found[index] = (packed.input_ids[row][where].tolist(), packed.loss_mask[row][where].tolist())
    assert found == {index: (ids, [0, *mask[1:]]) for index, (ids, mask) in enumerate(samples)}
    assert packed.input_ids[packed.segment_ids == 0].eq(0).all()


def test_best_fit_wastes_little_and_keeps_the_order_of_rows():
    lengths = [random.Random(1).randint(1, 100) for _ in range(2000)]
    rows = plan_rows(lengths, 128)
    assert sorted(index for row in rows for index in row) == list(range(2000))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 128
    assert len(rows) < 1.03 * sum(lengths) / 128
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert plan_rows([6, 4, 3, 5, 2], 10) == [[0, 1], [2, 3, 4]]
    assert plan_rows([], 8) == []


def test_mask_by_hand():
    mask = block_causal_mask(torch.tensor([[1, 1, 2, 0]]))
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    floats = block_causal_mask(torch.tensor([[1, 1, 2, 0]]), torch.float32)
    assert torch.equal(floats == 0, mask) and floats[~mask].max() == torch.finfo(torch.float32).min


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_hf_model_gives_the_unpacked_logits(attention):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    samples = _samples(4, 12)
    packed = pack(samples, PackingSettings(length=16), pad_id=0)
    mask = block_causal_mask(packed.segment_ids, torch.bool if attention == "sdpa" else torch.float32)
    with torch.no_grad():
        logits = model(input_ids=packed.input_ids, position_ids=packed.position_ids, attention_mask=mask).logits
        for row, indices in enumerate(packed.members):
            for segment, index in enumerate(indices, start=1):
                alone = model(input_ids=torch.tensor([samples[index][0]])).logits[0]
                together = logits[row][packed.segment_ids[row] == segment]
                torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("policy", "ids", "dropped", "cut"),
    [
        ("drop", [[1, 2]], (1,), ()),
        ("keep_start", [[1, 2], [3, 4, 5]], (), (1,)),
        ("keep_end", [[1, 2], [4, 5, 6]], (), (1,)),
    ],
)
def test_too_long_is_a_choice_and_is_reported(policy, ids, dropped, cut):
    samples = [([1, 2], [1, 1]), ([3, 4, 5, 6], [1, 1, 1, 1])]
    packed = pack(samples, PackingSettings(length=3, too_long=policy), pad_id=0)
    assert [row[row != 0].tolist() for row in packed.input_ids] == ids
    assert (packed.dropped, packed.cut) == (dropped, cut)


def test_too_long_and_malformed_samples_are_errors():
    with pytest.raises(DataError, match=r"sample 1 has 4 tokens, a row has 3: raise packing\.length"):
        pack([([1], [1]), ([1, 2, 3, 4], [1] * 4)], PackingSettings(length=3), pad_id=0)
    with pytest.raises(DataError, match="sample 0: 2 tokens and 1 mask values"):
        pack([([1, 2], [1])], PackingSettings(length=3), pad_id=0)
    with pytest.raises(DataError, match="sample 0: 0 tokens"):
        pack([([], [])], PackingSettings(length=3), pad_id=0)
    with pytest.raises(DataError, match="sample 0 is longer than 3"):
        pad([([1] * 4, [1] * 4)], PackingSettings(length=3, too_long="drop"), pad_id=0)


def test_padding_by_hand():
    batch = pad([([5, 6, 7], [0, 1, 1]), ([8], [1])], PackingSettings(length=4), pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1], [0, 0, 0]]


def test_packed_and_padded_have_equally_many_targets():
    samples = _samples(100, 20)
    settings = PackingSettings(length=24)
    packed, padded = pack(samples, settings, pad_id=0), pad(samples, settings, pad_id=0)
    assert packed.loss_mask.sum() == padded["loss_mask"].sum() == sum(sum(mask[1:]) for _, mask in samples)
    assert packed.batch(slice(0, 2))["segment_ids"].shape == (2, 24)
