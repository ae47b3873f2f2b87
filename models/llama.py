"""The Llama network (Touvron et al. 2023; Llama 2 2023; Llama 3 2024), in the order of the papers.

Shapes: B sequences, T tokens, D model width, H query heads, K key/value heads, d = D / H head width, F feed-forward
width, V vocabulary. Parameter names are Meta's; the rotary halves are laid out as in Hugging Face checkpoints.
This file knows nothing of sharding. `layers` is keyed by number, so that a pipeline stage keeps its layers under their
own names; the ends may be None; head counts follow from the tensors' shapes.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary wavelengths, from `original_context` to `factor` times as many positions."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture. `kv_heads < heads` is grouped-query attention; `context` is the longest trained sequence.

    Example (Llama 3.2 1B): dim=2048, layers=16, heads=32, kv_heads=8, ffn_dim=8192, vocab_size=128256, tied=True.
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocab_size: int
    context: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    """The output matrix is the embedding matrix."""

    def __post_init__(self) -> None:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim {self.dim} / heads {self.heads} must be a whole, even head width")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


def parameter_count(config: LlamaConfig) -> int:
    """Parameters of the network, the tied matrix counted once."""
    kv_dim = config.kv_heads * config.head_dim
    attention = 2 * config.dim * config.dim + 2 * config.dim * kv_dim
    layer = attention + 3 * config.dim * config.ffn_dim + 2 * config.dim
    ends = config.vocab_size * config.dim * (1 if config.tied else 2)
    return config.layers * layer + ends + config.dim


def flops_per_token(config: LlamaConfig, tokens: int) -> float:
    """Training FLOPs per token at sequence length `tokens`: 6 a weight + 12 L D T for attention (PaLM, appendix B)."""
    lookup = 0 if config.tied else config.vocab_size * config.dim
    return 6.0 * (parameter_count(config) - lookup) + 12.0 * config.layers * config.dim * tokens


def rope_frequencies(config: LlamaConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position [d/2]: theta^(-2i/d), with Llama 3.1's scaling applied.

    Wavelengths above original_context / low_freq_factor are stretched by `factor`, those below original_context /
    high_freq_factor are left alone, those between are blended linearly in 1 / wavelength.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_context * frequencies / (2 * math.pi)  # rotations within the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rope_rotation(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, d/2] in fp32 of every position's angles."""
    angles = positions[..., None, None].float() * rope_frequencies(config, positions.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) of x [B, T, heads, d] by its angle."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attention_mask(segment_ids: Tensor) -> Tensor:
    """[B, 1, T, T] bool, True if a query (row) may attend to a key: not ahead, and only within its own segment.

    Padding (segment 0) attends to padding, so that no row is empty.
    """
    tokens = segment_ids.shape[1]
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same & torch.ones(tokens, tokens, dtype=torch.bool, device=segment_ids.device).tril()


class Attention(nn.Module):
    """Causal self-attention; each of K key/value heads serves H / K query heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        q = rotate(self.wq(x).unflatten(-1, (-1, self.head_dim)), rotation).transpose(1, 2)  # [B, H, T, d]
        k = rotate(self.wk(x).unflatten(-1, (-1, self.head_dim)), rotation).transpose(1, 2)  # [B, K, T, d]
        v = self.wv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, K, T, d]
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return self.wo(out.transpose(1, 2).flatten(2))  # [B, T, D]


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """tokens [B, T] -> logits [B, T, V].

    `tok_embeddings`, and `norm` with `output`, may be None on a pipeline stage that does not hold that end. The stage
    then takes, or returns, hidden states [B, T, D].
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings: nn.Embedding | None = nn.Embedding.from_pretrained(
            torch.zeros(config.vocab_size, config.dim), freeze=False
        )  # random values on the meta device would import torch's compiler, 0.7 s of CPU
        self.layers = nn.ModuleDict({str(number): Block(config) for number in range(config.layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output: nn.Linear | None = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Share the embedding with the output if the config says so. Call again after `to_empty` or sharding."""
        if self.config.tied and self.output is not None and self.tok_embeddings is not None:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor, positions: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] in the dtype of the weights.

        `positions` [B, T] default to 0 ... T-1. `segment_ids` [B, T] number the documents in a packed row (0 = padding)
        and keep attention within a document. Without them padding must be on the right, where causal attention hides it
        from the real tokens. A stage without embeddings takes hidden states [B, T, D] as `tokens`.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        rotation = rope_rotation(self.config, positions)
        mask = None if segment_ids is None else attention_mask(segment_ids)
        x = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)
        for block in self.layers.values():
            x = block(x, rotation, mask)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.output is None else self.output(x)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> "Llama":
        """Fill every parameter with `initial_tensor`; returns self."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_tensor(self.config, name, tuple(parameter.shape), seed))
        return self


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the whole network's parameters by name, in order; a tied matrix once."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Llama(config).named_parameters()}


def whole_name(config: LlamaConfig, name: str) -> str:
    """The whole network's name for a stage's parameter: the last stage holds a tied embedding as its output."""
    return "tok_embeddings.weight" if config.tied and name == "output.weight" else name


def initial_tensor(config: LlamaConfig, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The fp32 CPU start value of one whole parameter: a function of the seed and the name, never of the sharding.

    Norms are 1; matrices are normal with deviation D^-1/2 (LeCun 1998: equal variance at any width; at 7B's width it is
    0.016, near the customary 0.02, which makes narrow models learn several times slower). Those that write into the
    residual stream (wo, w2) are divided by sqrt(2 L), so that its variance does not grow with depth (GPT-2).
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
    deviation = config.dim**-0.5 / (math.sqrt(2 * config.layers) if residual else 1.0)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)
