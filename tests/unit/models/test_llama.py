"""Our network against transformers' LlamaForCausalLM, and the properties that training relies on."""

import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

from models.hf_format import from_hf_name, hf_config
from models.llama import Llama, LlamaConfig, RopeScaling, flops_per_token, initial_tensor, parameter_count

BASE = LlamaConfig(dim=64, layers=3, heads=4, kv_heads=4, ffn_dim=160, vocab_size=101, context=128)
VARIANTS = {
    "mha": BASE,
    "gqa": dataclasses.replace(BASE, kv_heads=2),
    "mqa_tied": dataclasses.replace(BASE, kv_heads=1, tied=True),
    "tied": dataclasses.replace(BASE, tied=True),
    "scaled": dataclasses.replace(BASE, kv_heads=2, rope_theta=5e5, rope_scaling=RopeScaling(original_context=64)),
    "scaled_32_tied": dataclasses.replace(
        BASE, dim=256, kv_heads=2, rope_theta=5e5, rope_scaling=RopeScaling(factor=32.0), context=131072, tied=True
    ),
}


def random_pair(config: LlamaConfig) -> tuple[Llama, LlamaForCausalLM]:
    """The same large random weights in both (with the small default ones attention is nearly uniform)."""
    from transformers import LlamaConfig as HFLlamaConfig

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(HFLlamaConfig.from_dict(hf_config(config))).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 1.0 / parameter.shape[-1] ** 0.5)
    ours = Llama(config)
    state = {from_hf_name(name): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(state)
    return ours.eval(), theirs


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name: str) -> None:
    ours, theirs = random_pair(VARIANTS[name])
    tokens = torch.randint(0, 101, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gqa", "mqa_tied"])
def test_gradients_equal_transformers(name: str) -> None:
    ours, theirs = random_pair(VARIANTS[name])
    tokens = torch.randint(0, 101, (2, 32), generator=torch.Generator().manual_seed(1))
    for logits in (ours(tokens), theirs(tokens).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = {from_hf_name(key): parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], atol=1e-5, rtol=1e-4, msg=key)


def test_far_positions_of_a_long_context_equal_transformers() -> None:
    ours, theirs = random_pair(VARIANTS["scaled_32_tied"])
    tokens = torch.randint(0, 101, (1, 16))
    positions = torch.randint(0, 131072, (1, 16)).sort().values
    with torch.no_grad():
        expected = theirs(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits
        torch.testing.assert_close(ours(tokens, positions), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gqa", "scaled"])
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    ours, _ = random_pair(VARIANTS[name])
    documents = [torch.randint(0, 101, (length,)) for length in (7, 1, 20, 12)]
    padding = 5
    packed = torch.cat([*documents, torch.zeros(padding, dtype=torch.long)])[None]
    segments = torch.tensor([s for s, d in enumerate(documents, 1) for _ in d] + [0] * padding)[None]
    positions = torch.tensor([p for d in documents for p in range(len(d))] + list(range(padding)))[None]
    with torch.no_grad():
        together = ours(packed, positions, segments)
        counted_on = ours(packed, None, segments)
        start = 0
        for document in documents:
            alone = ours(document[None])
            part = slice(start, start + len(document))
            torch.testing.assert_close(together[:, part], alone, atol=1e-5, rtol=0)
            torch.testing.assert_close(counted_on[:, part], alone, atol=1e-4, rtol=0)  # RoPE is relative
            start += len(document)
        assert torch.isfinite(together).all()


def test_right_padding_and_later_tokens_change_nothing_before_them() -> None:
    ours, _ = random_pair(VARIANTS["gqa"])
    tokens = torch.randint(0, 101, (1, 20))
    changed = tokens.clone()
    changed[:, 11:] = 0
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[:, :11], ours(changed)[:, :11], atol=1e-6, rtol=0)
        assert not torch.allclose(ours(tokens)[:, 11], ours(changed)[:, 11])


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count_is_the_networks(name: str) -> None:
    model = Llama(VARIANTS[name])
    assert parameter_count(VARIANTS[name]) == sum(parameter.numel() for parameter in model.parameters())


def test_flops_per_token_by_hand() -> None:
    config = LlamaConfig(dim=4, layers=1, heads=2, kv_heads=1, ffn_dim=8, vocab_size=10, context=16)
    weights = (16 + 8 + 8 + 16) + 3 * 4 * 8 + 8 + 4 + 40  # attention, feed-forward, norms, output; no embedding lookup
    assert flops_per_token(config, 16) == 6 * weights + 12 * 1 * 4 * 16


def test_stages_of_a_pipeline_compose_to_the_whole() -> None:
    whole, _ = random_pair(VARIANTS["gqa"])
    tokens = torch.randint(0, 101, (2, 9))
    first, last = Llama(VARIANTS["gqa"]), Llama(VARIANTS["gqa"])
    for stage in (first, last):
        stage.load_state_dict(whole.state_dict())
    first.norm = first.output = None
    last.tok_embeddings = None
    del first.layers["2"], last.layers["0"], last.layers["1"]
    assert set(first.state_dict()) | set(last.state_dict()) == set(whole.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(last(first(tokens)), whole(tokens), atol=0, rtol=0)


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    config = VARIANTS["gqa"]
    state = Llama(config).init_weights(seed=3).state_dict()
    with torch.device("meta"):
        empty = Llama(config)
    again = empty.to_empty(device="cpu").init_weights(seed=3).state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, again[name]), name
    wq = state["layers.0.attention.wq.weight"]
    assert not torch.equal(wq, state["layers.1.attention.wq.weight"])
    assert not torch.equal(wq, initial_tensor(config, "layers.0.attention.wq.weight", tuple(wq.shape), seed=4))
    assert wq.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert state["layers.0.feed_forward.w2.weight"].std().item() == pytest.approx(64**-0.5 / 6**0.5, rel=0.05)
    assert torch.equal(state["layers.0.ffn_norm.weight"], torch.ones(config.dim))


def test_tied_weights_stay_one_tensor() -> None:
    with torch.device("meta"):
        model = Llama(VARIANTS["tied"])
    model.to_empty(device="cpu").tie()
    model.init_weights()
    assert model.output is not None and model.tok_embeddings is not None
    assert model.output.weight is model.tok_embeddings.weight


def test_it_learns_to_copy() -> None:
    """A few steps of AdamW on `x y x y`: the second half is predictable from the first."""
    torch.manual_seed(0)
    model = Llama(dataclasses.replace(VARIANTS["gqa"], vocab_size=16)).init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        half = torch.randint(0, 16, (32, 8))
        tokens = torch.cat([half, half], dim=1)
        loss = torch.nn.functional.cross_entropy(model(tokens)[:, 8:-1].flatten(0, 1), tokens[:, 9:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 < torch.tensor(16.0).log().item()


def test_impossible_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="heads 3"):
        dataclasses.replace(BASE, heads=3)
    with pytest.raises(ValueError, match="kv_heads 3"):
        dataclasses.replace(BASE, kv_heads=3)
