"""Elastic pretraining on several raylets: a lost node costs its ranks and its memory, and at most one step."""

import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.config import PretrainSettings
from actors.pretrain import pretrain
from cluster.fleet import node_root
from data.tokenized import write_shards
from engines.config import LearnerSettings
from models.llama import LlamaConfig
from models.tokenizer import load_tokenizer, train_bpe

SETTINGS: dict[str, Any] = {
    "optimizer": LearnerSettings(learning_rate=3e-3, warmup_steps=2, timeout=120),
    "steps": 60,
    "batch_size": 6,
    "sequence_length": 16,
    "micro_batch_size": 2,
    "save_every": 10**6,
    "workers": 3,
    "num_cpus": 0.6,
    "sharding": "fsdp",
    "elastic": {"hang_floor_s": 60, "pulse_timeout_s": 30, "abort_timeout_s": 20, "start_timeout_s": 600},
}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without room for ranks, and three nodes with room for one each."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
    for _ in range(3):
        made.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    ray.init(address=made.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    nodes = [node["NodeID"] for node in ray.nodes()]
    yield made
    ray.shutdown()
    made.shutdown()
    for node in nodes:
        shutil.rmtree(node_root(node), ignore_errors=True)


def test_elastic_node_is_lost_with_its_memory_and_the_others_go_on_from_replicas(
    cluster: Cluster, tmp_path: Path
) -> None:
    draw = random.Random(0)
    texts = [" ".join(str(draw.randrange(100)) + " plus" for _ in range(40)) for _ in range(60)]
    train_bpe(texts, 300).save(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    write_shards(texts, tokenizer, tmp_path / "tokens")
    model = LlamaConfig(
        dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, vocab_size=tokenizer.vocab_size, context=16, tied=True
    )  # fmt: skip
    events: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    lost: list[float] = []

    def row(row: dict[str, Any]) -> None:
        rows.append(row)
        if row["step"] == 10:
            victim = cluster.list_all_nodes()[1]
            cluster.remove_node(victim, allow_graceful=False)
            shutil.rmtree(node_root(victim.node_id), ignore_errors=True)
            lost.append(time.monotonic())

    def event(event: dict[str, Any]) -> None:
        events.append({**event, "at": time.monotonic()})

    result = pretrain(
        tmp_path / "tokens", tmp_path / "tokenizer", model, PretrainSettings(**SETTINGS), tmp_path / "out",
        tmp_path / "state", row, seed=7, on_event=event, faults="",
    )  # fmt: skip
    said = "\n".join(map(str, events))
    assert [one["step"] for one in rows] == list(range(60)) and rows[-1]["loss"] < rows[0]["loss"]
    assert result.restarts >= 1 and result.lost_steps <= 1, said
    seen = next(one for one in events if one["event"] == "detected" and "node" in one["what"])
    print(f"node loss detected after {seen['at'] - lost[0]:.2f} s, pause {result.longest_pause_s} s")
    started = [one for one in events if one["event"] == "started"]
    assert started[0]["ranks"] == 3 and started[1]["ranks"] == 2, said
    assert "restore from host memory" in said
