"""The snapshot benchmark in miniature: every method runs, and its figures are those that it promises."""

from pathlib import Path

import pytest

from bench import snapshot
from models.llama import LlamaConfig

TINY = LlamaConfig(dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=16, vocab_size=32, context=snapshot.SEQUENCE)


def test_every_method_is_measured_beside_a_step_without(tmp_path: Path) -> None:
    figures = snapshot.run(TINY, [512], 3, snapshot.METHODS, tmp_path)
    assert figures["tokens_per_step"] == 512 and figures["state_mib"] * 2**20 == 3 * 4 * figures["parameters"]
    low, high = figures["overhead_ci"]
    assert low <= figures["overhead_every_step"] <= high
    assert set(figures["cpu_s"]) == {"off", *snapshot.METHODS} and all(cpu > 0 for cpu in figures["cpu_s"].values())
    assert figures["sizes"]["512"]["rounds"] == 3
    assert "torch_save" in snapshot.table(figures)
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_an_overhead_is_the_median_of_the_rounds() -> None:
    without, doubled = snapshot.Timings([1.0, 2.0, 4.0]), snapshot.Timings([2.0, 4.0, 9.0])
    middle, (low, high) = snapshot.overhead(doubled, without)
    assert middle == pytest.approx(1.0) and low == pytest.approx(1.0) and high == pytest.approx(1.25)
