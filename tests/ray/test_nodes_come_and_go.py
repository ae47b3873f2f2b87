"""Elastic pretraining on several raylets: a node that says that it goes costs no step; what can never be is refused."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from actors.pretrain.config import PretrainSettings
from actors.pretrain.job import PretrainJob
from actors.pretrain.lead import pretrain
from cluster.core.history import GroupJournal
from cluster.node.host_memory import OWNER, group_folder, living_workers, node_root
from cluster.workers.named_actors import NAMESPACE
from data.tokenized import write_shards
from engines.config import LearnerSettings
from infra.errors import NodeLost, ResourceError
from infra.storage import open_store
from models.llama import LlamaConfig
from models.tokenizers import load_tokenizer, train_bpe
from tests.helpers import rays
from tests.helpers.cloud_metadata import Metadata, metadata_service

PATIENT: dict[str, Any] = {
    "hang_floor_s": 60, "pulse_timeout_s": 30, "abort_timeout_s": 20, "start_timeout_s": 600
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "optimizer": LearnerSettings(learning_rate=3e-3, warmup_steps=2, timeout=120),
    "steps": 100_000,
    "batch_size": 6,
    "sequence_length": 16,
    "micro_batch_size": 2,
    "save_every": 10**6,
    "workers": 2,
    "num_cpus": 0.6,
    "sharding": "fsdp",
    "elastic": PATIENT,
}
NOTICE_S = 100.0
Row = dict[str, Any]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without room for ranks; the tests add nodes with room for one each."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    with rays.cluster(num_cpus=0, runtime_env={"env_vars": {"PYTHONPATH": paths}}) as made:
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


def train(
    corpus: Path,
    folder: Path,
    row: Callable[[Row], None],
    event: Callable[[Row], None],
    nodes_come: bool = False,
    **settings: Any,
) -> Any:
    vocab_size = load_tokenizer(corpus / "tokenizer").vocab_size
    model = LlamaConfig(
        dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, vocab_size=vocab_size, context=16, tied=True
    )  # fmt: skip
    section = PretrainSettings(**{**SETTINGS, **settings})
    job = PretrainJob(corpus / "tokens", corpus / "tokenizer", model, section, str(folder / "state"), 7, faults="")
    return pretrain(job, folder / "out", row, on_event=event, nodes_come=nodes_come)


def no_actor_is_left() -> bool:
    """Ray ends actors when it gets to it."""
    deadline = time.monotonic() + 60
    while found := [one for one in ray.util.list_named_actors(all_namespaces=True) if one["namespace"] == NAMESPACE]:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return True


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with metadata_service() as server:
        yield server


class Reclaimer:
    """Takes one node after the other from a group, ten steps after it has recovered from the last one."""

    def __init__(self, cluster: Cluster, state: Path, metadata: Metadata) -> None:
        self.cluster, self.state, self.metadata = cluster, state, metadata
        self.ways = [self.drain, self.spot, self.sigterm, self.loss]
        self.rows: list[Row] = []
        self.started: list[Row] = []
        self.events: list[Row] = []
        self.gone: list[str] = []

    def event(self, event: Row) -> None:
        self.events.append(event)
        if event["event"] == "started":
            self.started.append(event)

    def row(self, row: Row) -> None:
        self.rows.append(row)
        if len(self.started) > len(self.gone) and row["step"] >= self.started[-1]["step"] + 10:
            seats = {node["NodeID"]: living_workers(self.memory(node["NodeID"])) for node in ray.nodes()}
            ranks = set(self.started[-1]["pids"])
            node = next(node for node, pids in seats.items() if node not in self.gone and ranks.intersection(pids))
            self.gone.append(node)
            self.ways[len(self.gone) - 1](node)

    def drain(self, node: str) -> None:
        """What the autoscaler says, and the hook of a pod that is stopped."""
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + NOTICE_S) * 1000)
        accepted, why = GcsClient(address=self.cluster.address).drain_node(node, reason, "reclaimed", deadline)
        assert accepted, why

    def spot(self, node: str) -> None:
        self.metadata.reclaimed[self.agent(node)] = time.time() + NOTICE_S

    def sigterm(self, node: str) -> None:
        os.kill(self.agent(node), signal.SIGTERM)

    def loss(self, node: str) -> None:
        self.cluster.remove_node(next(one for one in self.cluster.list_all_nodes() if one.node_id == node), False)

    def memory(self, node: str) -> Path:
        return group_folder(node, GroupJournal(open_store(self.state), "x").history.group)

    def agent(self, node: str) -> int:
        """Its process id."""
        return int(json.loads((self.memory(node) / OWNER).read_text())["agent"])


def test_detached_nodes_that_say_they_go_cost_no_step(
    cluster: Cluster, corpus: Path, metadata: Metadata, tmp_path: Path
) -> None:
    """Three nodes in a row, each with a notice of another kind: Ray's own drain, AWS's metadata service, SIGTERM. Each
    rank moves to a free node at a step boundary. Then a node is lost without a word: with one left where two are
    needed the run waits, and says at last which setting ended that."""
    for _ in range(5):
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    reclaimer = Reclaimer(cluster, tmp_path / "state", metadata)
    notices = {"cloud": "aws", "metadata_url": metadata.url, "sigterm_grace_s": NOTICE_S}
    elastic = {**PATIENT, "min_workers": 2, "capacity_wait_s": 3, "notices": notices}
    with pytest.raises(NodeLost, match=r"1 ranks after 3 s of waiting, 2 needed.*elastic\.capacity_wait_s"):
        train(corpus, tmp_path, reclaimer.row, reclaimer.event, elastic=elastic)
    said = "\n".join(map(str, reclaimer.events))
    notices = [one["notice"] for one in reclaimer.events if "notice" in one]
    assert notices == ["ray-drain", "spot-terminate", "sigterm"], said
    assert [(one["ranks"], one.get("lost_steps", 0)) for one in reclaimer.started] == [(2, 0)] * 4, said
    assert [one["step"] for one in reclaimer.rows] == list(range(len(reclaimer.rows)))
    assert said.count("decision: leave-at-boundary") == 3 and "leave-now" not in said, said
    assert no_actor_is_left()


def test_detached_group_that_can_never_be_is_refused_before_any_work(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    """But not where nodes may come by themselves: there it waits, and what it ordered ends with it."""
    heard: list[Row] = []
    for _ in range(2):
        with pytest.raises(ResourceError, match="asks for 1 ranks"):
            train(corpus, tmp_path, heard.append, heard.append, num_cpus=50)
    assert not heard
    elastic = {**PATIENT, "start_timeout_s": 1, "capacity_wait_s": 1}
    with pytest.raises(NodeLost, match="capacity_wait_s"):
        train(corpus, tmp_path, heard.append, heard.append, nodes_come=True, num_cpus=50, elastic=elastic)
    assert no_actor_is_left()
