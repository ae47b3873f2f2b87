"""The published Llama sizes by name, and small models from a recipe's numbers."""

import math
from dataclasses import replace

from infra.errors import ConfigError
from models.llama import LlamaConfig, RopeScaling


def ffn_width(dim: int, multiple_of: int = 256, multiplier: float = 1.0) -> int:
    """Feed-forward width: multiple_of * ceil(int(multiplier * int(2/3 * 4 dim)) / multiple_of) (Meta's reference code).

    SwiGLU has three matrices instead of two, so that 2/3 of the customary 4 dim keeps the size.
    """
    width = int(multiplier * int(2 * 4 * dim / 3))
    return multiple_of * math.ceil(width / multiple_of)


def preset_names() -> list[str]:
    """Every name that `preset` knows, e.g. "llama3.1-8b"."""
    return sorted(_table())


def preset(name: str) -> LlamaConfig:
    """The architecture of a published model.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    table = _table()
    if name not in table:
        raise ConfigError(f"unknown model preset {name!r}; known: {', '.join(sorted(table))}")
    return table[name]


def scratch_config(
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab_size: int,
    context: int,
    *,
    ffn_dim: int | None = None,
    rope_theta: float = 10_000.0,
    tied: bool = True,
) -> LlamaConfig:
    """A model from a recipe's own numbers; the tiny one: dim 128, 4 layers, 4 heads, 2 key/value heads, context 256.

    `vocab_size` is the trained tokenizer's. Without `ffn_dim` the width is `ffn_width`, rounded to 32 below dim 1024.

    Raises:
        ConfigError: heads do not divide dim, or kv_heads do not divide heads.
    """
    width = ffn_dim or ffn_width(dim, multiple_of=32 if dim < 1024 else 256)
    try:
        return LlamaConfig(dim, layers, heads, kv_heads, width, vocab_size, context, rope_theta=rope_theta, tied=tied)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def _table() -> dict[str, LlamaConfig]:
    """Dimensions from the papers' tables."""
    shapes = {
        "7b": (4096, 32, 32, 32, 11008),
        "13b": (5120, 40, 40, 40, 13824),
        "33b": (6656, 60, 52, 52, 17920),
        "65b": (8192, 80, 64, 64, 22016),
        "34b": (8192, 48, 64, 8, 22016),
        "llama2-70b": (8192, 80, 64, 8, 28672),
        "1b": (2048, 16, 32, 8, 8192),
        "3b": (3072, 28, 24, 8, 8192),
        "8b": (4096, 32, 32, 8, 14336),
        "70b": (8192, 80, 64, 8, 28672),
        "405b": (16384, 126, 128, 8, 53248),
    }

    def config(size: str, vocab_size: int, context: int, theta: float, eps: float = 1e-5) -> LlamaConfig:
        return LlamaConfig(*shapes[size], vocab_size, context, norm_eps=eps, rope_theta=theta)

    table: dict[str, LlamaConfig] = {}
    for size in ("7b", "13b", "33b", "65b"):
        table[f"llama1-{size}"] = config(size, 32_000, 2048, 1e4, eps=1e-6)
    for size in ("7b", "13b", "34b"):
        table[f"llama2-{size}"] = config(size, 32_000, 4096, 1e4)
        table[f"codellama-{size}"] = config(size, 32_000 if size == "34b" else 32_016, 16_384, 1e6)
    table["llama2-70b"] = config("llama2-70b", 32_000, 4096, 1e4)
    table["codellama-70b"] = config("llama2-70b", 32_016, 16_384, 1e6)
    for size in ("8b", "70b"):
        table[f"llama3-{size}"] = config(size, 128_256, 8192, 5e5)
    for size in ("8b", "70b", "405b"):
        table[f"llama3.1-{size}"] = replace(config(size, 128_256, 131_072, 5e5), rope_scaling=RopeScaling(factor=8.0))
    for size in ("1b", "3b"):
        scaled = replace(config(size, 128_256, 131_072, 5e5), rope_scaling=RopeScaling(factor=32.0))
        table[f"llama3.2-{size}"] = replace(scaled, tied=True)
    return table
