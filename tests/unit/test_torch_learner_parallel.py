"""Sharded against whole: the same losses, gradient norms and weights from real gloo ranks; states that change mesh."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from algorithms.logprobs import token_logprobs
from algorithms.sft import sft_loss
from engines.base import Batch
from engines.config import LearnerSettings
from engines.ranks import Ranks
from engines.torch_learner import TorchLearner
from infra.errors import CheckpointError
from models.hf_format import to_hf_name
from models.llama import Llama, LlamaConfig
from models.parallelize import materialize, parallelize
from models.weights import load_llama

ROWS, TOKENS, STEPS = 8, 16, 4
SETTINGS = LearnerSettings(learning_rate=1e-2, warmup_steps=2, total_steps=8, max_grad_norm=0.5, eps=1e-4)


@dataclass(frozen=True)
class Layout:
    world_size: int
    tensor_parallel: int = 1
    fsdp: bool = True
    tied: bool = False
    activation_checkpointing: bool = False
    micro_batches: int = 1


def config(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, vocab_size=40, context=TOKENS, tied=tied
    )  # fmt: skip


def build(layout: Layout, ranks: Ranks) -> TorchLearner:
    with torch.device("meta"):
        model = Llama(config(layout.tied))
    parallelize(
        model=model,
        mesh=ranks.mesh,
        fsdp=layout.fsdp,
        activation_checkpointing=layout.activation_checkpointing,
    )
    materialize(model, ranks.device, seed=3)
    return TorchLearner(model, SETTINGS, ranks, reduces_gradients=layout.fsdp and ranks.mesh is not None)


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
    ranks = Ranks.over_all(layout.tensor_parallel)
    result = task(layout, ranks, folder)
    if rank == 0:
        torch.save(result, folder / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(task: Callable, layout: Layout, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    mp.start_processes(in_rank, (task, layout, folder), nprocs=layout.world_size, start_method="fork")
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


def save_in_the_middle(layout: Layout, ranks: Ranks, folder: Path) -> dict[str, Any]:
    learner = build(layout, ranks)
    for step in range(2):
        take_step(learner, step, 1)
    learner.save_state(folder / "state")
    learner.save_state(folder / "state")  # replacing is fine
    learner.save_hf(folder / "hf")
    return train(learner, start=2)


def go_on(layout: Layout, ranks: Ranks, folder: Path) -> dict[str, Any]:
    learner = build(layout, ranks)
    learner.load_state(folder / "state")
    assert learner.step == 2
    return train(learner, start=2)


def halfway_model(folder: Path) -> torch.nn.Module:
    learner = build(Layout(1), Ranks())
    learner.load_state(folder / "state")
    return learner.module


def test_a_saved_state_goes_on_bitwise_and_on_any_other_mesh(tmp_path: Path) -> None:
    saved = on_ranks(save_in_the_middle, Layout(2), tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    again = on_ranks(go_on, Layout(2), tmp_path)
    assert (again["loss"], again["norm"]) == (saved["loss"], saved["norm"])
    assert all(torch.equal(again["weights"][name], tensor) for name, tensor in saved["weights"].items())
    assert_same_run(on_ranks(go_on, Layout(2, fsdp=False), tmp_path), saved)
    assert_same_run(on_ranks(go_on, Layout(2, tensor_parallel=2), tmp_path), saved)
    alone = build(Layout(1), Ranks())
    alone.load_state(tmp_path / "state")
    assert_same_run(train(alone, start=2), saved)
    exported = load_llama(tmp_path / "hf")
    tokens = torch.arange(TOKENS)[None]
    torch.testing.assert_close(exported(tokens), halfway_model(tmp_path)(tokens))


def test_a_damaged_or_foreign_state_is_refused(tmp_path: Path) -> None:
    learner = build(Layout(1), Ranks())
    learner.save_state(tmp_path / "state")
    with pytest.raises(CheckpointError, match="does not fit"):
        with torch.device("meta"):
            model = Llama(LlamaConfig(dim=32, layers=3, heads=4, kv_heads=2, ffn_dim=48, vocab_size=40, context=16))
        materialize(parallelize(model=model, mesh=None), torch.device("cpu"), seed=0)
        TorchLearner(model, SETTINGS, Ranks(), reduces_gradients=False).load_state(tmp_path / "state")
    file = next((tmp_path / "state").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        learner.load_state(tmp_path / "state")
