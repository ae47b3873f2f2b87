"""Elastic pretraining with real ranks: killed, stopped, hung, left without a controller; the result stays the same."""

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.pretrain.config import PretrainSettings
from actors.pretrain.handover import Folder
from actors.pretrain.job import PretrainJob
from actors.pretrain.lead import PretrainResult, pretrain
from cluster.controller.fleet import AGENT_STARTS, AgentLost, Fleet, WorkerKind
from cluster.core.history import GroupJournal
from cluster.goodput.accounts import GroupReport, read_run
from cluster.node.agent import AgentPlace, NodeAgent
from cluster.workers.named_actors import NAMESPACE
from data.tokenized import write_shards
from engines.config import LearnerSettings
from infra.errors import CheckpointError, DataError, StepError
from infra.processes import process_start
from infra.storage import open_store
from models.llama import LlamaConfig
from models.tokenizers import load_tokenizer, train_bpe
from models.weights import load_llama
from tests.helpers import rays

STEPS = 24
PATIENT: dict[str, Any] = {
    "hang_floor_s": 60,
    "start_timeout_s": 600,
    "pulse_timeout_s": 30,
    "abort_timeout_s": 20,
    "join_stall_s": 50,
}
"""Elastic settings for a machine that many share: nothing but a death or a stop is judged by the clock."""
SETTINGS = PretrainSettings(
    optimizer=LearnerSettings(learning_rate=3e-3, warmup_steps=2, timeout=120),
    steps=STEPS,
    batch_size=5,
    sequence_length=16,
    micro_batch_size=2,
    save_every=4,
    num_cpus=0.25,
    elastic=PATIENT,
)


@pytest.fixture(scope="module", autouse=True)
def local_ray(s3_environment: dict[str, str]) -> Iterator[None]:
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    runtime_env = {"env_vars": {"PYTHONPATH": paths, **s3_environment}}
    with rays.local_ray(4, runtime_env=runtime_env):
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    texts = [" ".join(str(draw.randrange(100)) + " plus" for _ in range(40)) for _ in range(60)]
    train_bpe(texts, 300).save(folder / "tokenizer")
    write_shards(texts, load_tokenizer(folder / "tokenizer"), folder / "tokens")
    return folder


Row = dict[str, Any]


class Run:
    """One pretraining folder, and what was heard of it."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.corpus, self.folder = corpus, folder
        self.rows: list[Row] = []
        self.events: list[Row] = []
        self.result: PretrainResult | None = None
        self.state = str(folder / "state")
        self.tokens: Folder = corpus / "tokens"

    def train(
        self,
        faults: str = "",
        hook: Callable[["Run"], None] = lambda run: None,
        elastic: Any = (),
        out: str = "out",
        **settings: Any,
    ) -> "Run":
        """`hook` runs in the caller after every row and event."""
        vocab_size = load_tokenizer(self.corpus / "tokenizer").vocab_size
        model = LlamaConfig(
            dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, vocab_size=vocab_size, context=16, tied=True
        )  # fmt: skip
        chosen = SETTINGS.model_dump() | {"elastic": PATIENT | dict(elastic)} | settings
        self.rows.clear()

        def row(row: Row) -> None:
            self.rows.append(row)
            hook(self)

        def event(event: Row) -> None:
            self.events.append(event)
            hook(self)

        job = PretrainJob(
            self.tokens, self.corpus / "tokenizer", model, PretrainSettings(**chosen), str(self.state), 7, faults
        )
        accounts = (str(self.folder / "store"), "run", "pretrain")
        self.result = pretrain(job, self.folder / out, row, on_event=event, accounts=accounts)
        return self

    @property
    def curve(self) -> list[tuple]:
        return [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["tokens"]) for row in self.rows]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_llama(self.folder / "out").state_dict()

    def heard(self, kind: str) -> list[Row]:
        return [event for event in self.events if event["event"] == kind]

    def faults(self) -> list[Row]:
        """What was detected once the group had started: before that an agent may take long on a crowded machine."""
        return [event for event in self.heard("detected") if event["generation"]]

    def said(self) -> str:
        return "\n".join(str(event) for event in self.events)

    def assert_equals(self, other: "Run") -> None:
        assert self.curve == other.curve, self.said()
        expected = other.weights
        assert all(torch.equal(tensor, expected[name]) for name, tensor in self.weights.items())

    def assert_lost_at_most_one(self) -> None:
        assert all(event["lost_steps"] <= 1 for event in self.heard("started")), self.said()


@pytest.fixture
def run(corpus: Path, tmp_path: Path) -> Iterator[Run]:
    made = Run(corpus, tmp_path)
    yield made
    for folder in memory_of(made):
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # another run of this module has something there
            folder.parent.rmdir()


@pytest.fixture(scope="module")
def quiet(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The fault-free run."""
    return Run(corpus, tmp_path_factory.mktemp("quiet")).train()


