"""Folders to start from: each is refused at once in one line, or trained, saved and served for what it is."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from engines.chat import ChatTokenizer, check_chat
from engines.hf_folder import load_model, save_model
from infra.config import load
from infra.errors import CheckpointError
from models.chat import TEMPLATES
from models.llama import Llama
from models.presets import scratch_config
from models.tokenizers import load_tokenizer, train_bpe
from models.weights import load_llama, save_hf
from tests.unit.models.test_tokenizers import CORPUS, llama2_folder  # noqa: F401
from workflows.recipes.checks import check_pretraining, check_start_model
from workflows.recipes.settings import PretrainRecipe

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"
NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
ASKED = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "12 llamas?\n\n<Hills>"}]
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
META = (  # as Llama 3 was published: other Jinja, the same text
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DATED = "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024<|eot_id|>' }}" + META


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small Llama with a head of its own."""
    tokenizer = train_bpe(CORPUS, 300)
    config = scratch_config(32, 2, 4, 2, tokenizer.vocab_size, 64, tied=False)
    folder = tmp_path_factory.mktemp("start") / "model"
    save_hf(Llama(config).init_weights(), config, folder, tokenizer)
    return folder


@pytest.fixture
def model(untied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untied, tmp_path / "model"))


def change(folder: Path, file: str = "config.json", **changes: Any) -> None:
    tree = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**tree, **changes}))


def remove(folder: Path, file: str, key: str) -> None:
    tree = json.loads((folder / file).read_text())
    del tree[key]
    (folder / file).write_text(json.dumps(tree))


def retensor(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})


def index(folder: Path, **weight_map: Any) -> None:
    change(folder, "model.safetensors.index.json", weight_map=weight_map)


def dangle(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("/cache/blob")


def retoken(folder: Path, lost: str) -> None:
    """Take a special token out of tokenizer.json."""
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != lost]
    (folder / "tokenizer.json").write_text(json.dumps(tree))


def spoil(name: str, value: float) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        def change(tensors: dict[str, Any]) -> dict[str, Any]:
            tensors[name].view(-1)[-1] = value
            return tensors

        retensor(folder, change)

    return harm


