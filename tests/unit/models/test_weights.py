"""Model folders: round trips with transformers, clear refusals, nothing half-written that loads."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_llama import BASE, VARIANTS, random_pair
from test_tokenizers import CORPUS
from transformers import AutoModelForCausalLM, AutoTokenizer

from infra.errors import CheckpointError, ConfigError
from models.average import average
from models.chat import render
from models.hf_format import config_from_hf, from_hf_name, hf_config, read_config, to_hf_name
from models.llama import Llama
from models.tokenizers import train_bpe
from models.weights import check, load_llama, read_tensors, save_hf

GQA = VARIANTS["gqa"]


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
@pytest.mark.parametrize("name", ["gqa", "mqa_tied", "scaled"])
def test_our_folder_in_transformers_and_back(name: str, shard_bytes: int, tmp_path: Path) -> None:
    ours, theirs = random_pair(VARIANTS[name])
    save_hf(ours, VARIANTS[name], tmp_path / "out", shard_bytes=shard_bytes)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shard_bytes < 10**9)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    again = load_llama(tmp_path / "out")
    assert again.config == VARIANTS[name]
    for key, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@pytest.mark.parametrize("shard_size", ["1GB", "60KB"])
@pytest.mark.parametrize("name", ["gqa", "mqa_tied", "scaled_32_tied"])
def test_transformers_folder_in_ours(name: str, shard_size: str, tmp_path: Path) -> None:
    ours, theirs = random_pair(VARIANTS[name])
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    loaded = load_llama(tmp_path).eval()
    tokens = torch.randint(0, 101, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)
    assert loaded.config == ours.config
    if loaded.config.tied:
        assert loaded.output is not None and loaded.tok_embeddings is not None
        assert loaded.output.weight is loaded.tok_embeddings.weight


def test_names_map_one_to_one() -> None:
    names = list(Llama(BASE).state_dict())
    assert [from_hf_name(to_hf_name(name)) for name in names] == names
    assert to_hf_name("layers.12.feed_forward.w3.weight") == "model.layers.12.mlp.up_proj.weight"
    for unknown in ("layers.0.attention.bias", "model.layers.x.mlp.up_proj.weight"):
        with pytest.raises(KeyError):
            from_hf_name(unknown)


def test_a_stream_in_either_naming_saves_the_same_bytes(tmp_path: Path) -> None:
    ours, theirs = random_pair(VARIANTS["mqa_tied"])
    save_hf(ours, ours.config, tmp_path / "a")
    save_hf(((name, tensor) for name, tensor in theirs.state_dict().items()), ours.config, tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_dtype_is_converted_and_told(tmp_path: Path) -> None:
    ours, _ = random_pair(GQA)
    save_hf(ours, GQA, tmp_path / "out", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert load_llama(tmp_path / "out", dtype=torch.float32).norm.weight.dtype == torch.float32  # type: ignore[union-attr]


def test_saved_folder_chats_in_plain_transformers(tmp_path: Path) -> None:
    tokenizer = train_bpe(CORPUS, 400)
    config = dataclasses.replace(GQA, vocab_size=tokenizer.vocab_size)
    save_hf(Llama(config).init_weights(), config, tmp_path, tokenizer)
    model, theirs = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert sorted(model.generation_config.eos_token_id) == sorted(tokenizer.stop_ids)
    messages = [{"role": "user", "content": "over the hills"}]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert prompt["input_ids"][0].tolist() == render(messages, tokenizer, add_generation_prompt=True)

    def always_end_of_turn(_module: torch.nn.Module, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
        tokens = torch.full(logits.shape[:-1], tokenizer.eot_id)
        return torch.nn.functional.one_hot(tokens, config.vocab_size).float()

    model.lm_head.register_forward_hook(always_end_of_turn)
    answer = model.generate(**prompt, max_new_tokens=8)[0, prompt["input_ids"].shape[1] :]
    assert answer.tolist() == [tokenizer.eot_id]


def damaged(folder: Path, change: str) -> None:
    """Save a good model, then do one thing to its weight file."""
    save_hf(Llama(GQA).init_weights(), GQA, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    elif change == "unexpected":
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    elif change == "shape":
        tensors["model.embed_tokens.weight"] = torch.zeros(100, 64)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"missing: model\.layers\.1\.mlp\.up_proj\.weight, lm_head\.weight"),
        ("unexpected", r"unexpected: model\.layers\.0\.self_attn\.q_proj\.bias, model\.layers\.7\.mlp\.up_proj"),
        ("shape", r"wrong shape: model\.embed_tokens\.weight is \[100, 64\], config\.json says \[101, 64\]"),
    ],
)
def test_weights_that_do_not_fit_are_named_before_any_is_read(
    change: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged(tmp_path, change)
    monkeypatch.setattr("models.weights._stream", lambda *_: pytest.fail("tensors were read"))
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path, GQA)
    with pytest.raises(CheckpointError, match=message):
        load_llama(tmp_path)


def test_broken_folders_are_refused_by_name(tmp_path: Path) -> None:
    model = Llama(GQA).init_weights()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_llama(tmp_path)
    save_hf(model, GQA, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_llama(tmp_path / "cut")
    file.unlink()
    with pytest.raises(CheckpointError, match="no weights in"):
        load_llama(tmp_path / "cut")
    save_hf(model, GQA, tmp_path / "shards", shard_bytes=60_000)
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="names files that are missing: model-00002-of-"):
        load_llama(tmp_path / "shards")
    (tmp_path / "shards" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_llama(tmp_path / "shards")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"head_dim": 8}, "head_dim is 8"),
        ({"num_attention_heads": 5}, "heads 5"),
    ],
)
def test_configs_that_are_no_llama_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_from_hf({**hf_config(GQA), **change})
    incomplete = hf_config(GQA)
    del incomplete["hidden_size"]
    with pytest.raises(CheckpointError, match="hidden_size is missing"):
        config_from_hf(incomplete)


def test_transformers_5_spelling_of_rope_is_read() -> None:
    tree = hf_config(VARIANTS["scaled"])
    tree["rope_parameters"] = {**tree.pop("rope_scaling"), "rope_theta": tree.pop("rope_theta")}
    assert config_from_hf(tree) == VARIANTS["scaled"]


def test_a_save_that_dies_leaves_nothing_that_loads(tmp_path: Path) -> None:
    """Over an older model too: neither the old nor a mixture may load as if it were the new one."""
    folder = tmp_path / "model"
    model = Llama(GQA).init_weights()

    def dying() -> object:
        yield from list(model.state_dict().items())[:5]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        save_hf(dying(), GQA, folder)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="missing"):
        load_llama(folder)
    assert list(tmp_path.iterdir()) == []
    incomplete = {name: tensor for name, tensor in model.state_dict().items() if name != "norm.weight"}
    with pytest.raises(CheckpointError, match=r"missing: model\.norm\.weight"):
        save_hf(incomplete, GQA, folder)
    save_hf(model, GQA, folder)
    with pytest.raises(CheckpointError, match="unexpected or repeated"):
        save_hf([*model.state_dict().items(), ("norm.weight", torch.ones(64))], GQA, folder)
    assert read_config(folder) == GQA  # the older model is whole: nothing had been moved yet


def test_single_file_over_shards_leaves_no_stale_index(tmp_path: Path) -> None:
    first, second = Llama(GQA).init_weights(1), Llama(GQA).init_weights(2)
    save_hf(first, GQA, tmp_path, shard_bytes=60_000)
    save_hf(second, GQA, tmp_path)
    loaded = load_llama(tmp_path)
    assert torch.equal(loaded.state_dict()["output.weight"], second.state_dict()["output.weight"])


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        save_hf(Llama(GQA), GQA, tmp_path / "out", train_bpe(CORPUS, 400))
    assert not (tmp_path / "out").exists()


def test_average_is_the_weighted_mean(tmp_path: Path) -> None:
    models = [Llama(GQA).init_weights(seed) for seed in range(3)]
    for number, model in enumerate(models):
        save_hf(model, GQA, tmp_path / str(number), shard_bytes=60_000 if number == 1 else 10**9)
    folders = [tmp_path / str(number) for number in range(3)]
    average(folders, [0.5, 0.25, 0.25], tmp_path / "mean")
    average(folders[:1], None, tmp_path / "same")
    states = [model.state_dict() for model in models]
    mean = load_llama(tmp_path / "mean").state_dict()
    for name in mean:
        expected = 0.5 * states[0][name] + 0.25 * states[1][name] + 0.25 * states[2][name]
        torch.testing.assert_close(mean[name], expected, atol=1e-7, rtol=0)
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (tmp_path / "0" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="sum to 1"):
        average(folders, [1.0, 1.0, 1.0], tmp_path / "no")
    other = dataclasses.replace(GQA, ffn_dim=96)
    save_hf(Llama(other), other, tmp_path / "other")
    with pytest.raises(CheckpointError, match="they differ in"):
        average([folders[0], tmp_path / "other"], None, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_check_ignores_what_old_conversions_stored(tmp_path: Path) -> None:
    save_hf(Llama(GQA), GQA, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    assert "norm.weight" in check(tmp_path, GQA)