@dataclass(frozen=True)
class Fetched:
    """Tokens that every process brings into a folder of its own, as from a store that is no folder."""

    folder: Path
    places: Path

    def path(self) -> Path:
        place = self.places / str(os.getpid())
        if not place.exists():
            shutil.copytree(self.folder, place)
        return place


class Enough(Exception):
    """What was to be seen has been seen."""


def until(holds: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.05)


def lives(pid: int) -> bool:
    return process_start(pid) is not None


def memory_of(run: Run) -> list[Path]:
    """What the group holds in this machine's memory."""
    group = GroupJournal(open_store(run.state), "x").history.group
    return list(Path("/dev/shm").glob(f"recua-node-*/recua-{group}"))


def test_elastic_quiet_run_learns_and_leaves_nothing_behind(quiet: Run) -> None:
    assert quiet.result is not None
    assert (quiet.result.steps, quiet.result.tokens, quiet.result.restarts) == (STEPS, STEPS * 5 * 16, 0)
    assert [row["step"] for row in quiet.rows] == list(range(STEPS))
    assert quiet.rows[-1]["loss"] < quiet.rows[0]["loss"] - 0.5
    (started,) = quiet.heard("started")
    assert len(started["pids"]) == 2 and not any(map(lives, started["pids"]))
    assert memory_of(quiet) == []
    assert read_run(open_store(str(quiet.folder / "store")), "run")[0].ended


def test_elastic_spares_make_two_kills_invisible(run: Run, quiet: Run) -> None:
    """A rank dies while the other waits for it in a collective; then rank 0 does: the curve is bitwise the same."""
    kills = "pretrain.generation-1.rank-1.step:6=kill,pretrain.generation-2.rank-0.step:5=kill"
    run.train(kills, elastic={"spares": 2, "min_workers": 2})  # a spare that is still warming up is waited for
    run.assert_equals(quiet)
    run.assert_lost_at_most_one()
    assert run.result is not None and run.result.restarts == 2
    seen = [event["what"] for event in run.faults()]
    assert len(seen) == 2 and "rank 1" in seen[0] and "rank 0" in seen[1], seen
    decided = [event["decision"] for event in run.heard("decided") if event.get("action") == "replace"]
    assert "restore from host memory" in decided[-1] and "elastic.spares" in decided[-1]
    report = read_run(open_store(str(run.folder / "store")), "run")[0]
    assert len(report.pauses) == 3
    assert_accounted(report)


def assert_accounted(report: GroupReport) -> None:
    """Two faults: every second of every life, from the birth of a process to its end, is in a bucket that names it."""
    ledger, goodput = report.goodput.ledger, report.goodput
    assert report.missing == () and report.lives >= 4 and report.worst_unattributed < 0.01
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.lived_s, rel=0.01)
    assert goodput.absent_s > -0.01 * goodput.capacity * goodput.wall_s, "never more processes than were asked for"
    for bucket in ("init", "compute", "data_wait", "detection", "re_forming", "exposed_communication", "idle"):
        assert ledger.seconds[bucket] > 0, (bucket, ledger.seconds)
    print(report.to_text())


def test_elastic_group_goes_on_smaller_and_grows_back(run: Run) -> None:
    """Without a spare the survivor goes on alone at once; a new process joins at a step boundary, no step is lost."""

    def grown(run: Run) -> None:
        if [event["ranks"] for event in run.heard("started")] == [2, 1, 2] and run.rows[-1]["step"] % 7 == 0:
            raise Enough

    with pytest.raises(Enough):
        run.train("pretrain.generation-1.rank-0.step:6=kill", grown, steps=100000)
    started = run.heard("started")
    assert started[1]["lost_steps"] <= 1 and started[2]["lost_steps"] == 0
    assert started[1]["action"] == "shrink" and started[1]["key"] == "elastic.min_workers"
    alone = [pid for pid in started[1]["pids"]]
    assert alone[0] in started[0]["pids"] and alone[0] in started[2]["pids"], "the survivor is the same process"
    steps = [row["step"] for row in run.rows]
    assert steps == list(range(len(steps)))
    assert not any(map(lives, started[2]["pids"])), "an error in the caller leaves nothing running"


