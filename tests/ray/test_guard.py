"""Ranks that are slow, compute or remember wrongly, or sit on a node that may fail, in real pretraining."""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.core.history import GroupJournal
from cluster.node.host_memory import node_root
from data.tokenized import write_shards
from infra.storage import open_store
from models.tokenizers import load_tokenizer, train_bpe
from tests.helpers import rays
from tests.ray.test_pretrain import STEPS, Enough, Row, Run, lives, memory_of

THREE: dict[str, Any] = {"workers": 3, "batch_size": 6, "num_cpus": 0.6}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without room for ranks, and one node."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    with rays.cluster(num_cpus=0, runtime_env={"env_vars": {"PYTHONPATH": paths}}) as made:
        made.add_node(num_cpus=4, object_store_memory=rays.MEMORY)
        yield made
        nodes = [node["NodeID"] for node in ray.nodes()]
    for node in nodes:
        shutil.rmtree(node_root(node), ignore_errors=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    texts = [" ".join(str(draw.randrange(100)) + " plus" for _ in range(40)) for _ in range(60)]
    train_bpe(texts, 300).save(folder / "tokenizer")
    write_shards(texts, load_tokenizer(folder / "tokenizer"), folder / "tokens")
    return folder


@pytest.fixture
def run(cluster: Cluster, corpus: Path, tmp_path: Path) -> Iterator[Run]:
    made = Run(corpus, tmp_path)
    yield made
    for folder in memory_of(made):
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def quiet(cluster: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The fault-free run of three replicas: every rank is verified, none is found wrong or slow."""
    made = Run(corpus, tmp_path_factory.mktemp("quiet")).train(elastic={"verify_every": 8}, **THREE)
    assert [event["step"] for event in made.heard("verified")] == [8, 16, 24], made.said()
    assert not made.faults() and made.result is not None and made.result.restarts == 0, made.said()
    return made


def last_rows(run: Run) -> list[Row]:
    """The outcome that counts of every step."""
    return [row for _, row in sorted({row["step"]: row for row in run.rows}.items())]


@pytest.mark.parametrize("wrong", ["weights", "answer"])
def test_elastic_guard_wrong_rank_is_named_and_training_goes_back_to_what_was_verified(
    wrong: str, run: Run, quiet: Run
) -> None:
    """Replicas: a bit of one rank's weights flips, and all its gradients with it. Shards, which nobody else holds: one
    rank computes wrongly for a while. Both are found at the next verification, and what they spoiled is undone."""
    hits = [10] if wrong == "weights" else range(10, 18)
    faults = ",".join(f"pretrain.generation-1.rank-1.{wrong}:{hit}=flip" for hit in hits)
    elastic = {"verify_every": 8, "min_workers": 3}
    run.train(faults, elastic=elastic, sharding="replicate" if wrong == "weights" else "fsdp", **THREE)
    detected = run.faults()[0]
    assert "rank 1" in detected["what"] and detected["after_s"] > 0, run.said()
    (back,) = run.heard("rolled-back")
    assert (back["step"], back["to_step"]) == (15, 8), run.said()
    started = run.heard("started")
    assert started[1]["step"] == 8 and started[0]["pids"][1] not in started[1]["pids"], "the guilty process is gone"
    assert [row["step"] for row in run.rows].count(9) == 2
    if wrong == "weights":
        run.rows[:] = last_rows(run)
        run.assert_equals(quiet)
    else:
        losses = [row["loss"] for row in last_rows(run)]
        assert losses == pytest.approx([row["loss"] for row in quiet.rows], rel=1e-4)
    history = GroupJournal(open_store(run.folder / "state"), "x").history
    assert history.verified == STEPS and history.rollbacks == 1, history
    (corruption,) = history.corruptions
    assert (corruption["step"], corruption["to_step"]) == (16, 8) and corruption["workers"] == detected["workers"]


def test_elastic_guard_slow_rank_is_reported_and_then_replaced_without_losing_a_step(run: Run) -> None:
    """Afterwards another rank is killed: how soon that was heard of is told."""
    slow = "pretrain.generation-1.rank-1.step:*=slow"
    elastic = {"straggler_window": 4, "straggler_ratio": 2, "straggler_evict_after": 2, "spares": 1, "min_workers": 3}
    killed: list[float] = []

    def kill_after_eviction(run: Run) -> None:
        started = run.heard("started")
        if len(started) == 2 and run.rows[-1]["step"] > started[1]["step"] + 3 and not killed:
            killed.append(time.monotonic())
            os.kill(started[1]["pids"][0], signal.SIGKILL)
        if killed and run.heard("detected"):
            killed.append(time.monotonic())
            raise Enough

    with pytest.raises(Enough):
        run.train(slow, kill_after_eviction, elastic=elastic, steps=100000, **THREE)
    decided = [event for event in run.heard("decided") if "computes" in event["decision"]]
    assert decided[0]["action"] == "report" and decided[0]["rank"] == 1, run.said()
    assert any(event["action"] == "evict" and "straggler_evict_after" in event["decision"] for event in decided)
    first, second = run.heard("started")[:2]
    assert second["lost_steps"] == 0 and second["ranks"] == 3 and first["pids"][1] not in second["pids"], run.said()
    steps = [row["step"] for row in run.rows]
    assert steps == list(range(len(steps)))
    (detected,) = run.faults()
    print(f"death heard of {killed[1] - killed[0]:.3f} s after the kill; said: {detected['after_s']:.3f} s")
    assert 0 <= detected["after_s"] <= killed[1] - killed[0]
    assert not any(map(lives, second["pids"]))


def test_elastic_guard_node_that_looks_like_failing_is_left_before_it_does(
    cluster: Cluster, run: Run, tmp_path: Path
) -> None:
    """Its memory reports errors that it could not correct; a node that comes later takes its place. Then that one is
    lost: how soon that was heard of is told."""
    counter = tmp_path / "root/sys/devices/system/edac/mc/mc0/ue_count"
    counter.parent.mkdir(parents=True)
    counter.write_text("0")
    come: list[Any] = []
    lost: list[float] = []

    def watch(run: Run) -> None:
        if run.rows and run.rows[-1]["step"] == 5:
            counter.write_text("3")
        if run.heard("detected") and not come:
            come.append(cluster.add_node(num_cpus=4, object_store_memory=80 * 2**20))
        started = run.heard("started")
        if len(started) > 1 and run.rows[-1]["step"] > started[1]["step"] + 3 and not lost:
            lost.append(time.monotonic())
            threading.Thread(target=cluster.remove_node, args=(come[0], False)).start()
        if lost and any("is lost" in event["what"] for event in run.heard("detected")):
            lost.append(time.monotonic())
            raise Enough

    elastic = {"min_workers": 2, "health": {"period_s": 0.5, "root": str(tmp_path / "root")}}
    with pytest.raises(Enough):
        run.train("", watch, elastic=elastic, steps=100000, workers=2, num_cpus=0.6)
    detected, *_, gone = run.faults()
    assert "ecc_uncorrected" in detected["what"] and detected["notice"] == "predicted", run.said()
    assert "elastic.predicted_risk" in run.said()
    first, second = run.heard("started")[:2]
    assert second["lost_steps"] == 0 and not set(first["pids"]) & set(second["pids"]), run.said()
    measured = [one for event in run.heard("ready") for one in event["burn_in"].values()]
    assert len(measured) >= 4 and all(one["answer_correct"] and one["memory_correct"] for one in measured)
    assert all(one["compute_rate"] > 0 and one["bandwidths"]["loopback"] > 0 for one in measured)
    assert any(one["bandwidths"].get("peer", 0) > 0 for one in measured), measured
    assert 0 <= gone["after_s"] <= lost[1] - lost[0] + 1
    print(f"node loss heard of {lost[1] - lost[0]:.2f} s after it; said: {gone['after_s']:.2f} s after its last beat")
    print(f"burn-in took {max(one['seconds'] for one in measured):.2f} s at most: {measured[-1]}")
