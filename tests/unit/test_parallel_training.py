"""Pipeline stages, alone and with the other ways to shard: the run of one process, from real gloo ranks."""

from pathlib import Path

import pytest
import torch
from test_torch_learner_parallel import Layout, assert_same_run, build, on_ranks, train, train_layout

from engines.ranks import Ranks
from models.llama import LlamaConfig
from models.parallelize import stage_layers, stage_of


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def network(layers: int, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        dim=8, layers=layers, heads=2, kv_heads=1, ffn_dim=8, vocab_size=8, context=8, tied=tied
    )  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (2, 2, [1, 1]),
        (3, 2, [2, 1]),
        (4, 4, [1, 1, 1, 1]),
        (32, 4, [8, 8, 8, 8]),
        (126, 16, [7] + [8] * 14 + [7]),  # Llama 3 405B: one layer less at both ends
    ],
)
def test_parallel_stages_share_the_layers(layers: int, stages: int, expected: list[int]) -> None:
    parts = stage_layers(network(layers), stages)
    assert [len(part) for part in parts] == expected
    assert [number for part in parts for number in part] == list(range(layers))


def test_parallel_stage_of_every_parameter() -> None:
    config = network(3)
    assert [stage_of(config, f"layers.{n}.attention.wq.weight", 2) for n in range(3)] == [0, 0, 1]
    assert [stage_of(config, f"{end}.weight", 2) for end in ("tok_embeddings", "norm", "output")] == [0, 1, 1]
    with pytest.raises(ValueError, match="pipeline_parallel 4 exceeds the network's 3 layers"):
        stage_layers(config, 4)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, pipeline_parallel=2, fsdp=False),  # fewer micro-batches than stages
        Layout(2, pipeline_parallel=2, tied=True, micro_batches=4, activation_checkpointing=True),
        Layout(4, pipeline_parallel=2, micro_batches=2, tied=True),
        Layout(4, pipeline_parallel=2, tensor_parallel=2, micro_batches=4, fsdp=False),
    ],
    ids=str,
)
def test_parallel_pipeline_training_is_that_of_one_process(layout: Layout, tmp_path: Path) -> None:
    expected = train(build(Layout(1, tied=layout.tied), Ranks()))
    assert_same_run(on_ranks(train_layout, layout, tmp_path), expected)
