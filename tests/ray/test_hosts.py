"""Pretraining over real networks: hosts whose names resolve to loopback, links that are cut and healed."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data.tokenized import write_shards
from models.tokenizers import load_tokenizer, train_bpe
from tests.helpers.net_hosts import REPOSITORY, Host, hosts, no_hosts

DEADLINE_S = 300.0
STEPS = 60
SETTINGS: dict[str, Any] = {
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "schedule": "constant", "timeout": 120},
    "batch_size": 6,
    "sequence_length": 16,
    "micro_batch_size": 2,
    "save_every": 10**6,
    "workers": 2,
    "num_cpus": 0.6,
}
"""One rank finds room on a host."""
PATIENT = {"hang_floor_s": 60, "pulse_timeout_s": 30, "abort_timeout_s": 20, "start_timeout_s": 600}
UNBLAMED = {**PATIENT, "respawn_backoff_s": 1, "quarantine_faults": 1}
"""One fault would be enough for a quarantine."""
Row = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def where_hosts_can_be_made() -> None:
    if (why := no_hosts()) is not None:
        pytest.skip(why)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    texts = [" ".join(str(draw.randrange(100)) + " plus" for _ in range(40)) for _ in range(60)]
    train_bpe(texts, 300).save(folder / "tokenizer")
    write_shards(texts, load_tokenizer(folder / "tokenizer"), folder / "tokens")
    return folder


class Training:
    """A driver on `host`, in its own process, and what it says."""

    def __init__(self, host: Host, head: Host, corpus: Path, folder: Path, **settings: Any) -> None:
        folder.mkdir()
        self.order = {
            "address": head.ray, "corpus": str(corpus), "folder": str(folder), "faults": "",
            "vocab_size": load_tokenizer(corpus / "tokenizer").vocab_size,
            "settings": {**SETTINGS, **settings},
        }  # fmt: skip
        self._log, self._output = folder / "log", (folder / "output").open("w")
        command = [sys.executable, str(REPOSITORY / "tests/chaos/elastic_program.py"), json.dumps(self.order)]
        streams = {"stdout": self._output, "stderr": self._output}
        self.process = host.start(*command, str(self._log), env=host.environment, **streams)

    def said(self, kind: str) -> list[Any]:
        lines = self._log.read_text().splitlines(keepends=True) if self._log.exists() else []
        facts = [json.loads(line) for line in lines if line.endswith("\n")]
        return [fact[kind] for fact in facts if kind in fact]

    @property
    def rows(self) -> list[Row]:
        return self.said("row")

    def formed(self) -> list[int]:
        """Ranks of every generation so far."""
        return [event["ranks"] for event in self.said("event") if event["event"] == "started"]

    def wait(self, what: Callable[["Training"], object]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not what(self):
            assert self.process.poll() is None and time.monotonic() < deadline, self.story()
            time.sleep(0.05)

    def ends(self) -> Row:
        """Its result."""
        assert self.process.wait(DEADLINE_S) == 0, self.story()
        result: Row = self.said("result")[0]
        return result

    def story(self) -> str:
        events = "\n".join(str(event) for event in self.said("event")[-40:])
        return f"{events}\n{Path(self._output.name).read_text()[-3000:]}"


def goes_on(training: Training, ranks: int) -> None:
    """In order, without a lost step."""
    training.wait(lambda said: said.formed()[-1] == ranks)
    steps = len(training.rows)
    training.wait(lambda said: len(said.rows) >= steps + 10)
    started = [event for event in training.said("event") if event["event"] == "started"]
    assert not any(event["lost_steps"] for event in started[1:]), training.story()
    seen = [row["step"] for row in training.rows]  # read once: it trains on
    assert seen == list(range(len(seen)))


def losses(rows: list[Row]) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"], row["tokens"]) for row in rows]


def reference(order: dict[str, Any], folder: Path, steps: int) -> "subprocess.Popen[bytes]":
    """The same on one machine for some steps, without Ray; see tests.chaos.elastic_reference."""
    folder.mkdir()
    order = {**order, "folder": str(folder), "skipped": [], "settings": {**order["settings"], "steps": steps}}
    command = [sys.executable, str(REPOSITORY / "tests/chaos/elastic_reference.py"), json.dumps(order)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)})


def test_two_hosts_train_as_one_machine_does_and_a_link_that_was_cut_takes_nobody_away(
    corpus: Path, tmp_path: Path
) -> None:
    """A cut of a second is waited for. After a longer one the rest trains on, nobody is to blame, and the host is taken
    back once the link is healed."""
    (tmp_path / "hosts").mkdir()
    with hosts(2, tmp_path / "hosts") as (head, other):
        head.start_ray()
        other.start_ray(head)
        elastic = {**UNBLAMED, "node_timeout_s": 4}
        training = Training(head, head, corpus, tmp_path / "two", steps=100_000, elastic=elastic)
        alone = reference(training.order, tmp_path / "one", STEPS)
        training.wait(lambda said: len(said.rows) >= 10)
        other.cut()
        time.sleep(1)  # how long it is cut
        other.heal()
        training.wait(lambda said: len(said.rows) >= STEPS)
        assert training.formed() == [2], training.story()
        assert alone.wait(DEADLINE_S) == 0
        assert losses(training.rows)[:STEPS] == losses(json.loads((tmp_path / "one" / "rows.json").read_text()))
        cut_at = time.monotonic()
        other.cut()
        training.wait(lambda said: said.formed()[-1] == 1)
        time.sleep(max(0.0, cut_at + 5 - time.monotonic()))
        other.heal()
        goes_on(training, ranks=2)
        assert "is back: it was only out of reach" in str(training.said("event"))


@pytest.mark.long
def test_hosts_that_cannot_reach_each_other_are_named_with_the_setting_before_training(
    corpus: Path, tmp_path: Path
) -> None:
    """One of them is told a wrong interface."""
    with hosts(2, tmp_path) as (head, other):
        head.start_ray()
        other.start_ray(head, GLOO_SOCKET_IFNAME="lo")
        training = Training(head, head, corpus, tmp_path / "two", steps=40, elastic=PATIENT)
        result = training.ends()
        assert training.formed() == [1] and result["short_steps"] == 40
        story = training.story()
        assert f"{head.address} to {other.address} (at 127.0.0.1): that is loopback" in story
        assert "GLOO_SOCKET_IFNAME" in story and "quarantine" not in story
        first = next(event for event in training.said("event") if "no connection" in str(event))
        assert first["event"] == "detected" and first["generation"] == 1


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[Host]]:
    """A head without room for ranks, and two hosts with room for one each."""
    (tmp_path / "hosts").mkdir()
    with hosts(3, tmp_path / "hosts") as made:
        made[0].start_ray(cpus=0)
        for host in made[1:]:
            host.start_ray(made[0])
        yield made


@pytest.mark.long
def test_hosts_that_lose_the_way_to_each_other_one_way_stand_aside_and_come_back(
    three: list[Host], corpus: Path, tmp_path: Path
) -> None:
    """The controller hears both all the time."""
    head, one, other = three
    elastic = {**UNBLAMED, "hang_floor_s": 5}
    training = Training(head, head, corpus, tmp_path / "run", steps=100_000, elastic=elastic)
    training.wait(lambda said: len(said.rows) >= 10)
    one.lose_way_to(other)
    goes_on(training, ranks=1)
    assert f"{one.address} to {other.address}: no answer" in str(training.said("event"))
    one.find_way_to(other)
    goes_on(training, ranks=2)
    assert "action': 'quarantine" not in str(training.said("event"))


@pytest.mark.long
def test_a_cut_of_the_heads_link_stops_nobody(three: list[Host], corpus: Path, tmp_path: Path) -> None:
    """Ranks and controller are on other hosts; for so long Ray does not give a node up."""
    head, one, _ = three
    training = Training(one, head, corpus, tmp_path / "run", steps=100_000, elastic=UNBLAMED)
    training.wait(lambda said: len(said.rows) >= 10)
    head.cut()
    time.sleep(5)  # how long it is cut
    head.heal()
    goes_on(training, ranks=2)
    assert training.formed() == [2]


@pytest.mark.long
def test_a_host_that_ray_gave_up_comes_back_with_another_raylet(corpus: Path, tmp_path: Path) -> None:
    """Ray ends the raylet of a node that it has not heard of for so long."""
    (tmp_path / "hosts").mkdir()
    with hosts(2, tmp_path / "hosts") as (head, other):
        head.start_ray()
        other.start_ray(head)
        training = Training(head, head, corpus, tmp_path / "run", steps=100_000, elastic=UNBLAMED)
        training.wait(lambda said: len(said.rows) >= 10)
        other.cut()
        time.sleep(40)  # how long it is cut
        goes_on(training, ranks=1)
        other.heal()
        training.wait(lambda said: not other.processes("raylet/raylet"))
        other.start_ray(head)
        goes_on(training, ranks=2)


@pytest.mark.long
def test_pools_and_an_endpoint_over_two_hosts_do_what_they_do_on_one(tmp_path: Path) -> None:
    """Driven from the host that is not the head, where nothing listens on loopback."""
    (tmp_path / "hosts").mkdir()
    with hosts(2, tmp_path / "hosts") as (head, other):
        head.start_ray()
        other.start_ray(head)
        order = json.dumps({"address": head.ray, "folder": str(tmp_path)})
        program = str(REPOSITORY / "tests/ray/hosts_program.py")
        other.run(sys.executable, program, order, env=other.environment, timeout=1500)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["together"]["nodes"], found["apart"]["nodes"]) == (1, 2)
    assert found["together"]["losses"] == found["apart"]["losses"]
    assert found["answers"][0] == found["answers"][1]
    assert found["served"]["grpc"] and found["served"]["openai"], found["served"]
