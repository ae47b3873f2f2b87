"""Agents whose controller is gone, and what groups leave in a machine's memory; with real processes."""

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.core.history import GroupJournal, Superseded
from cluster.node import host_memory
from cluster.node.agent import AgentPlace, AgentSettings, NodeAgent, inherit
from cluster.node.beacons import ROWS, BeaconReader, BeaconWriter
from cluster.node.host_memory import Standing, claim, free, survey
from cluster.node.rank_watch import RankWatch
from infra.errors import StoreError
from infra.processes import process_start
from infra.storage import open_store
from infra.storage.files import write_text
from tests.helpers.forks import FORKS

DEADLINE = 60.0


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Stands for /dev/shm: what other groups of this machine have there is not ours."""
    return tmp_path / "shm"


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    processes = []

    def begin(body: Callable[..., None], *arguments: Any) -> Any:
        processes.append(FORKS.Process(target=body, args=arguments))
        processes[-1].start()
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.join()


def train(folder: Path, name: str, patience_s: float = DEADLINE) -> None:
    """A rank, as far as its node's agent can tell."""
    writer = BeaconWriter(folder / "beacons" / f"{name}.beacon")
    writer.set(state="joined", generation=1, world_size=1)
    host_memory.end_when_unwatched(folder, patience_s)
    for step in range(1 << 30):
        writer.say(step, {"step": step, "generation": 1})
        writer.set(step=step + 1)
        time.sleep(0.0005)


def watch_over(folder: Path, shared: Path, orphan_s: float, standing: Path) -> None:
    """An agent without a controller. `standing`: a file with what the store says of the run."""

    def ask(store: str, run: str) -> Standing:
        assert (store, run) == (str(shared / "store"), "r")
        word = standing.read_text()
        if word == "?":
            raise StoreError("no answer")
        return word  # type: ignore[return-value]

    accounts = (str(shared / "store"), "r", "pretrain")
    settings = AgentSettings(orphan_s, accounts, journal=standing, leader=1, ask_standing=ask)
    place = AgentPlace("g", "n0", folder, settings)
    threading.Thread(target=NodeAgent, args=(place,)).start()  # SIGTERM stays pytest's
    threading.Event().wait()


@pytest.mark.parametrize(
    ("said", "orphan_s", "kept"), [("stopped", 1000.0, True), ("over", 1000.0, False), ("open", 3.0, True)]
)
def test_detached_agent_ends_its_ranks_with_the_run_or_when_no_controller_comes(
    said: str, orphan_s: float, kept: bool, shared: Path, tmp_path: Path, start: Any
) -> None:
    folder = host_memory.group_folder("n0", "g", shared)
    standing = tmp_path / "standing"
    standing.write_text("?" if said == "open" else "open")
    beacon = folder / "beacons" / "w0.beacon"
    rank = start(train, folder, "w0")
    until(beacon.exists, "no rank")
    agent = start(watch_over, folder, shared, orphan_s, standing)
    until((folder / host_memory.OWNER).exists, "no agent")
    (folder / "x.shard").touch()
    if said != "open":
        until(lambda: BeaconReader(beacon).read().step > 100, "it does not train")
        assert agent.is_alive() and rank.is_alive(), "a store without news ends nothing"
        write_text(standing, said)
    rank.join(DEADLINE)
    agent.join(DEADLINE)
    assert rank.exitcode == -signal.SIGKILL and agent.exitcode == 0
    assert folder.exists() == kept, "a run that may be resumed keeps its snapshots"


def test_detached_rank_ends_when_its_agent_died_too(shared: Path, start: Any) -> None:
    folder = host_memory.group_folder("n0", "g", shared)
    rank = start(train, folder, "w0", 1.0)
    rank.join(DEADLINE)
    assert rank.exitcode == host_memory.ORPHANED


