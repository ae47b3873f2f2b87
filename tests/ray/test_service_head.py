"""A head node that is replaced while a submitted run pretrains: its cluster, its machines and their memory are gone."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.core.history import GroupJournal
from data.tokenized import write_shards
from infra.storage import Store, open_store
from models.tokenizers import load_tokenizer, train_bpe
from tests.ray.test_service import User, wait_for
from workflows.runs.catalog import load_run

STEPS, SLOW, HELD = 24, 8, 14
"""Steps; the one before which uploads get time to end; the one at which a rank stands still until all is killed."""
FAULTS = f"pretrain.step-{SLOW}.rank-1.data:1=delay-3,pretrain.step-{HELD}.rank-1.data:1=deadlock"
FLOW = f"""
import json
import shutil
from actors.pretrain.config import PretrainSettings
from engines.config import LearnerSettings
from workflows.graph import Artifact, context, step, workflow
from workflows.recipes.settings import ModelSettings
from workflows.recipes.training import Trained, pretrain

SECTION = PretrainSettings(
    optimizer=LearnerSettings(learning_rate=3e-3, warmup_steps=2, timeout=120),
    steps={STEPS}, batch_size=5, sequence_length=16, micro_batch_size=2, save_every=4, num_cpus=0.75,
    elastic={{"hang_floor_s": 90, "start_timeout_s": 600, "pulse_timeout_s": 30, "abort_timeout_s": 20}},
)
MODEL = ModelSettings(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, context=16)

@step(num_cpus=0)
def given(folder: str, trace: str) -> Artifact:
    with open(trace, "a") as lines:
        lines.write(folder + "\\n")
    out = context().artifact("data")
    shutil.copytree(folder, out.path, dirs_exist_ok=True)
    return out.seal()

def told(trained: Trained) -> dict:
    lines = (trained.metrics.path() / "metrics.jsonl").read_text().splitlines()
    return {{"rows": [json.loads(line) for line in lines], "model": trained.model.digest}}

@workflow
def training(corpus: str, trace: str) -> dict:
    tokens = given.options(name="tokens")(f"{{corpus}}/tokens", trace)
    tokenizer = given.options(name="tokenizer")(f"{{corpus}}/tokenizer", trace)
    run = {{}}
    for name in ("broken", "quiet"):
        trained = pretrain.options(name=name)(tokens, tokenizer, MODEL, SECTION, 7, stage=name)
        run[name] = told(trained.result())
    return run
"""
CLUSTER = """
import signal
from ray.cluster_utils import Cluster
made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
for _ in range(2):
    made.add_node(num_cpus=1, object_store_memory=80 * 2**20)
print(made.address, flush=True)
signal.pause()
"""


@pytest.fixture
def machines(tmp_path: Path, repository: Path, s3_url: str) -> Iterator[list[User]]:
    """Two sets of them, one after the other: nothing but the store is common to both."""
    made = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        user = User(tmp_path / name, repository)
        user.environment |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        (user.project / "flow.py").write_text(FLOW)
        made.append(user)
    yield made
    for user in made:
        end(user)


def start_cluster(user: User, faults: str = "") -> str:
    """Three raylets and the service; the address."""
    environment = {**user.environment, "RECUA_FAULTS": faults}
    command = [sys.executable, "-c", CLUSTER]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(user: User) -> None:
    """SIGKILL to all that runs there."""
    deadline = time.monotonic() + 60
    while left := user.processes():
        assert time.monotonic() < deadline, left
        user.kill(*left)
        time.sleep(0.05)


def write_corpus(folder: Path) -> None:
    draw = random.Random(0)
    texts = [" ".join(str(draw.randrange(100)) + " plus" for _ in range(40)) for _ in range(60)]
    train_bpe(texts, 300).save(folder / "tokenizer")
    write_shards(texts, load_tokenizer(folder / "tokenizer"), folder / "tokens")


def flushed(store: Store) -> list[int]:
    keys = [key for key in store.list("runs/r") if "/manifests/" in key]
    return sorted(int(key.rpartition("-")[2]) for key in keys)


def memory_of(store: Store) -> list[Path]:
    """What the group has in this machine's shared memory."""
    (key,) = [key for key in store.list("runs/r/state") if key.endswith("/group.json")]
    group = GroupJournal(open_store(f"{store.url}/{key.removesuffix('/group.json')}"), "x").history.group
    return list(Path("/dev/shm").glob(f"recua-node-*/recua-{group}"))


def counted(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must be the same, sample ids included."""
    return [tuple(row[name] for name in ("step", "loss", "grad_norm", "lr", "tokens", "samples")) for row in rows]


@pytest.mark.long
def test_service_on_a_new_head_goes_on_with_a_pretraining_from_the_store(
    machines: list[User], s3_url: str, tmp_path: Path
) -> None:
    """The whole cluster is killed between two flushes, and its memory is lost: what was flushed is not computed again,
    committed steps are not run again, and curve, samples and model are those of a run without a fault."""
    first, second = machines
    corpus, trace, store = tmp_path / "corpus", tmp_path / "trace", open_store(s3_url)
    write_corpus(corpus)
    address = start_cluster(first, FAULTS)
    first.up("--address", address, "--store", s3_url)
    settings = ("--set", f"corpus={corpus}", "--set", f"trace={trace}")
    first.recua("run", "flow.py", *settings, "--run", "r", "--detach")
    wait_for(lambda: max(flushed(store), default=0) >= SLOW, "its state did not come into the store", 300)
    end(first)
    last = flushed(store)[-1]
    memory = memory_of(store)
    assert memory and load_run(store, "r").status == "interrupted"
    for folder in memory:
        shutil.rmtree(folder)
    shutil.rmtree(corpus)
    shutil.rmtree(first.home)

    address = start_cluster(second)
    assert "it resumes 1 unfinished runs: r" in second.up("--address", address, "--store", s3_url)
    second.recua("watch", "r")
    run = load_run(store, "r")
    assert run.status == "finished" and run.drivers == 2
    said = second.recua("logs", "r", "--store", s3_url)
    assert f"2 ranks train from step {last}" in said and "from storage" in said, said
    once = [f"{corpus}/tokenizer", f"{corpus}/tokens"]
    assert sorted(trace.read_text().splitlines()) == once, "committed steps ran once"
    broken, quiet = run.result["broken"], run.result["quiet"]
    assert counted(broken["rows"]) == counted(quiet["rows"]) and len(quiet["rows"]) == STEPS
    assert [row["step"] for row in quiet["rows"]] == list(range(STEPS))
    assert broken["model"] == quiet["model"], "bit for bit"
