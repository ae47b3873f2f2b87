"""Sharded against whole: the same losses, gradient norms and weights from real gloo ranks; snapshots change mesh."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from actors.pretrain.batches import BatchLoader, next_token_loss
from actors.pretrain.config import PretrainSettings
from actors.pretrain.job import PretrainJob
from algorithms.logprobs import token_logprobs
from algorithms.sft import sft_loss
from data.tokenized import write_shards
from engines.base import Batch
from engines.collectives.ranks import Ranks
from engines.config import LearnerSettings
from engines.elastic.torch_learner import TorchLearner
from engines.elastic.torch_learner import build as build_learner
from engines.snapshots import FolderSource, SnapshotName, Snapshots, Sources
from infra.errors import CheckpointError
from models.hf_format import to_hf_name
from models.llama import Llama, LlamaConfig
from models.weights import load_llama
from tests.helpers.forks import METHOD

ROWS, TOKENS, STEPS = 8, 16, 4
SETTINGS = LearnerSettings(learning_rate=1e-2, warmup_steps=2, total_steps=8, max_grad_norm=0.5, eps=1e-4)


@dataclass(frozen=True)
class Layout:
    world_size: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    shard_over: int = 0
    fsdp: bool = True
    tied: bool = False
    activation_checkpointing: bool = False
    dtype: str = "float32"
    layers: int = 2
    micro_batches: int = 1


def config(tied: bool, layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        dim=32, layers=layers, heads=4, kv_heads=2, ffn_dim=48, vocab_size=40, context=TOKENS, tied=tied
    )  # fmt: skip


def build(layout: Layout, ranks: Ranks) -> TorchLearner:
    chosen = {"activation_checkpointing": layout.activation_checkpointing, "dtype": layout.dtype}
    settings = SETTINGS.model_copy(update=chosen)
    return build_learner(config(layout.tied, layout.layers), settings, ranks, fsdp=layout.fsdp, seed=3)


def take_step(learner: TorchLearner, step: int, micro_batches: int, poison: bool = False) -> dict[str, Any]:
    """Rows are dealt to the replicas in contiguous parts; masks make token counts uneven."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 40, (ROWS, TOKENS), generator=generator)
    mask = (torch.rand(ROWS, TOKENS, generator=generator) < torch.linspace(0.2, 1.0, ROWS)[:, None]).float()
    mask[:, 0] = 0
    denominator = mask.sum()
    share = ROWS // learner.ranks.data_size
    own = slice(learner.ranks.data_rank * share, (learner.ranks.data_rank + 1) * share)
    batches = [
        {"input_ids": ids, "mask": m}
        for ids, m in zip(tokens[own].chunk(micro_batches), mask[own].chunk(micro_batches), strict=True)
    ]

    def loss_fn(module: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        logprobs = token_logprobs(module(batch["input_ids"]), batch["input_ids"])
        loss = sft_loss(logprobs, batch["mask"], denominator)
        if poison and learner.rank == learner.world_size - 1:
            loss = loss * float("nan")
        return loss, {"loss": float(loss.detach())}

    output = learner.train_step(batches, loss_fn)
    assert output.committed is not poison
    return {"loss": learner.ranks.sum(output.metrics)["loss"], "norm": output.grad_norm, "lr": output.learning_rate}


def train(learner: TorchLearner, micro_batches: int = 1, start: int = 0) -> dict[str, Any]:
    curve = [take_step(learner, step, micro_batches) for step in range(start, STEPS)]
    weights = {name: tensor.clone() for name, tensor in learner.export()}
    return {"loss": [c["loss"] for c in curve], "norm": [c["norm"] for c in curve], "weights": weights}


def in_rank(rank: int, task: Callable, layout: Layout, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=layout.world_size)
    ranks = Ranks.over_all(layout.tensor_parallel, None, layout.pipeline_parallel, layout.shard_over)
    result = task(layout, ranks, folder)
    if rank == 0:
        torch.save(result, folder / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(task: Callable, layout: Layout, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    mp.start_processes(in_rank, (task, layout, folder), nprocs=layout.world_size, start_method=METHOD)
    return torch.load(folder / "result.pt")


def train_layout(layout: Layout, ranks: Ranks, folder: Path) -> dict[str, Any]:
    return train(build(layout, ranks), layout.micro_batches)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["norm"], expected["norm"], rtol=1e-4, atol=1e-6)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, tensor in found["weights"].items():
        torch.testing.assert_close(tensor, expected["weights"][name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2),
        Layout(2, tied=True, activation_checkpointing=True, micro_batches=2),
        Layout(2, fsdp=False, tied=True),
        Layout(2, tensor_parallel=2),
        Layout(2, tensor_parallel=2, fsdp=False, tied=True),
        Layout(4, tensor_parallel=2, tied=True, activation_checkpointing=True),
    ],
    ids=str,
)
def test_sharded_training_is_that_of_one_process(layout: Layout, tmp_path: Path) -> None:
    expected = train(build(Layout(1, tied=layout.tied), Ranks()))
    assert_same_run(on_ranks(train_layout, layout, tmp_path), expected)


def test_one_process_matches_plain_adamw() -> None:
    """By hand: torch's own model, optimizer, clipping and the schedule's numbers."""
    learner = build(Layout(1), Ranks())
    found = train(learner, micro_batches=2)
    model = Llama(config(tied=False)).init_weights(seed=3)
    decays = {p.dim() >= 2: [] for p in model.parameters()}
    for p in model.parameters():
        decays[p.dim() >= 2].append(p)
    optimizer = torch.optim.AdamW(
        [{"params": decays[True], "weight_decay": 0.1}, {"params": decays[False], "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-4,
    )  # fmt: skip
    peak = 1e-2  # warm-up 2 steps, then cosine over total 8 to 10%
    progress = [1 / 6, 2 / 6]
    rates = [peak / 2, peak] + [
        peak * (0.1 + 0.45 * (1 + torch.cos(torch.tensor(torch.pi * p)).item())) for p in progress
    ]
    for step, rate in enumerate(rates):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 40, (ROWS, TOKENS), generator=generator)
        mask = torch.rand(ROWS, TOKENS, generator=generator) < torch.linspace(0.2, 1.0, ROWS)[:, None]
        logprobs = model(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        loss = -(logprobs * mask[:, 1:]).sum() / mask[:, 1:].sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        assert found["loss"][step] == pytest.approx(loss.item(), rel=1e-5)
        assert found["norm"][step] == pytest.approx(norm.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            found["weights"][to_hf_name(name)], parameter.detach(), rtol=1e-4, atol=1e-5, msg=name
        )


def poisoned(layout: Layout, ranks: Ranks, folder: Path) -> list[bool]:
    learner = build(layout, ranks)
    before = {name: tensor.clone() for name, tensor in learner.export()}
    take_step(learner, 0, 1, poison=True)
    unchanged = all(torch.equal(before[name], tensor) for name, tensor in learner.export())
    rate = take_step(learner, 1, 1)["lr"]
    moved = any(not torch.equal(before[name], tensor) for name, tensor in learner.export())
    return [unchanged, moved, rate == learner.learning_rate(1), learner.step == 2]


def test_a_gradient_that_is_not_finite_on_one_rank_is_applied_on_none(tmp_path: Path) -> None:
    assert on_ranks(poisoned, Layout(2, fsdp=False), tmp_path) == [True] * 4
    assert on_ranks(poisoned, Layout(2), tmp_path) == [True] * 4


def snapshot_in_the_middle(layout: Layout, ranks: Ranks, folder: Path) -> dict[str, Any]:
    learner = build(layout, ranks)
    for step in range(2):
        take_step(learner, step, 1)
    learner.snapshots = Snapshots(folder / "shards", "run", 0, ranks.rank, ranks.world_size)
    learner.take_snapshot()
    learner.snapshots.settle()
    learner.snapshots.close()
    learner.snapshots = None
    learner.save_hf(folder / "hf")
    return train(learner, start=2)


def load_halfway(learner: TorchLearner, folder: Path) -> TorchLearner:
    learner.load_snapshot(Sources([FolderSource(folder / "shards")]).reader(SnapshotName(0, 2)))
    assert learner.step == 2
    return learner


def resume(layout: Layout, ranks: Ranks, folder: Path) -> dict[str, Any]:
    return train(load_halfway(build(layout, ranks), folder), start=2)


def test_a_snapshot_resumes_bitwise_and_on_any_other_mesh(tmp_path: Path) -> None:
    taken = on_ranks(snapshot_in_the_middle, Layout(2), tmp_path)
    again = on_ranks(resume, Layout(2), tmp_path)
    assert (again["loss"], again["norm"]) == (taken["loss"], taken["norm"])
    assert all(torch.equal(again["weights"][name], tensor) for name, tensor in taken["weights"].items())
    assert_same_run(on_ranks(resume, Layout(2, fsdp=False), tmp_path), taken)
    assert_same_run(on_ranks(resume, Layout(2, tensor_parallel=2), tmp_path), taken)
    alone = load_halfway(build(Layout(1), Ranks()), tmp_path)
    tokens = torch.arange(TOKENS)[None]
    torch.testing.assert_close(load_llama(tmp_path / "hf")(tokens), alone.module(tokens))
    assert_same_run(train(alone, start=2), taken)


def test_a_foreign_snapshot_is_refused(tmp_path: Path) -> None:
    on_ranks(snapshot_in_the_middle, Layout(1), tmp_path)
    other = dataclasses.replace(config(tied=False), layers=3)
    with pytest.raises(CheckpointError, match="the snapshot has no"):
        load_halfway(build_learner(other, SETTINGS, Ranks(), fsdp=False), tmp_path)


def test_a_model_is_saved_whatever_became_of_its_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{")
    (tokenizer / "LICENSE").write_text("ours")
    learner = build_learner(config(tied=True), SETTINGS, Ranks(), fsdp=False, tokenizer_dir=tokenizer)
    learner.save_hf(tmp_path / "out")
    assert "saved without a tokenizer" in caplog.text
    tokens = torch.arange(TOKENS)[None]
    torch.testing.assert_close(load_llama(tmp_path / "out")(tokens), learner.module(tokens))
    assert (tmp_path / "out" / "LICENSE").read_text() == "ours"


def pretrain_job(folder: Path, micro_batch_size: int, within_documents: bool = False) -> PretrainJob:
    settings = PretrainSettings(
        optimizer=SETTINGS, steps=8, batch_size=5, sequence_length=TOKENS, micro_batch_size=micro_batch_size,
        sharding="fsdp", within_documents=within_documents,
    )  # fmt: skip
    return PretrainJob(folder / "tokens", folder / "tokenizer", config(True), settings, str(folder), seed=1, out=folder)


def pretrain_steps(layout: Layout, ranks: Ranks, folder: Path) -> list[float]:
    learner = build(layout, ranks)
    batches = BatchLoader(pretrain_job(folder, micro_batch_size=2, within_documents=layout.tied), ranks)
    curve = []  # loss, gradient norm, loss, ...
    for step in range(STEPS):
        data = batches.micro_batches(step)
        output = learner.train_step(data.micro_batches, next_token_loss(data.tokens))
        curve += [ranks.sum(output.metrics)["loss"], output.grad_norm]
    return curve


class Digits:
    """A text encoder: one id per character."""

    vocab_size, bos_id, eos_id = 40, 38, 39

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(character) - ord("0") for character in text] for text in texts]


@pytest.mark.parametrize("layout", [Layout(3), Layout(4, tensor_parallel=2, tied=True)], ids=str)
def test_ranks_that_do_not_divide_the_batch_train_the_same(layout: Layout, tmp_path: Path) -> None:
    """5 rows over 3 ranks in micro-batches of 2, and over 2 replicas, where one has an empty micro-batch."""
    write_shards((str(10**30 + 7**k) for k in range(12)), Digits(), tmp_path / "tokens")
    alone = pretrain_steps(dataclasses.replace(layout, world_size=1), Ranks(), tmp_path)
    assert on_ranks(pretrain_steps, layout, tmp_path) == pytest.approx(alone, rel=1e-4)
    loader = BatchLoader(pretrain_job(tmp_path, micro_batch_size=5), Ranks())
    data = loader.micro_batches(0)
    (batch,) = data.micro_batches
    assert data.tokens == batch["targets"].numel() == 5 * TOKENS
    assert torch.equal(batch["input_ids"][:, 1:], batch["targets"][:, :-1])


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_the_text_held_out_is_the_same_for_any_number_of_replicas(replicas: int, tmp_path: Path) -> None:
    write_shards((str(10**30 + 7**k) for k in range(12)), Digits(), tmp_path / "tokens")
    job = pretrain_job(tmp_path, micro_batch_size=2)
    settings = job.settings.model_copy(update={"validate_every": 3, "validation_rows": 7})
    job = dataclasses.replace(job, settings=settings, held_out=tmp_path / "tokens")
    seats: list[Any] = [
        SimpleNamespace(data_rank=rank, data_size=replicas, device=torch.device("cpu")) for rank in range(replicas)
    ]
    loaders = [BatchLoader(job, seat) for seat in seats]
    assert [step for step in range(1, 9) if loaders[0].held_out(step)] == [3, 6, 8]  # 8 is the last step
    parts = [loader.held_out(3) for loader in loaders]
    assert len({len(part) for part in parts}) == 1, "collectives are not equally many"
    targets = torch.cat([batch["targets"] for part in parts for batch in part])
    expected = torch.cat([batch["targets"] for batch in BatchLoader(job, Ranks()).held_out(3)])
    assert torch.equal(targets[targets[:, 0] >= 0], expected) and loaders[0].held_out_tokens() == expected.numel()


def test_a_replica_with_more_rows_than_the_average_says_so(tmp_path: Path) -> None:
    write_shards((str(10**30 + 7**k) for k in range(12)), Digits(), tmp_path / "tokens")
    job = pretrain_job(tmp_path, micro_batch_size=2)
    seats: list[Any] = [SimpleNamespace(data_rank=rank, data_size=3, device=torch.device("cpu")) for rank in range(3)]
    taken = [BatchLoader(job, seat, skipped=(1,)).micro_batches(1) for seat in seats]  # 5 rows: 1, 2 and 2
    assert [round(each.weight, 3) for each in taken] == [1.0, 1.2, 1.2]
    assert {(each.window, each.tokens, len(each.micro_batches)) for each in taken} == {(2, 5 * TOKENS, 1)}