def test_detached_rows_of_steps_that_nobody_asked_for_are_kept_beyond_the_beacon(shared: Path) -> None:
    folder = host_memory.group_folder("n0", "g", shared)
    writer = BeaconWriter(folder / "beacons" / "w0.beacon")
    watch = RankWatch("n0", folder)
    last = 3 * ROWS
    for step in range(10, last):
        writer.say(step, {"step": step, "generation": 1 if step < 100 else 2})
        writer.set(step=step + 1)
        if step == 10:
            until(lambda: watch.wait(0, 0.1).sights, "no beacon")
        if step % (ROWS // 4) == 0:
            watch.keep_rows()
    heard: list[int] = []
    while len(heard) < last - 20:
        rows = watch.wait(0, 0, first_row=20 + len(heard)).rows
        assert rows, f"nothing after {len(heard)} rows"
        heard += [row["step"] for row in rows]
    assert heard == list(range(20, last)), "each once, in order"
    assert not watch.wait(0, 0, first_row=last).rows
    watch.close()


def test_detached_of_two_controllers_the_later_one_leads(shared: Path, tmp_path: Path) -> None:
    path = tmp_path / "group.json"
    first = GroupJournal(open_store(path.parent), "g")
    first.note(controllers=1)
    agents: list[NodeAgent] = []
    place = AgentPlace("g", "n0", host_memory.group_folder("n0", "g", shared), AgentSettings(leader=1))
    maker = threading.Thread(target=lambda: agents.append(NodeAgent(place)))
    maker.start()
    maker.join()
    agents[0].listen(0, 0.01, leader=1)
    second = GroupJournal(open_store(path.parent), "g")
    second.note(controllers=2)
    agents[0].listen(0, 0.01, leader=2)
    with pytest.raises(Superseded, match="controller 2 leads"):
        agents[0].listen(0, 0.01, leader=1)
    with pytest.raises(Superseded):
        agents[0].close(True, leader=1)
    with pytest.raises(Superseded, match="another controller"):
        first.note(rollbacks=1)
    assert GroupJournal(open_store(path.parent), "g").history.rollbacks == 0
    agents[0].close(True, leader=2)
    assert not place.folder.exists()


def test_detached_memory_of_a_lost_cluster_is_taken_over_from_its_last_ranks(shared: Path, start: Any) -> None:
    """Ray was started again on this machine: what still trains under the old nodes cannot be reached any more."""
    old, new = (host_memory.group_folder(node, "g", shared) for node in ("old", "new"))
    rank = start(train, old, "w0")
    until(lambda: host_memory.living_workers(old), "no rank")
    (old / "a.shard").write_text("state")
    claim(old, "g", None, leader=1)  # in the name of this process
    inherit(new, ["old", "new"], leader=2)
    assert rank.is_alive() and old.exists(), "a living node keeps what it has"
    inherit(new, ["new"], leader=1)
    assert rank.is_alive() and old.exists(), "and so does what this controller has just started"
    inherit(new, ["new"], leader=2)
    rank.join(DEADLINE)
    assert rank.exitcode == -signal.SIGKILL
    assert (new / "a.shard").read_text() == "state" and (new / "beacons" / "w0.beacon").exists()
    assert not old.parent.exists()


def test_detached_sweep_takes_what_no_run_needs_and_nothing_else(shared: Path, tmp_path: Path, start: Any) -> None:
    said: dict[str, Standing] = {"finished": "over", "failed": "stopped", "running": "open", "ended": "stopped"}

    def ask(store: str, run: str) -> Standing:
        if run not in said:
            raise StoreError("no answer")
        return said[run]

    def made(run: str, group: str, age_s: float = 7200.0, journal: bool = True) -> Path:
        """What an agent that is dead by now left; `run`: "" of a pretraining without one."""
        folder = host_memory.group_folder(f"n-{uuid.uuid4().hex[:8]}", group, shared)
        folder.mkdir(parents=True)
        (folder / "x.shard").write_bytes(b"x" * 8192)
        path = tmp_path / "states" / group / "group.json"
        GroupJournal(open_store(path.parent), "x").note(controllers=1)
        path.write_text(path.read_text().replace(GroupJournal(open_store(path.parent), "x").history.group, group))
        claimed = start(claim, folder, group, path, ("store", run, "pretrain") if run else None)
        claimed.join(DEADLINE)
        if not journal:
            path.unlink()
        old(folder, age_s)
        return folder

    def old(folder: Path, age_s: float) -> None:
        for path in [*folder.rglob("*"), folder]:
            os.utime(path, (time.time() - age_s,) * 2)

    gone = {made("finished", "a"), made("ended", "b", journal=False), made("", "c", journal=False)}
    again = made("failed", "d")
    path = tmp_path / "states" / "d" / "group.json"
    path.write_text(path.read_text().replace('"d"', '"made anew"'))
    gone.add(again)
    stays = {made("failed", "e"), made("running", "f"), made("unknown", "g"), made("", "h")}
    stays.add(made("finished", "i", age_s=1.0))  # its agent was there a moment ago
    used = made("finished", "j")
    rank = start(train, used, "w0")
    until(lambda: host_memory.living_workers(used), "no rank")
    old(used, 7200)
    stays.add(used)
    elsewhere = made("failed", "k", journal=False)  # its state folder was on a disk that is not mounted now
    text = (elsewhere / host_memory.OWNER).read_text()
    device = os.stat(elsewhere / host_memory.OWNER).st_dev
    (elsewhere / host_memory.OWNER).write_text(text.replace(f'"device": {device}', f'"device": {device + 1}'))
    assert (elsewhere / host_memory.OWNER).read_text() != text
    stays.add(elsewhere)
    nameless, young = (host_memory.group_folder(node, "l", shared) for node in ("n-nameless", "n-young"))
    for folder, age_s in ((nameless, 7200.0), (young, 1.0)):
        (folder / "beacons").mkdir(parents=True)
        old(folder, age_s)
    gone.add(nameless)
    stays.add(young)

    found = survey(ask, shared)
    assert {held.folder for held in found} == gone | stays
    wrong = [held for held in found if held.needed == (held.folder in gone)]
    assert not wrong, wrong
    assert next(held.size for held in found if held.group == "a") >= 8192
    free(found, shared)
    assert {folder for folder in gone | stays if folder.exists()} == stays
    assert not any(folder.parent.exists() for folder in gone)
    assert process_start(rank.pid) is not None, "nothing was done to a process"
