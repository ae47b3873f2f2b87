"""Hugging Face's names and config.json for a Llama <-> ours. The tensors themselves are the same; none is permuted."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.errors import CheckpointError
from models.files import read_object, refuse_adapter, refuse_pointer
from models.llama import LlamaConfig, RopeScaling
from models.tokenizers import Tokenizer

FOREIGN_KEYS = (
    "attention_multiplier",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "residual_multiplier",
)
"""Keys of networks that are nearly Llamas. Runtimes differ in which of them they honour for model_type llama."""


def to_hf_name(name: str) -> str:
    """layers.0.attention.wq.weight -> model.layers.0.self_attn.q_proj.weight; KeyError for a name that is not ours."""
    return _rename(name, {ours: theirs for ours, theirs in _name_pairs()})


def from_hf_name(name: str) -> str:
    """The inverse of `to_hf_name`; KeyError for a tensor that a Llama does not have."""
    return _rename(name, {theirs: ours for ours, theirs in _name_pairs()})


def _rename(name: str, table: Mapping[str, str]) -> str:
    number = re.search(r"\.?layers\.(\d+)\.", name)
    if number is None:
        return table[name]
    pattern = name[: number.start(1)] + "#" + name[number.end(1) :]
    return table[pattern].replace("#", number[1])


def _name_pairs() -> tuple[tuple[str, str], ...]:
    """(ours, Hugging Face's); # is the layer's number."""
    return (
        ("tok_embeddings.weight", "model.embed_tokens.weight"),
        ("layers.#.attention_norm.weight", "model.layers.#.input_layernorm.weight"),
        ("layers.#.attention.wq.weight", "model.layers.#.self_attn.q_proj.weight"),
        ("layers.#.attention.wk.weight", "model.layers.#.self_attn.k_proj.weight"),
        ("layers.#.attention.wv.weight", "model.layers.#.self_attn.v_proj.weight"),
        ("layers.#.attention.wo.weight", "model.layers.#.self_attn.o_proj.weight"),
        ("layers.#.ffn_norm.weight", "model.layers.#.post_attention_layernorm.weight"),
        ("layers.#.feed_forward.w1.weight", "model.layers.#.mlp.gate_proj.weight"),
        ("layers.#.feed_forward.w3.weight", "model.layers.#.mlp.up_proj.weight"),
        ("layers.#.feed_forward.w2.weight", "model.layers.#.mlp.down_proj.weight"),
        ("norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
    )


def hf_config(config: LlamaConfig, tokenizer: Tokenizer | None = None, dtype: str = "float32") -> dict[str, Any]:
    """config.json of a LlamaForCausalLM; `dtype` is torch's name without the prefix."""
    tree: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "torch_dtype": dtype,
    }
    if config.rope_scaling is not None:
        tree["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_context,
        }
    tree.update(token_ids(tokenizer) if tokenizer else {"bos_token_id": None, "eos_token_id": None})
    return tree


def config_from_hf(tree: Mapping[str, Any], source: str = "config.json") -> LlamaConfig:
    """The architecture that a config.json describes.

    Raises:
        CheckpointError: it is not a Llama, or has a feature that our network lacks; the message names the key.
    """

    def refuse_unless(condition: bool, key: str, wanted: str) -> None:
        if not condition:
            raise CheckpointError(f"{source}: {key} is {tree.get(key)!r}; this network needs {wanted}")

    refuse_unless(tree.get("model_type") == "llama", "model_type", "'llama'")
    refuse_unless(tree.get("hidden_act", "silu") == "silu", "hidden_act", "'silu'")
    refuse_unless(not tree.get("attention_bias"), "attention_bias", "false")
    refuse_unless(not tree.get("mlp_bias"), "mlp_bias", "false")
    for key in FOREIGN_KEYS:
        refuse_unless(tree.get(key) in (None, 1), key, "none: a Llama has no such setting")
    tied = tree.get("tie_word_embeddings")
    refuse_unless(tied in (None, True, False), "tie_word_embeddings", "true or false")
    heads = _count(tree, "num_attention_heads", source)
    theta, scaling = _rope_from_hf(tree, source)
    try:
        config = LlamaConfig(
            dim=_count(tree, "hidden_size", source),
            layers=_count(tree, "num_hidden_layers", source),
            heads=heads,
            kv_heads=_count(tree, "num_key_value_heads", source, heads),
            ffn_dim=_count(tree, "intermediate_size", source),
            vocab_size=_count(tree, "vocab_size", source),
            context=_count(tree, "max_position_embeddings", source, 2048),
            norm_eps=_positive(tree, "rms_norm_eps", source, 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=bool(tied),
        )
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    refuse_unless(
        tree.get("head_dim") in (None, config.head_dim), "head_dim", f"hidden_size / heads = {config.head_dim}"
    )
    window = tree.get("sliding_window")
    unused = window is None or tree.get("use_sliding_window") is False
    whole = type(window) is int and config.context <= window < 2**31
    refuse_unless(unused or whole, "sliding_window", "null")
    kinds = tree.get("layer_types")
    full = kinds is None or (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds))
    refuse_unless(full, "layer_types", "full attention in every layer")
    return config


