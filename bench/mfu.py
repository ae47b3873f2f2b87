"""Model FLOPs utilisation of Llama blocks, forward and backward, compared with Hugging Face's blocks of the same shape.

    python -m bench.mfu                            # one block of Llama 3 8B, bf16, compiled, 8,192 tokens
    python -m bench.mfu --json                     # the same; one JSON object on the last line
    python -m bench.mfu --layers 4 --batch 2       # more blocks, more sequences
    python -m bench.mfu --dim 256 --tokens 128     # a small block, for a machine without a GPU

In each round every method does one step in turn (forward and backward of all blocks; no optimizer). The first rounds
are not measured; figures are medians.

  recua           `models.llama`, each block compiled as in training
  eager           the same without torch.compile
  transformers    `LlamaDecoderLayer` with torch's attention, compiled

`mfu` counts 6 FLOPs per weight and token, and 12 D T for attention (PaLM, appendix B), over the dense bf16 peak of the
GPU; `mfu_causal` counts only the half of attention that a causal mask leaves. Both are null if the peak is not known;
--peak sets it.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.llama import Llama, LlamaConfig, flops_per_token, rope_rotation
from models.parallelize import parallelize

METHODS = ("recua", "eager", "transformers")
LLAMA_8B = LlamaConfig(
    dim=4096, layers=1, heads=32, kv_heads=8, ffn_dim=14336, vocab_size=0, context=8192, rope_theta=500_000.0
)
PEAKS = {"H100 PCIe": 756.0, "H100": 989.4, "H200": 989.4, "GH200": 989.4, "A100": 312.0, "B200": 2250.0}
"""Dense bf16 TFLOP/s by a part of the device's name, from NVIDIA's data sheets; the longest matching part counts."""
WARM_UP = 3
Step = Callable[[], None]


def shape(dim: int, layers: int, tokens: int) -> LlamaConfig:
    """Blocks with the proportions of Llama 3 8B: heads of width 128 if possible, four query heads per key head."""
    if dim == LLAMA_8B.dim:
        return replace(LLAMA_8B, layers=layers, context=tokens)
    width = min(128, dim // 4)
    if width % 2 or dim % (4 * width):
        raise SystemExit(f"--dim {dim}: give a multiple of 512, or a smaller multiple of 8")
    heads = dim // width
    return replace(
        LLAMA_8B, dim=dim, layers=layers, heads=heads, kv_heads=heads // 4, ffn_dim=dim * 7 // 2, context=tokens
    )


def step_of(method: str, config: LlamaConfig, x: Tensor) -> Step:
    """One forward and backward pass through all blocks, from hidden states x [B, T, D]."""
    if method == "transformers":
        return _transformers_step(config, x)
    with torch.device("meta"):
        model = Llama(replace(config, vocab_size=1))
    model.tok_embeddings = model.norm = model.output = None  # a stage in the middle of a pipeline
    parallelize(model=model, mesh=None, compile_blocks=method == "recua")
    model.to_empty(device=x.device).to(x.dtype).init_weights()
    return lambda: _train(model, model(x), x)


def _transformers_step(config: LlamaConfig, x: Tensor) -> Step:
    from transformers import LlamaConfig as Config
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    theirs = Config(
        hidden_size=config.dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        intermediate_size=config.ffn_dim,
        rms_norm_eps=config.norm_eps,
    )
    theirs._attn_implementation = "sdpa"
    layers = torch.nn.ModuleList(LlamaDecoderLayer(theirs, number) for number in range(config.layers))
    layers.to(x.device, x.dtype)
    for layer in layers:
        layer.compile()
    cos, sin = rope_rotation(config, torch.arange(x.shape[1], device=x.device)[None])
    rotation = tuple(torch.cat((half, half), dim=-1)[:, :, 0].to(x.dtype) for half in (cos, sin))

    def step() -> None:
        hidden = x
        for layer in layers:
            hidden = layer(hidden, position_embeddings=rotation)
        _train(layers, hidden, x)

    return step


def _train(module: torch.nn.Module, hidden: Tensor, x: Tensor) -> None:
    hidden.backward(torch.ones_like(hidden))
    module.zero_grad(set_to_none=True)
    x.grad = None


def flops(config: LlamaConfig, sequences: int, tokens: int, causal: bool) -> float:
    """FLOPs of one step, by the convention in the module's docstring."""
    per_token = flops_per_token(config, tokens)
    if causal:
        per_token -= 6.0 * config.layers * config.dim * tokens
    return sequences * tokens * per_token


def peak_of(device: torch.device) -> float | None:
    """The device's dense bf16 TFLOP/s; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [part for part in PEAKS if part in name]
    return PEAKS[max(known, key=len)] if known else None


def run(
    config: LlamaConfig, sequences: int, tokens: int, rounds: int, methods: list[str], peak: float | None
) -> dict[str, Any]:
    """The figures that `--json` prints."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    x = torch.randn(sequences, tokens, config.dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    steps = {method: step_of(method, config, x) for method in methods}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for number in range(WARM_UP + rounds):
        print(f"\rround {number + 1} of {WARM_UP + rounds}", end="", file=sys.stderr, flush=True)
        for method in methods:
            began = time.perf_counter()
            steps[method]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= WARM_UP:
                seconds[method].append(time.perf_counter() - began)
    print(file=sys.stderr)
    middle = {method: statistics.median(times) for method, times in seconds.items()}
    peak = peak or peak_of(device)
    counted = {name: flops(config, sequences, tokens, name == "mfu_causal") / 1e12 for name in ("mfu", "mfu_causal")}
    rates = {method: counted["mfu"] / one for method, one in middle.items()}
    headline = methods[0]
    return {
        **{name: peak and round(work / middle[headline] / peak, 4) for name, work in counted.items()},
        "method": headline,
        "tflops_per_s": {method: round(rate, 4) for method, rate in rates.items()},
        "step_s": {method: round(one, 6) for method, one in middle.items()},
        "against_transformers": round(rates[headline] / rates["transformers"], 3) if "transformers" in rates else None,
        "peak_tflops_per_s": peak,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": "bfloat16",
        "dim": config.dim,
        "layers": config.layers,
        "sequences": sequences,
        "tokens": tokens,
        "rounds": rounds,
        "torch": torch.__version__,
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        f"{figures['layers']} block(s) of width {figures['dim']}, {figures['sequences']} x {figures['tokens']} tokens, "
        f"{figures['dtype']}, {figures['device']}"
    ]
    for method, rate in figures["tflops_per_s"].items():
        share = f"   {rate / figures['peak_tflops_per_s']:.1%} of the peak" if figures["peak_tflops_per_s"] else ""
        lines.append(f"  {method:<14}{figures['step_s'][method] * 1000:>10.2f} ms{rate:>10.2f} TFLOP/s{share}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=LLAMA_8B.dim, help="width; the rest keeps Llama 3 8B's proportions")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--tokens", type=int, default=8192, help="in each sequence")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device in dense bf16")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    config = shape(given.dim, given.layers, given.tokens)
    figures = run(config, given.batch, given.tokens, given.rounds, given.methods, given.peak)
    print(json.dumps(figures) if given.json else table(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
