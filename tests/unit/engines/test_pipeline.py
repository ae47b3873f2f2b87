"""Pipeline stages, alone and with the other ways to shard: the run of one process, from real gloo ranks."""

import dataclasses
from pathlib import Path

import pytest
import torch
from test_torch_learner import (
    Digits,
    Layout,
    assert_same_run,
    build,
    load_halfway,
    on_ranks,
    pretrain_steps,
    resume,
    snapshot_in_the_middle,
    train,
    train_layout,
)

from actors.pretrain.config import PretrainSettings
from data.tokenized import write_shards
from engines.base import Batch
from engines.collectives.ranks import Ranks
from engines.snapshots import FolderSource, Sources
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


def test_parallel_settings_of_pretraining_say_the_block_once() -> None:
    settings = PretrainSettings(workers=8, tensor_parallel=2, pipeline_parallel=2)
    assert settings.block == 4
    group = settings.group()
    assert (group.min_workers, group.max_workers, group.tensor_parallel, group.pipeline_parallel) == (4, 8, 2, 2)
    with pytest.raises(ValueError, match="workers 6 must divide by tensor_parallel 2 x pipeline_parallel 2"):
        PretrainSettings(workers=6, tensor_parallel=2, pipeline_parallel=2)
    with pytest.raises(ValueError, match="pipeline_parallel is pipeline_parallel: leave it out"):
        PretrainSettings(workers=2, pipeline_parallel=2, elastic={"pipeline_parallel": 1})


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, pipeline_parallel=2, fsdp=False),  # fewer micro-batches than stages
        Layout(2, pipeline_parallel=2, tied=True, micro_batches=4, activation_checkpointing=True),
        Layout(4, pipeline_parallel=2, micro_batches=2, tied=True),
        Layout(4, pipeline_parallel=2, tensor_parallel=2, micro_batches=4, fsdp=False),
        Layout(8, pipeline_parallel=4, tied=True, micro_batches=2, layers=5),
        Layout(4, shard_over=2, tied=True),
        Layout(8, tensor_parallel=2, shard_over=2, micro_batches=2),
        Layout(8, pipeline_parallel=2, tensor_parallel=2, micro_batches=2, activation_checkpointing=True),
    ],
    ids=["pp2", "pp2-tied", "dp2-pp2", "pp2-tp2", "dp2-pp4", "hsdp4", "hsdp4-tp2", "dp2-pp2-tp2"],
)
def test_parallel_training_is_that_of_one_process(layout: Layout, tmp_path: Path) -> None:
    expected = train(build(Layout(1, tied=layout.tied, layers=layout.layers), Ranks()))
    assert_same_run(on_ranks(train_layout, layout, tmp_path), expected)


def test_parallel_stages_in_bfloat16_follow_float32(tmp_path: Path) -> None:
    expected = train(build(Layout(1), Ranks()))
    found = on_ranks(train_layout, Layout(4, pipeline_parallel=2, tensor_parallel=2, dtype="bfloat16"), tmp_path)
    assert found["loss"] == pytest.approx(expected["loss"], rel=3e-3)
    assert found["weights"]["lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize("layout", [Layout(2, pipeline_parallel=2, tied=True), Layout(4, pipeline_parallel=2)], ids=str)
def test_parallel_stages_take_rows_as_they_come(layout: Layout, tmp_path: Path) -> None:
    """5 rows in micro-batches of 2 for one replica or two: uneven ones, an empty one, documents within rows (tied)."""
    write_shards((str(10**30 + 7**k) for k in range(12)), Digits(), tmp_path / "tokens")
    alone = pretrain_steps(dataclasses.replace(layout, world_size=1), Ranks(), tmp_path)
    assert on_ranks(pretrain_steps, layout, tmp_path) == pytest.approx(alone, rel=1e-4)


def test_parallel_snapshot_of_stages_resumes_on_any_other_mesh(tmp_path: Path) -> None:
    taken = on_ranks(snapshot_in_the_middle, Layout(4, pipeline_parallel=2, tied=True), tmp_path)
    for other in (
        Layout(2, pipeline_parallel=2, tied=True, fsdp=False, micro_batches=2),
        Layout(4, tensor_parallel=2, tied=True),
        Layout(4, shard_over=2, tied=True),
    ):
        assert_same_run(on_ranks(resume, other, tmp_path), taken)


@pytest.mark.parametrize("tied", [False, True])
def test_parallel_snapshot_of_stages_loads_in_one_process_and_not_without_a_stage(tied: bool, tmp_path: Path) -> None:
    expected = on_ranks(snapshot_in_the_middle, Layout(2, pipeline_parallel=2, fsdp=False, tied=tied), tmp_path)
    learner = load_halfway(build(Layout(1, tied=tied), Ranks()), tmp_path)
    assert_same_run(train(learner, start=2), expected)
    for shard in (tmp_path / "shards").glob("*rank-00001*"):
        shard.unlink()
    assert Sources([FolderSource(tmp_path / "shards")]).snapshots() == []


def wrong_on_the_first_stage(layout: Layout, ranks: Ranks, folder: Path) -> list[bool]:
    """The weights of stage 0 alone turn bad: its gradient is not finite, and nobody moves."""
    learner = build(layout, ranks)
    if ranks.stage == 0:
        with torch.no_grad():
            next(iter(learner.optimizer.parameters.values())).fill_(float("inf"))
    before = [part.clone() for part in learner.optimizer.parameters.values()]
    tokens = torch.zeros(2, 8, dtype=torch.long)

    def loss_fn(module: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        return module(batch["input_ids"]).nan_to_num().mean(), {"rows": len(batch["input_ids"])}

    output = learner.train_step([{"input_ids": tokens}], loss_fn)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, learner.optimizer.parameters.values(), strict=True))
    told = (output.committed, unchanged, output.metrics, ranks.totals, output.grad_norm)
    votes = ranks.gather(told)
    results = learner.evaluate([{"input_ids": tokens[:1]}, {"input_ids": tokens}], lambda m, b: m(b["input_ids"]).shape)
    found = ranks.gather([tuple(shape) for shape in results])
    expected = (False, True, {"rows": 2}, {"rows": 2}, float("inf"))
    return [votes == [expected] * 2, found == [[(1, 8, 40), (2, 8, 40)]] * 2]


def test_parallel_stages_commit_together_and_all_know_the_metrics(tmp_path: Path) -> None:
    assert on_ranks(wrong_on_the_first_stage, Layout(2, pipeline_parallel=2, fsdp=False), tmp_path) == [True, True]