def read_tree(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder, unchanged.

    Raises:
        CheckpointError: no such folder, no readable config.json, an adapter without its model, or quantized weights.
    """
    folder = Path(folder)
    refuse_pointer(folder / "config.json")
    if not (folder / "config.json").is_file():
        refuse_adapter(folder)
        if not folder.is_dir():
            hub = len(folder.parts) == 2 and not folder.is_absolute()
            fetch = f"; download a model of the Hub first: hf download {folder} --local-dir FOLDER" if hub else ""
            raise CheckpointError(f"{folder}: no such folder, so config.json is missing{fetch}")
        raise CheckpointError(f"no model in {folder}: config.json is missing (was saving the folder interrupted?)")
    tree = read_object(folder / "config.json")
    for key in ("quantization_config", "compression_config"):
        if tree.get(key) is not None:
            method = tree[key].get("quant_method", "") if isinstance(tree[key], dict) else tree[key]
            raise CheckpointError(
                f"{folder / 'config.json'}: {key} says that the weights are quantized ({method}); training needs them "
                "in float32, bfloat16 or float16: name a folder of the model before quantization"
            )
    return tree


def read_config(folder: str | Path) -> LlamaConfig:
    """`config_from_hf` of a folder. Raises as `read_tree` too."""
    return config_from_hf(read_tree(folder), str(Path(folder) / "config.json"))


def _count(tree: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = default if tree.get(key) is None else tree[key]
    if value is None:
        raise CheckpointError(f"{source}: {key} is missing")
    if type(value) is not int or not 0 < value < 2**31:
        raise CheckpointError(f"{source}: {key} is {value!r}; it must be an integer above 0 and below 2^31")
    return value


def _positive(tree: Mapping[str, Any], key: str, source: str, default: float | None = None) -> float:
    value = default if tree.get(key) is None else tree[key]
    if value is None:
        raise CheckpointError(f"{source}: {key} is missing")
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"{source}: {key} is {value!r}; it must be a number above 0")
    return float(value)


def _rope_from_hf(tree: Mapping[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from either spelling: rope_theta + rope_scaling, or transformers 5's rope_parameters.

    If a file has both, the one that transformers uses counts.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(tree.get(key) or {}, Mapping):
            raise CheckpointError(
                f"{source}: {key} is {tree[key]!r}; it must be an object such as {{'rope_type': ...}}"
            )
    rope: Mapping[str, Any] = tree.get("rope_scaling") or tree.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise CheckpointError(f"{source}: rope_parameters differ by layer; this network has one rotation for all")
    rope = {"partial_rotary_factor": tree.get("partial_rotary_factor"), "rope_theta": tree.get("rope_theta"), **rope}
    theta = _positive(rope, "rope_theta", source, _positive(tree, "rope_theta", source, 10_000.0))
    if rope["partial_rotary_factor"] not in (None, 1):
        raise CheckpointError(
            f"{source}: partial_rotary_factor is {rope['partial_rotary_factor']!r}; this network rotates whole heads"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f"{source}: rope type {kind!r} is not supported (known: default, llama3)")
    context = _count(tree, "max_position_embeddings", source, 2048)
    original = _count({**rope, **tree}, "original_max_position_embeddings", source, context)
    factor, low, high = (_positive(rope, key, source) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if low > high:
        raise CheckpointError(f"{source}: low_freq_factor = {low:g} is above high_freq_factor = {high:g}")
    return theta, RopeScaling(factor, low, high, original)


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The special ids, with every stop token, as config.json and generation_config.json write them."""
    stops = list(tokenizer.stop_ids)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops if len(stops) > 1 else stops[0],
        "pad_token_id": tokenizer.pad_id,
    }
