"""The benchmark of model FLOPs utilisation in miniature, on whatever device there is."""

import pytest
import torch

from bench import mfu


def test_every_method_is_measured_and_leaves_no_gradient_for_the_next_step() -> None:
    config = mfu.shape(dim=64, layers=2, tokens=16)
    x = torch.randn(1, 16, 64, requires_grad=True)
    mfu.step_of("eager", config, x)()
    assert x.grad is None
    figures = mfu.run(config, 1, 16, 2, ["eager", "transformers"], peak=1.0)
    assert figures["mfu"] == pytest.approx(figures["tflops_per_s"]["eager"], abs=1e-4)
    assert figures["mfu_causal"] <= figures["mfu"] and set(figures["step_s"]) == {"eager", "transformers"}
    assert "transformers" in mfu.table(figures)


def test_flops_of_a_block_of_llama_3_8b() -> None:
    """By hand: 2 x 4096 x 4096 + 2 x 4096 x 1024 + 3 x 4096 x 14336 weights and three norms; attention 12 D T."""
    weights = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 3 * 4096
    expected = 8192 * (6 * weights + 12 * 4096 * 8192)
    assert mfu.flops(mfu.shape(4096, 1, 8192), 1, 8192, causal=False) == pytest.approx(expected)
    assert mfu.flops(mfu.shape(4096, 1, 8192), 1, 8192, causal=True) == pytest.approx(expected - 8192 * 6 * 4096 * 8192)


def test_a_width_that_has_no_whole_heads_is_refused() -> None:
    with pytest.raises(SystemExit, match="--dim 100"):
        mfu.shape(dim=100, layers=1, tokens=16)
