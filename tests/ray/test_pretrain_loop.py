"""Pretraining with real ranks: a killed rank, a killed owner and a damaged state change nothing about the result."""

import json
import math
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.config import PretrainSettings
from actors.pretrain import PretrainResult, pretrain
from cluster.worker import Worker
from cluster.worker_group import WorkerGroup
from data.tokenized import write_shards
from engines import state_folder
from engines.config import LearnerSettings
from infra.errors import CheckpointError, DataError, NodeLost
from models.llama import LlamaConfig
from models.tokenizer import load_tokenizer, train_bpe
from models.weights import load_llama

STEPS = 12
OPTIMIZER = LearnerSettings(learning_rate=3e-3, warmup_steps=2, timeout=60)
SETTINGS = PretrainSettings(
    optimizer=OPTIMIZER, steps=STEPS, batch_size=5, sequence_length=16, micro_batch_size=2, save_every=4, num_cpus=0.5
)


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    runtime_env = {"env_vars": {"PYTHONPATH": paths}}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=runtime_env)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    texts = [" ".join(str(draw.randrange(100)) + " plus" for _ in range(40)) for _ in range(60)]
    train_bpe(texts, 300).save(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    write_shards(texts, tokenizer, folder / "tokens")
    return folder


def run(
    corpus: Path, folder: Path, settings: PretrainSettings = SETTINGS, hook: Any = None, faults: str = ""
) -> tuple[PretrainResult, list[dict[str, Any]], list[dict[str, Any]]]:
    """Train into `folder`; `hook(step, pids)` runs in the caller after each reported step."""
    vocab_size = load_tokenizer(corpus / "tokenizer").vocab_size
    model = LlamaConfig(
        dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, vocab_size=vocab_size, context=16, tied=True
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []

    def on_metrics(row: dict[str, Any]) -> None:
        rows.append(row)
        if hook is not None:
            hook(row["step"], next(e["pids"] for e in reversed(events) if e["event"] == "started"))

    result = pretrain(
        corpus / "tokens", corpus / "tokenizer", model, settings, folder / "out", folder / "state", on_metrics,
        seed=7, on_event=events.append, faults=faults,
    )  # fmt: skip
    return result, rows, events


def curve(rows: list[dict[str, Any]]) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_llama(folder / "out").state_dict()


def assert_equal_weights(one: Path, other: Path) -> None:
    expected = weights(other)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(one).items())


@pytest.fixture(scope="module")
def fault_free(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("fault_free")
    result, rows, _ = run(corpus, folder)
    assert (result.steps, result.tokens, result.restarts) == (STEPS, STEPS * 5 * 16, 0)
    assert result.final_loss == rows[-1]["loss"]
    return folder, rows


def test_it_learns_and_leaves_a_model_a_curve_and_two_states(fault_free: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = fault_free
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert abs(rows[0]["loss"] - math.log(300)) < 0.8  # a new model knows nothing
    assert all(row["tokens_per_s"] > 0 and row["committed"] for row in rows)
    assert [json.loads(line) for line in (folder / "state" / "metrics.jsonl").read_text().splitlines()] == rows
    assert state_folder.saved_steps(folder / "state") == [8, 12]
    assert load_tokenizer(folder / "out").vocab_size == load_llama(folder / "out").config.vocab_size


@pytest.mark.parametrize(
    ("faults", "killed", "resumed_from"),
    [
        ("pretrain.generation-0.rank-1.step:6=kill", "rank 1", "step-0000000004"),  # step 5, the other is inside it
        (
            "pretrain.generation-0.rank-0.save:2=kill,pretrain.generation-1.rank-1.step:2=kill",
            "rank 1",
            "step-0000000004",
        ),
    ],
)
def test_a_killed_rank_changes_nothing(
    corpus: Path,
    tmp_path: Path,
    fault_free: tuple[Path, list[dict[str, Any]]],
    faults: str,
    killed: str,
    resumed_from: str,
) -> None:
    result, rows, events = run(corpus, tmp_path, faults=faults)
    assert curve(rows) == curve(fault_free[1])
    assert_equal_weights(tmp_path, fault_free[0])
    lost = [event for event in events if event["event"] == "lost"]
    assert result.restarts == len(lost) == faults.count("kill")
    assert f"restart | NodeLost: {killed} of group" in lost[-1]["decision"]
    assert "pretrain.max_restarts" in lost[-1]["decision"]
    assert events[-1]["resumed_from"] == resumed_from


def test_a_killed_owner_goes_on_from_its_state(
    corpus: Path, tmp_path: Path, fault_free: tuple[Path, list[dict[str, Any]]]
) -> None:
    @ray.remote(num_cpus=0, max_retries=0)
    def owner_that_dies() -> None:
        def die(step: int, pids: list[int]) -> None:
            if step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        run(corpus, tmp_path, hook=die)

    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(owner_that_dies.remote())
    newest = state_folder.newest_verified(tmp_path / "state")
    assert newest is not None
    damaged = next(state_folder.state_path(tmp_path / "state", newest[0]).glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])  # on top of it the newest state is damaged
    _, rows, events = run(corpus, tmp_path)
    assert curve(rows) == curve(fault_free[1])
    assert_equal_weights(tmp_path, fault_free[0])
    assert events[0]["resumed_from"] != state_folder.state_path(tmp_path, newest[0]).name


def test_other_ranks_and_shards_go_on_from_the_same_state(
    corpus: Path, tmp_path: Path, fault_free: tuple[Path, list[dict[str, Any]]]
) -> None:
    """A finished state under FSDP x TP settings: nothing left to train, the same weights come out."""
    settings = SETTINGS.model_copy(update={"sharding": "fsdp", "tensor_parallel": 2, "micro_batch_size": 5})
    _, rows, _ = run(corpus, tmp_path, settings)
    found, expected = [row["loss"] for row in rows], [row["loss"] for row in fault_free[1]]
    assert found == pytest.approx(expected, rel=1e-4)
    _, again, _ = run(corpus, tmp_path, SETTINGS.model_copy(update={"workers": 1}))
    assert again == rows
    assert_equal_weights(tmp_path, tmp_path)


def test_restarts_are_bounded_and_leave_nothing(corpus: Path, tmp_path: Path) -> None:
    pids_seen: list[int] = []

    def kill_rank_0(step: int, pids: list[int]) -> None:
        pids_seen.extend(pids)
        os.kill(pids[0], signal.SIGKILL)

    with pytest.raises(NodeLost, match="rank 0"):
        run(corpus, tmp_path, SETTINGS.model_copy(update={"max_restarts": 0, "steps": 500}), kill_rank_0)
    assert pids_seen and not any(os.path.exists(f"/proc/{pid}/cmdline") and _runs(pid) for pid in pids_seen)
    with WorkerGroup(Worker, 4, num_cpus=1, name="everything-is-free", start_timeout_s=10):
        pass


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_bad_input_is_named(corpus: Path, tmp_path: Path, fault_free: tuple[Path, list[dict[str, Any]]]) -> None:
    with pytest.raises(CheckpointError, match="other settings"):
        run(corpus, fault_free[0], SETTINGS.model_copy(update={"batch_size": 6}))
    with pytest.raises(DataError, match="shorter sequence length"):
        run(corpus, tmp_path, SETTINGS.model_copy(update={"sequence_length": 10**6, "workers": 1}))