@pytest.mark.parametrize("action", [pytest.param("kill", marks=pytest.mark.long), "stop"])
def test_elastic_group_that_may_not_shrink_waits_for_a_replacement(action: str, run: Run, quiet: Run) -> None:
    """Both ways to lose a rank, one of them during the recovery from the other's loss."""
    faults = f"pretrain.generation-1.rank-1.step:9={action},pretrain.generation-2.rank-0.join:1=kill"
    run.train(faults, elastic={"min_workers": 2})
    run.assert_equals(quiet)
    run.assert_lost_at_most_one()
    assert "min_workers" in run.said()
    if action == "stop":
        assert "stands still" in run.said()
        stacks = run.heard("stacks")
        assert stacks and open_store(str(run.folder / "store")).get(stacks[0]["stacks"]), run.said()


def test_elastic_rank_that_hangs_on_its_way_into_a_generation_is_named_and_replaced(run: Run, quiet: Run) -> None:
    """One waits for ever where it should read the state, its replacement's peer spins where it should form the groups:
    each is known by its lack of progress, long before `join_timeout_s`; who waits for it is left alone."""
    faults = "pretrain.generation-1.rank-1.load:1=deadlock,pretrain.generation-2.rank-0.join:1=spin"
    run.train(faults, elastic={"min_workers": 2, "join_stall_s": 6})
    run.assert_equals(quiet)
    seen = run.faults()
    assert len(seen) == 2 and "(rank 1): no progress" in seen[0]["what"], run.said()
    assert "(rank 0): no progress" in seen[1]["what"] and "elastic.join_stall_s" in seen[1]["what"], run.said()
    assert all(event["after_s"] < 40 for event in seen), run.said()
    (started,) = run.heard("started")
    assert started["generation"] == 3 and started["ranks"] == 2
    stacks = [open_store(str(run.folder / "store")).get(event["stacks"]) or b"" for event in run.heard("stacks")]
    assert len(stacks) == 2 and all(b"perform" in text for text in stacks), "where they hung"


def test_elastic_ranks_train_on_without_their_controller_and_are_taken_over(run: Run) -> None:
    """The second call has another folder for the model than the one that started the ranks."""

    @ray.remote(num_cpus=0, max_retries=0)
    def owner_that_dies(run: Run) -> None:
        def die(run: Run) -> None:
            if len(run.rows) == 8:
                os.kill(os.getpid(), signal.SIGKILL)

        run.train(hook=die, steps=400, out="first")

    longer = Run(run.corpus, run.folder)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(owner_that_dies.remote(longer))
    longer.train(steps=400, out="second")
    decided = [event["decision"] for event in longer.heard("decided")]
    assert any(text.startswith("decision: adopt") for text in decided), longer.said()
    assert [row["step"] for row in longer.rows] == list(range(400)) and longer.result is not None
    assert (longer.result.restarts, longer.result.lost_steps) == (0, 0), longer.said()
    assert load_llama(longer.folder / "second").state_dict() and not [*(longer.folder / "first").iterdir()]
    assert not any(map(lives, longer.heard("started")[-1]["pids"]))


@pytest.mark.parametrize("left", ["memory", "storage"])
def test_elastic_run_whose_every_process_died_goes_on_from_what_is_left(left: str, run: Run, quiet: Run) -> None:
    """From shared memory no step is lost; where that is gone too, from the newest snapshot in storage."""

    def end_all(run: Run) -> None:
        if len(run.rows) == 10:
            stored = open_store(run.state)
            until(lambda: any("/manifests/" in key for key in stored.list("snapshots")))
            raise Enough

    with pytest.raises(Enough):
        run.train(hook=end_all)
    folders = memory_of(run)
    assert folders, "what was not finished stays in memory"
    if left == "storage":
        for folder in folders:
            for shard in folder.glob("*.shard"):
                shard.unlink()
    run.events.clear()
    run.train()
    run.assert_equals(quiet)
    (started,) = run.heard("started")
    assert started["step"] >= (9 if left == "memory" else 4), run.said()
    assert ("from host memory" if left == "memory" else "from storage") in run.said()


