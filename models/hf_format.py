"""Hugging Face's names and config.json for a Llama <-> ours. The tensors themselves are the same, none is permuted."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.errors import CheckpointError
from models.llama import LlamaConfig, RopeScaling
from models.tokenizer import Tokenizer


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
        CheckpointError: it is no Llama, or uses something that our network does not have; the key is named.
    """

    def refuse_unless(condition: bool, key: str, wanted: str) -> None:
        if not condition:
            raise CheckpointError(f"{source}: {key} is {tree.get(key)!r}; this network needs {wanted}")

    refuse_unless(tree.get("model_type") == "llama", "model_type", "'llama'")
    refuse_unless(tree.get("hidden_act", "silu") == "silu", "hidden_act", "'silu'")
    refuse_unless(not tree.get("attention_bias"), "attention_bias", "false")
    refuse_unless(not tree.get("mlp_bias"), "mlp_bias", "false")
    try:
        theta, scaling = _rope_from_hf(tree, source)
        config = LlamaConfig(
            dim=tree["hidden_size"],
            layers=tree["num_hidden_layers"],
            heads=tree["num_attention_heads"],
            kv_heads=tree.get("num_key_value_heads") or tree["num_attention_heads"],
            ffn_dim=tree["intermediate_size"],
            vocab_size=tree["vocab_size"],
            context=tree.get("max_position_embeddings", 2048),
            norm_eps=tree.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=bool(tree.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise CheckpointError(f"{source}: {error.args[0]} is missing") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from None
    refuse_unless(
        tree.get("head_dim") in (None, config.head_dim), "head_dim", f"hidden_size / heads = {config.head_dim}"
    )
    return config


def read_config(folder: str | Path) -> LlamaConfig:
    """`config_from_hf` of a folder; CheckpointError where there is no readable config.json."""
    file = Path(folder) / "config.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"no model in {folder}: config.json is missing (was the folder written to its end?)"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    return config_from_hf(tree, str(file))


def _rope_from_hf(tree: Mapping[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from either spelling: rope_theta + rope_scaling, or transformers 5's rope_parameters."""
    rope = tree.get("rope_parameters") or {"rope_theta": tree.get("rope_theta"), **(tree.get("rope_scaling") or {})}
    theta = float(rope.get("rope_theta") or tree.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f"{source}: rope type {kind!r} is not supported (known: default, llama3)")
    original = rope.get("original_max_position_embeddings") or tree["max_position_embeddings"]
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    return theta, RopeScaling(factor, low, high, int(original))


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The special ids, every stop token among them, as config.json and generation_config.json spell them."""
    stops = list(tokenizer.stop_ids)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops if len(stops) > 1 else stops[0],
        "pad_token_id": tokenizer.pad_id,
    }
