"""A shared cluster: ranks outlive the step's process and the driver, and are adopted; a run that ends ends them."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import detached_program as program
import pytest
import ray
from click.testing import CliRunner
from ray.cluster_utils import Cluster

from actors.pretrain.step_log import read_steps
from cluster.core.history import KEY
from cluster.node.beacons import BeaconReader, Record
from cluster.node.host_memory import BEACONS, OWNER, PULSE_FRESH_S, node_root
from cluster.workers.named_actors import NAMESPACE
from data.tokenized import write_shards
from infra.processes import process_start
from infra.storage import open_store
from models.tokenizers import load_tokenizer, train_bpe
from tests.helpers import rays
from workflows.cli.main import main_group
from workflows.runs.catalog import cancel_run

RUN, STEPS = "shared", 1_000_000


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


class Driver:
    """A driver's process, and the events that it prints."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.lines: list[str] = []
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith('{"kind"'):
                with contextlib.suppress(ValueError):  # a long one, with what Ray printed in between
                    self.events.append(json.loads(line))

    def said(self) -> str:
        return "".join(self.lines[-40:])

    def hears(self, text: str, count: int = 1) -> None:
        """Wait until so many log lines hold the text."""

        def heard() -> bool:
            assert self.process.poll() is None, f"the driver has ended: {self.said()}"
            return sum(text in event.get("message", "") for event in self.events if event["kind"] == "log") >= count

        wait_for(heard, f"never heard {text!r}: {self.said()}")

    def attempts(self) -> list[int]:
        """Process ids of the step's attempts."""
        events = [event for event in self.events if event["kind"] == "started" and event["step"] == "pretrain"]
        return [event["pid"] for event in events]

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(60)
        self._reader.join(60)


@pytest.fixture(scope="module")
def cluster(repository: Path) -> Iterator[Cluster]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(repository)])  # of the nodes' workers
    with rays.cluster(num_cpus=1) as made:
        node = ray.get_runtime_context().get_node_id()
        yield made
    shutil.rmtree(node_root(node), ignore_errors=True)
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[[], Driver]]:
    draw = random.Random(0)
    texts = [" ".join(str(draw.randrange(100)) + " plus" for _ in range(40)) for _ in range(60)]
    train_bpe(texts, 300).save(tmp_path / "tokenizer")
    write_shards(texts, load_tokenizer(tmp_path / "tokenizer"), tmp_path / "tokens")
    settings = {"store": str(tmp_path / "store"), "run_id": RUN, "ray_address": cluster.address}
    drivers: list[Driver] = []

    def launch() -> Driver:
        drivers.append(Driver([sys.executable, program.__file__, json.dumps(settings), str(tmp_path), str(STEPS)]))
        return drivers[-1]

    yield launch
    for driver in drivers:
        driver.process.kill()
        driver.process.wait()


def test_detached_ranks_outlive_step_and_driver_and_end_with_the_run(
    start: Callable[[], Driver], tmp_path: Path
) -> None:
    state = tmp_path / "store" / "runs" / RUN / "state" / "pretrain[0]"

    def group() -> str:
        return str(json.loads((state / KEY).read_text())["group"])

    def memory() -> Path:
        return node_root(ray.get_runtime_context().get_node_id()) / f"recua-{group()}"

    def ranks() -> dict[str, Record]:
        found = {path.stem: BeaconReader(path).read() for path in (memory() / BEACONS).glob("*.beacon")}
        living = {name: one for name, one in found.items() if process_start(one.pid) == str(one.started)}
        return {name: one for name, one in living.items() if one.state == "joined"}

    def places() -> dict[str, tuple[int, int, int]]:
        return {name: (one.pid, one.generation, one.rank) for name, one in ranks().items()}

    def step() -> int:
        return min(one.step for one in ranks().values())

    def told() -> int:
        return len(read_steps(open_store(state)))

    def goes_on(driver: Driver) -> None:
        seen = step()
        wait_for(lambda: told() > seen, f"rows do not go on: {driver.said()}")

    # The step's process is killed, or told to end (what Ray does to it when its driver is gone): the executor repeats
    # it, and the new attempt adopts the ranks as they are.
    first = start()
    wait_for(lambda: told() > 5, f"it does not train: {first.said()}")
    before = places()
    assert len(before) == 2, before
    for deaths, number in enumerate((signal.SIGTERM, signal.SIGKILL), 1):
        os.kill(wait_for(first.attempts, "no attempt")[-1], number)
        first.hears("decision: adopt", deaths)
        goes_on(first)
        assert places() == before, "the same processes in the same generation"

    # The driver is killed: the ranks train on without anyone; what they did is told, once, by the next driver.
    lost, [*_, attempt] = time.monotonic(), first.attempts()
    first.end(signal.SIGKILL)
    wait_for(lambda: process_start(attempt) is None, "the step's process outlived its driver")
    left = told()
    wait_for(lambda: step() > left + 50, "the ranks do not train on")
    second = start()
    second.hears("decision: adopt")
    goes_on(second)
    print(f"led again {time.monotonic() - lost:.1f} s after the driver was killed")
    assert places() == before, "the same processes in the same generation"
    rows = read_steps(open_store(state))
    assert [row["step"] for row in rows] == list(range(len(rows))) and len(rows) > left + 50

    # Cancelled: nothing is left but the snapshots, which a resumed run would go on from.
    folder, name = memory(), group()
    agent = json.loads((folder / OWNER).read_text())["agent"]
    cancelled = time.monotonic()
    assert cancel_run(open_store(tmp_path / "store"), RUN) == "cancelled"
    processes = [agent, *(pid for pid, _, _ in before.values())]
    wait_for(lambda: all(process_start(pid) is None for pid in processes), "something of the group lives on")
    print(f"no process {time.monotonic() - cancelled:.1f} s after it was cancelled")
    second.process.wait(60)
    wait_for(lambda: not [one for one in actors() if one.startswith(name)], f"{actors()} are left")
    assert list(folder.glob("*.shard")), "a cancelled run can be resumed"

    # The run is given up: its memory goes.
    old = time.time() - 2 * PULSE_FRESH_S
    os.utime(folder / "pulse", (old, old))
    store = ["--store", str(tmp_path / "store")]
    plan = CliRunner().invoke(main_group, ["gc", *store], catch_exceptions=False).output
    assert f"{folder}: run {RUN} may go on from it" in plan, plan
    done = CliRunner().invoke(main_group, ["gc", *store, "--run", RUN, "--yes"], catch_exceptions=False).output
    assert f"{folder}: run {RUN} is finished or removed" in done and not folder.exists(), done


def actors() -> list[str]:
    """Named actors of all groups."""
    return [
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE
    ]
