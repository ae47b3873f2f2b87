"""Snapshots of DeepSpeed learners, by real processes: they go on under another stage and number of ranks."""

import multiprocessing
import queue
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engines.config import LearnerSettings
from engines.forward import logits
from engines.snapshots import FolderSource, SnapshotName, Snapshots, Sources
from tests.helpers.ports import free_ports

ROWS, WORLD = 4, 2


def settings(stage: int) -> LearnerSettings:
    return LearnerSettings(zero_stage=stage, learning_rate=1e-2, total_steps=10, max_grad_norm=0.5, threads=1)


def nll(module: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, float]]:
    logp = logits(module, batch).float().log_softmax(-1)[:, :-1]
    return -logp.gather(-1, batch["input_ids"][:, 1:, None]).sum() / 50.0, {}


def share(step: int, rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(2, 61, (ROWS, 9), generator=torch.Generator().manual_seed(step))
    tokens = tokens[rank::world_size]
    return [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}]


def rank_main(rank: int, address: str, source: Path, shared: Path, answers: Any) -> None:
    """Both ranks train under stages 1 and 3, a snapshot after every step; rank 0 alone goes on from each."""
    from engines.deepspeed import process_group
    from engines.deepspeed.learner import build

    for stage in (1, 3):
        learner = build(source, settings(stage), rank=rank, world_size=WORLD, address=address)
        learner.data_position = {"skipped": [7]}
        snapshots = learner.snapshots = Snapshots(shared / str(stage), "run", 0, rank, WORLD)
        for step in range(2):
            learner.train_step(share(step, rank, WORLD), nll)
        snapshots.settle()
        assert snapshots.last is not None and snapshots.last.step == 2
        expected = next_weights(learner, rank, WORLD)
        snapshots.close()
        learner.close()
        if rank == 0:
            answers.put((f"stage {stage}", expected))
    again = build(source, settings(3), rank=rank, world_size=WORLD, address=address)
    load(again, shared / "1")
    resumed = next_weights(again, rank, WORLD)
    again.close()
    process_group.leave()
    if rank == 0:
        answers.put(("3 from 1", resumed))
        for stage, snapshot in ((0, 3), (1, 3), (2, 1), (3, 1)):
            alone = build(source, settings(stage))
            load(alone, shared / str(snapshot))
            answers.put((f"{stage} alone from {snapshot}", next_weights(alone, 0, 1)))
            alone.close()
    answers.close()
    answers.join_thread()


def load(learner: Any, folder: Path) -> None:
    sources = Sources([FolderSource(folder)])
    name = SnapshotName(0, 2)
    assert name in sources.snapshots()
    learner.load_snapshot(sources.reader(name))
    assert learner.step == 2 and learner.data_position == {"skipped": [7]}


def next_weights(learner: Any, rank: int, world_size: int) -> dict[str, np.ndarray]:
    """After one more step; arrays, because a tensor in a queue needs its sender to live."""
    learner.train_step(share(2, rank, world_size), nll)
    return {name: tensor.clone().numpy() for name, tensor in learner.export()}


@pytest.fixture
def shared() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"recua-test-{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_zero_1_and_3_go_on_from_each_others_snapshots(shared: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=30,
            intermediate_size=41,
            num_hidden_layers=1,
            num_attention_heads=3,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    ).save_pretrained(tmp_path / "model")
    address = f"127.0.0.1:{free_ports(1)[0]}"
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=rank_main, args=(rank, address, tmp_path / "model", shared, answers))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    found: dict[str, dict[str, np.ndarray]] = {}
    try:
        while len(found) < 7:
            try:
                name, weights = answers.get(timeout=1.0)
                found[name] = weights
            except queue.Empty:
                assert not any(process.exitcode for process in ranks), f"a rank died; so far {sorted(found)}"
    finally:
        for process in ranks:
            process.kill()
            process.join()
    expected = found.pop("stage 1")
    start = LlamaForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(not np.array_equal(expected[name], start[name].numpy()) for name in expected)
    for how, weights in found.items():
        for name, array in expected.items():
            np.testing.assert_allclose(weights[name], array, rtol=1e-4, atol=1e-6, err_msg=f"{how}: {name}")