@pytest.mark.parametrize(
    ("ranks", "block"),
    [(4, {"tensor_parallel": 2, "micro_batch_size": 5}), (2, {"pipeline_parallel": 2})],
    ids=["dp2 x tp2", "pp2"],
)
def test_elastic_other_shards_go_on_from_the_same_state(
    run: Run, quiet: Run, ranks: int, block: dict[str, int]
) -> None:
    """FSDP x two ranks a block; a lost rank is replaced in its block; then one rank alone goes on."""
    kill = f"pretrain.generation-1.rank-{ranks - 1}.step:5=kill"
    run.train(kill, sharding="fsdp", workers=ranks, elastic={"min_workers": ranks}, **block)
    assert [row["loss"] for row in run.rows] == pytest.approx([row["loss"] for row in quiet.rows], rel=1e-4)
    run.assert_lost_at_most_one()
    assert [event["ranks"] for event in run.heard("started")] == [ranks, ranks], run.said()
    rows = list(run.rows)
    again = Run(run.corpus, run.folder).train(workers=1)
    assert again.rows == rows and again.heard("started")[0]["step"] == STEPS


def test_elastic_nodes_that_share_no_folder_meet_in_s3(s3_url: str, run: Run, quiet: Run, tmp_path: Path) -> None:
    """Journal, outcomes, snapshots and the model itself go through S3; a fresh caller goes on from there alone."""
    places, run.state = tmp_path / "places", f"{s3_url}/state"
    run.tokens = Fetched(run.corpus / "tokens", places)

    def all_lost(run: Run) -> None:
        if len(run.rows) > 13:
            stored = open_store(run.state)
            until(lambda: any("/manifests/" in key for key in stored.list("snapshots")))
            raise Enough

    with pytest.raises(Enough):
        run.train("pretrain.generation-1.rank-1.step:6=kill", all_lost, elastic={"min_workers": 2})
    assert len(list(places.iterdir())) >= 3, "two ranks and a replacement"
    assert "min_workers" in run.said()
    run.assert_lost_at_most_one()
    for folder in memory_of(run):
        for shard in folder.glob("*.shard"):
            shard.unlink()
    other = Run(run.corpus, tmp_path / "elsewhere")
    other.state, other.tokens = run.state, run.tokens
    other.train()
    other.assert_equals(quiet)
    assert "from storage" in other.said()
    assert other.heard("started")[0]["step"] >= 4
    assert not (tmp_path / "state").exists() and memory_of(other) == []


def test_elastic_divergence_goes_back_leaves_data_out_and_ends_at_last(run: Run) -> None:
    """A learning rate that breaks the weights: every rollback drops the window of data, and there are only so many."""
    optimizer = LearnerSettings(learning_rate=1e12, max_grad_norm=0, eps=1e-30, timeout=120)
    with pytest.raises(StepError, match="max_rollbacks"):
        run.train(optimizer=optimizer, steps=5000, elastic={"max_rollbacks": 2})
    back = run.heard("rolled-back")
    assert len(back) == 2 and all(event["to_step"] <= event["step"] for event in back), run.said()
    began = {event["generation"]: event["step"] for event in run.heard("started")}
    assert all(began[event["generation"] + 1] == event["to_step"] for event in back), run.said()
    history = GroupJournal(open_store(run.state), "x").history
    assert history.rollbacks == 2 and history.skipped, history
    steps = [row["step"] for row in run.rows]
    assert steps.count(back[0]["to_step"]) >= 2, "steps that were undone are told of again"
    assert not any(map(lives, run.heard("started")[-1]["pids"]))


def test_elastic_bad_input_is_named(run: Run, quiet: Run) -> None:
    with pytest.raises(CheckpointError, match="other settings"):
        Run(run.corpus, quiet.folder).train(batch_size=6)
    with pytest.raises(DataError, match="lower sequence_length"):
        run.train(sequence_length=10**6, workers=1)
    assert not any(map(lives, [event["pids"] for event in run.heard("started")]))


def test_detached_node_whose_agent_cannot_start_is_given_up_with_the_reason() -> None:
    class Broken(NodeAgent):
        def __init__(self, place: AgentPlace) -> None:
            raise OSError("no space left in its memory")

    fleet = Fleet("broken", WorkerKind(object), Broken)
    (node,) = fleet.open_agents()
    heard: list[AgentLost] = []
    while not heard or heard[-1].node_lives:
        for news in fleet.wait(60, lambda node: (0, 0)):
            assert isinstance(news, AgentLost), news
            heard.append(news)
            if news.node_lives:
                fleet.open_agent(node)
    fleet.close(remove=True)
    assert len(heard) == AGENT_STARTS and "no space left in its memory" in heard[-1].reason, heard


def test_elastic_everything_is_free_afterwards() -> None:
    """No actor of any group is left."""
    assert [actor for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE] == []
    assert Fleet("x", WorkerKind(object)).agents == {}