def rope(**keys: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder, rope_scaling=keys)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another head": (lambda f: change(f, tie_word_embeddings=True), "tie_word_embeddings = true, but lm_head.weight"),
    "head left out": (lambda f: retensor(f, lambda t: {k: t[k] for k in t if k != HEAD}), "missing: lm_head.weight"),
    "tied by text": (lambda f: change(f, tie_word_embeddings="false"), "tie_word_embeddings is 'false'"),
    "size as text": (lambda f: change(f, hidden_size="32"), "hidden_size is '32'; it must be an integer"),
    "no key/value heads": (lambda f: change(f, num_key_value_heads=0), "num_key_value_heads is 0"),
    "eps is NaN": (lambda f: change(f, rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "theta as text": (lambda f: change(f, rope_theta="1e4"), "rope_theta is '1e4'"),
    "rope as text": (lambda f: change(f, rope_scaling="linear"), "rope_scaling is 'linear'; it must be an object"),
    "rope short": (rope(rope_type="llama3", factor=8.0), "low_freq_factor is missing"),
    "rope upside down": (rope(**{**LLAMA3, "low_freq_factor": 9.0}), "is above high_freq_factor"),
    "rope factor 0": (rope(**{**LLAMA3, "factor": 0}), "factor is 0"),
    "rope of half heads": (lambda f: change(f, partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "rope by layer": (rope(full_attention={"rope_theta": 1e4}), "differ by layer"),
    "granite": (lambda f: change(f, embedding_multiplier=12.0), "embedding_multiplier is 12.0"),
    "sliding window": (lambda f: change(f, sliding_window=8), "sliding_window is 8"),
    "window of no end": (lambda f: change(f, sliding_window=10**30), "sliding_window is 1000"),
    "layer types by number": (lambda f: change(f, layer_types=2), "layer_types is 2"),
    "padding of no row": (lambda f: change(f, pad_token_id=10**9), "config.json: transformers cannot use it: Padding"),
    "layer types": (lambda f: change(f, layer_types=["sliding_attention"] * 2), "layer_types"),
    "list as config": (lambda f: (f / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "byte order mark": (lambda f: (f / "config.json").write_bytes(b"\xef\xbb\xbf{}"), "without a byte order mark"),
    "dtype of no torch": (lambda f: change(f, model_type="mistral", torch_dtype="brain16"), "config.json"),
    "unknown family": (lambda f: change(f, model_type="camel"), "config.json: transformers cannot use it"),
    "FP8 config": (lambda f: change(f, quantization_config={"quant_method": "fp8"}), "quantized (fp8)"),
    "FP8 weights": (
        lambda f: retensor(f, lambda t: {**t, EMBEDDING: t[EMBEDDING].to(torch.float8_e4m3fn)}),
        "model.embed_tokens.weight is stored as F8_E4M3",
    ),
    "FP8 weights and their scales": (
        lambda f: retensor(f, lambda t: {**t, HEAD: t[HEAD].to(torch.float8_e4m3fn), f"{HEAD}_scale_inv": t[NORM]}),
        "lm_head.weight is stored as F8_E4M3",
    ),
    "GPTQ": (
        lambda f: retensor(f, lambda t: {**t, "model.layers.0.mlp.up_proj.qweight": t[HEAD].to(torch.int32)}),
        "up_proj.qweight is stored as I32",
    ),
    "NaN in a tied head": (
        lambda f: (
            retensor(f, lambda t: {**t, **dict.fromkeys((EMBEDDING, HEAD), t[EMBEDDING] * float("nan"))}),
            change(f, tie_word_embeddings=True),
        ),
        "NaN or infinity in lm_head.weight, model.embed_tokens.weight",
    ),
    "rope of no type": (rope(rope_type=None, factor=8.0), "rope type None is not supported"),
    "attention that is told": (lambda f: change(f, output_attentions=True), "config.json: transformers cannot use it"),
    "weights elsewhere": (
        lambda f: dangle(f / "model.safetensors"),
        "model.safetensors is a link to /cache/blob, which",
    ),
    "config elsewhere": (lambda f: dangle(f / "config.json"), "config.json is a link to /cache/blob, which does not"),
    "template elsewhere": (lambda f: dangle(f / "chat_template.jinja"), "chat_template.jinja is a link to /cache"),
    "template not pulled": (lambda f: (f / "chat_template.jinja").write_text(LFS), "jinja is a Git LFS pointer"),
    "length of no number": (
        lambda f: change(f, "tokenizer_config.json", model_max_length="many"),
        "transformers cannot use its tokenizer",
    ),
    "tokenizer without an end": (lambda f: retoken(f, "<|end_of_text|>"), "model: the tokenizer names no end-of-text"),
    "NaN": (spoil(NORM, float("nan")), "NaN or infinity in model.norm.weight"),
    "infinity": (spoil(EMBEDDING, float("-inf")), "NaN or infinity in model.embed_tokens.weight"),
    "compiled": (lambda f: retensor(f, lambda t: {f"_orig_mod.{k}": t[k] for k in t}), "starts with '_orig_mod.'"),
    "wrapped": (lambda f: retensor(f, lambda t: {f"module.{k}": t[k] for k in t}), "starts with 'module.'"),
    "adapter alone": (
        lambda f: ((f / "config.json").unlink(), change(f, "adapter_config.json", peft_type="LORA")),
        "holds an adapter (adapter_config.json)",
    ),
    "adapter beside": (lambda f: change(f, "adapter_config.json", peft_type="LORA"), "holds an adapter"),
    "weights not pulled": (lambda f: (f / "model.safetensors").write_text(LFS), "run `git lfs pull`"),
    "tokenizer not pulled": (lambda f: (f / "tokenizer.json").write_text(LFS), "tokenizer.json is a Git LFS pointer"),
    "config not pulled": (lambda f: (f / "config.json").write_text(LFS), "config.json is a Git LFS pointer"),
    "shard elsewhere": (
        lambda f: index(f, a="../other/model.safetensors"),
        "'../other/model.safetensors', which is no",
    ),
    "shard of no name": (lambda f: index(f, a=3), "names 3, which is not a file"),
    "index of nothing": (lambda f: index(f), "weight_map must say"),
    "stale single file": (
        lambda f: (shutil.copy(f / "model.safetensors", f / "a.safetensors"), index(f, x="a.safetensors")),
        "does not name model.safetensors: remove the stale one",
    ),
    "tensor in two files": (
        lambda f: (
            shutil.copy(f / "model.safetensors", f / "a.safetensors"),
            index(f, x="a.safetensors", y="model.safetensors"),
        ),
        "lies in a.safetensors and in model.safetensors",
    ),
    "pickles": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin must be converted to safetensors",
    ),
    "too many ids": (lambda f: train_bpe([*CORPUS, *map(str.upper, CORPUS)], 400).save(f), "the tokenizer has 400 ids"),
    "a token of no id": (
        lambda f: change(f, "tokenizer_config.json", additional_special_tokens=["<|new|>"]),
        "the tokenizer has 301 ids, the model only 300",
    ),
    "generation impossible": (
        lambda f: change(f, "generation_config.json", max_new_tokens=-5),
        "generation_config.json: transformers cannot use it: `max_new_tokens` must be greater than 0",
    ),
    "generation list": (lambda f: (f / "generation_config.json").write_text("[]"), "not a JSON object"),
    "tokenizer config": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json: not valid"),
    "a date": (
        lambda f: change(f, "tokenizer_config.json", chat_template=DATED),
        "tokenizer_config.json: its chat template is not the llama3 format",
    ),
    "a date in its own file": (
        lambda f: (f / "chat_template.jinja").write_text(DATED),
        "chat_template.jinja: its chat",
    ),
    "refuses a system message": (
        lambda f: change(f, "tokenizer_config.json", chat_template="{{ raise_exception('no') }}"),
        "it refuses a question (no)",
    ),
    "no default template": (
        lambda f: change(f, "tokenizer_config.json", chat_template=[{"name": "rag", "template": META}]),
        "chat_template names no default, only rag",
    ),
}


@pytest.mark.parametrize("harm", REFUSED)
def test_what_cannot_be_trained_is_refused_at_the_start(model: Path, harm: str) -> None:
    damage, named = REFUSED[harm]
    damage(model)
    with pytest.raises(CheckpointError) as refused:
        check_start_model(model)
    assert named in str(refused.value) and str(model) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


RIGHT: dict[str, Callable[[Path], Any]] = {
    "plain": lambda f: None,
    "no tie key": lambda f: remove(f, "config.json", "tie_word_embeddings"),
    "tied, head stored too": lambda f: (
        change(f, tie_word_embeddings=True),
        retensor(f, lambda t: {**t, HEAD: t[EMBEDDING]}),
    ),
    "scaled": rope(**LLAMA3, original_max_position_embeddings=32),
    "original context at the top": lambda f: change(f, rope_scaling=LLAMA3, original_max_position_embeddings=16),
    "both spellings": lambda f: change(
        f, rope_scaling={**LLAMA3, "original_max_position_embeddings": 16}, rope_parameters={"rope_theta": 5e5}
    ),
    "rows to spare": lambda f: (
        change(f, vocab_size=384),
        retensor(
            f, lambda t: {k: torch.nn.functional.pad(v, (0, 0, 0, 84)) if len(v) == 300 else v for k, v in t.items()}
        ),
    ),
    "whole window": lambda f: change(f, sliding_window=64),
    "several ends": lambda f: change(f, eos_token_id=[1, 2], pad_token_id=None),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_accepted_is_the_model_that_transformers_loads(model: Path, name: str) -> None:
    RIGHT[name](model)
    assert check_start_model(model) == 64
    tokens = torch.arange(60)[None]
    theirs = AutoModelForCausalLM.from_pretrained(model)
    torch.testing.assert_close(load_llama(model)(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


def test_a_sliding_window_bounds_the_context(model: Path) -> None:
    """Packed rows attend to all of their document, so that no document may be longer than the window."""
    config = MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, sliding_window=24,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(model)
    assert check_start_model(model) == 24
    tiny = Path(__file__).parents[3] / "recipes" / "pretrain" / "tiny.toml"
    with pytest.raises(CheckpointError, match=r"model\.init_from: .*model_type is 'mistral'.* only Llamas"):
        check_pretraining(load(tiny, PretrainRecipe, [f"model.init_from={model}"]))
    change(model, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="tie_word_embeddings = true, but"):
        check_start_model(model)


GENERATIONS: dict[str, dict[str, Any]] = {
    "sampling without do_sample": {"temperature": 0.9, "top_p": 0.6, "max_length": 4096},
    "beams without beams": {"num_beams": 1, "early_stopping": True, "length_penalty": 0.5},
    "scores without a dict": {"output_scores": True, "pad_token_id": -1},
    "none": {},
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_no_generation_config_keeps_weights_from_being_saved(model: Path, tmp_path: Path, name: str) -> None:
    (model / "generation_config.json").write_text(json.dumps({**GENERATIONS[name], "eos_token_id": 7}))
    change(model, temperature=0.7)  # and what transformers will not save in config.json
    (model / "LICENSE.txt").write_text("ours")
    check_start_model(model)
    trained = load_model(model, "lm", torch.float32)
    save_model(trained, trained.state_dict(), model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for key, tensor in trained.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    tokenizer = ChatTokenizer.load(model)
    assert kept | GENERATIONS[name] | {"pad_token_id": 0} == kept | {"pad_token_id": 0}
    assert kept["eos_token_id"] == list(tokenizer.stop_ids)
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "ours"


@pytest.mark.parametrize("broken", ["tokenizer.json", "generation_config.json", "tokenizer_config.json"])
def test_weights_are_saved_whatever_became_of_their_companions(
    model: Path, tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    trained = load_model(model, "lm", torch.float32)
    (model / broken).write_text("{")
    with caplog.at_level(logging.WARNING):
        save_model(trained, trained.state_dict(), model, tmp_path / "out")
    assert "saved without all that travels with its model" in caplog.text
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, trained.get_parameter("lm_head.weight"))


def untemplated(folder: Path) -> None:
    remove(folder, "tokenizer_config.json", "chat_template")


TEMPLATES_FOUND: dict[str, Callable[[Path], Any]] = {
    "none": untemplated,
    "no tokenizer_config.json": lambda f: (f / "tokenizer_config.json").unlink(),
    "Meta's own": lambda f: change(f, "tokenizer_config.json", chat_template=META),
    "several": lambda f: change(
        f, "tokenizer_config.json", chat_template=[{"name": n, "template": META} for n in ("tool_use", "default")]
    ),
    "Meta's, of other ends": lambda f: change(
        f, "tokenizer_config.json", chat_template=META, bos_token=None, eos_token="<|none|>", pad_token="[PAD]"
    ),
    "in a file": lambda f: (untemplated(f), (f / "chat_template.jinja").write_text(META)),
}


@pytest.mark.parametrize("name", TEMPLATES_FOUND)
def test_a_saved_model_is_served_with_the_ids_it_was_trained_on(model: Path, tmp_path: Path, name: str) -> None:
    (model / "generation_config.json").unlink()
    TEMPLATES_FOUND[name](model)
    check_start_model(model)
    trained = load_model(model, "lm", torch.float32)
    save_model(trained, trained.state_dict(), model, tmp_path / "out")
    assert_served_as_trained(tmp_path / "out", ChatTokenizer.load(model))


def assert_served_as_trained(folder: Path, trained_with: ChatTokenizer) -> None:
    served = AutoTokenizer.from_pretrained(folder)
    assert len(served) == trained_with.tokenizer.vocab_size
    ids = served.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert ids == trained_with.prompt(ASKED) == ChatTokenizer.load(folder).prompt(ASKED)
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert tuple(ends if isinstance(ends, list) else [ends]) == trained_with.stop_ids


def sentencepiece(folder: Path, vocabulary: Path, **config: Any) -> None:
    """Llama 2's tokenizer in place of the folder's own."""
    (folder / "tokenizer.json").unlink()
    shutil.copy(vocabulary / "tokenizer.model", folder)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **tokens, **config}))


@pytest.mark.parametrize("fast", [False, True])
def test_llama_2s_tokenizer_is_served_as_it_was_trained(
    model: Path, tmp_path: Path, fast: bool, request: pytest.FixtureRequest
) -> None:
    """Its class in transformers drops the space before text that follows <s>, whatever tokenizer.json says."""
    sentencepiece(model, request.getfixturevalue("llama2_folder"), chat_template=TEMPLATES["llama2"])
    if fast:
        (model / "tokenizer.json").write_text(load_tokenizer(model).to_backend().to_str())
    check_chat(model)
    trained = load_model(model, "lm", torch.float32)
    save_model(trained, trained.state_dict(), model, tmp_path / "out")
    assert_served_as_trained(tmp_path / "out", ChatTokenizer.load(model))


@pytest.mark.parametrize("fast", [False, True])
def test_zephyr_is_not_taken_for_llama_2(model: Path, fast: bool, request: pytest.FixtureRequest) -> None:
    sentencepiece(model, request.getfixturevalue("llama2_folder"), chat_template=ZEPHYR)
    if fast:
        (model / "tokenizer.json").write_text(load_tokenizer(model).to_backend().to_str())
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: its chat template is not the llama2 format"):
        check_chat(model)


def test_a_tokenizer_that_reads_on_after_a_special_token_is_refused(
    model: Path, request: pytest.FixtureRequest
) -> None:
    sentencepiece(model, request.getfixturevalue("llama2_folder"))
    backend = json.loads(load_tokenizer(model).to_backend().to_str())
    backend["normalizer"] = None
    backend["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    (model / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(CheckpointError, match=r"Remove tokenizer\.json where tokenizer\.model lies beside it"):
        check_chat(model)
    (model / "tokenizer.json").unlink()
    check_chat(model)


SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 320, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 2},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
}


def family(kind: str, folder: Path) -> Path:
    """A small untied model of another family, with a tokenizer that has a chat format."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**SMALL, **FAMILIES[kind]})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    train_bpe(CORPUS, 300).save(folder)
    return folder


def cut(part: str) -> Callable[[Path], None]:
    """The last row of each matrix of a layer is lost."""
    return lambda f: retensor(f, lambda t: {k: v[:-1] if part in k and v.dim() == 2 else v for k, v in t.items()})


def lose(part: str) -> Callable[[Path], None]:
    return lambda f: retensor(f, lambda t: {k: v for k, v in t.items() if part not in k})


def tie(folder: Path) -> None:
    change(folder, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("kind", "damage", "named"),
    [
        ("mistral", lose("model.norm"), "do not fit config.json: missing: model.norm.weight"),
        ("mistral", lose(HEAD), "do not fit config.json: missing: lm_head.weight"),
        ("mistral", cut("layers.1.mlp.up"), "wrong shape: model.layers.1.mlp.up_proj.weight is [63, 32], config.json"),
        ("mistral", tie, "tie_word_embeddings = true, but lm_head.weight differs from model.embed_tokens.weight"),
        ("gpt2", lose("h.1.ln_2.bias"), "missing: transformer.h.1.ln_2.bias"),
        ("gpt2", tie, "lm_head.weight differs from transformer.wte.weight"),
        ("gpt_neox", tie, "embed_out.weight differs from gpt_neox.embed_in.weight"),
        ("mixtral", cut("layers.1"), "do not fit config.json"),
        ("mixtral", cut("layers.1.block_sparse_moe.experts.1"), "do not fit config.json"),
        ("gptj", lambda f: None, "config.json: transformers cannot use it: GPTJForCausalLM does not support"),
    ],
)
def test_weights_of_every_family_fit_its_network(
    tmp_path: Path, kind: str, damage: Callable[[Path], None], named: str
) -> None:
    folder = family(kind, tmp_path / kind)
    damage(folder)
    with pytest.raises(CheckpointError) as refused:
        check_start_model(folder)
    assert named in str(refused.value) and str(folder) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["mistral", "gpt2", "mixtral"])
@pytest.mark.parametrize("tied", [False, True])
def test_models_of_other_families_are_started_from(tmp_path: Path, kind: str, tied: bool) -> None:
    folder = family(kind, tmp_path / kind)
    if tied:
        tie(folder)
        lose(HEAD)(folder)
    if kind == "gpt2":  # as it was published, without what stands before the decoder's names
        retensor(folder, lambda t: {name.removeprefix("transformer."): tensor for name, tensor in t.items()})
    assert check_start_model(folder) == 64
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
    load_model(folder, "lm", torch.float32)


def test_tensors_that_a_network_does_not_have_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = family("mistral", tmp_path / "mistral")
    retensor(folder, lambda t: {**t, "vision.weight": torch.ones(3)})
    check_start_model(folder)
    assert "its network has no such tensors, they are left out: vision.weight" in caplog.text
