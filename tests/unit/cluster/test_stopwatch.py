"""The ledger around faults: what was waited for in vain, when it became known, and how it is shown. Pure."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from actors.pretrain.rank_time import Aborted, RankTime
from cluster.controller.fault_times import FaultTimes
from cluster.core import messages as m
from cluster.goodput.accounts import (
    GroupAccount,
    NodeAccount,
    NodeLife,
    Pause,
    RankAccount,
    account,
    read_node,
    write_node,
)
from cluster.goodput.buckets import BUCKETS, Goodput, Ledger
from cluster.goodput.stopwatch import MEMORY_BYTES, Stopwatch, read_account
from cluster.node.agent import AgentPlace, AgentSettings, NodeAgent
from cluster.node.beacons import Record
from cluster.node.rank_watch import Beat, Sight
from engines.collectives.wait_times import KINDS, Wait
from infra.storage import open_store
from workflows.report.groups import interruptions, time_spent
from workflows.report.record import RunRecord
from workflows.report.summary import summarise
from workflows.report.write import write


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Told:
    """Stands for engines.collectives.wait_times.Waits; test_wait_times.py checks its contract with real ranks."""

    def __init__(self, last: Wait | None = None, **seconds: float) -> None:
        self.last, self._seconds = last, seconds

    def take(self) -> dict[str, float]:
        taken, self._seconds = self._seconds, {}
        return taken


def spent(watch: Stopwatch) -> dict[str, float]:
    ledger = watch.ledger()
    assert ledger.unattributed_s == pytest.approx(0)
    return {name: round(seconds, 6) for name, seconds in ledger.seconds.items() if seconds > 1e-9}


def test_ledger_kinds_of_waits_are_buckets() -> None:
    assert set(KINDS) <= set(BUCKETS)


def test_ledger_of_a_committed_step_by_hand() -> None:
    """2 s: 0.5 s for others, 0.25 s for other stages, 0.125 s for a snapshot, the rest computing; then 1 s of data."""
    clock = Clock()
    times = RankTime(Stopwatch(clock))
    waits: Any = Told(exposed_communication=0.5, pipeline_bubble=0.25, checkpoint_stall=0.125)
    with times.step(waits, again=False):
        clock.now = 2.0
    times.enter("data_wait")
    clock.now = 3.0
    times.broken(1, None)  # between steps: the one before counts
    wanted = {"exposed_communication": 0.5, "pipeline_bubble": 0.25, "checkpoint_stall": 0.125, "data_wait": 1.0}
    assert spent(times.watch) == {**wanted, "compute": 1.125}


@pytest.mark.parametrize("self_noticed", [True, False])
def test_ledger_of_a_broken_step_by_hand(self_noticed: bool) -> None:
    """Computing until 9.5 s; waiting from there; the peer dies at 10; the wait ends at 10.25 by itself or at 10.75 by
    the word that comes at 10.5; the next order comes at 11."""
    clock = Clock()
    times = RankTime(Stopwatch(clock))
    times.enter("idle")
    clock.now = 8.0
    ended = 10.25 if self_noticed else 10.75
    waits: Any = Told(Wait("exposed_communication", 9.5, ended), exposed_communication=ended - 9.5)
    with pytest.raises(RuntimeError), times.step(waits, again=False):
        clock.now = ended
        raise RuntimeError
    times.broken(3, waits)
    clock.now = max(ended, 10.5)
    times.heard(Aborted(2, 10.4, 10.4))  # late, about an older generation
    times.heard(Aborted(3, 10.5, 10.0))
    clock.now = 11.0
    times.heard(Aborted(3, 11.0, 10.0))  # once is enough
    wanted = {"idle": 8.0, "recomputed": 1.5, "exposed_communication": 0.5, "detection": 0.5, "re_forming": 0.5}
    assert spent(times.watch) == wanted


def test_ledger_of_a_rank_that_computes_while_its_peer_is_dead_already() -> None:
    """What it computed then is computed again; it waited for nobody in vain."""
    clock = Clock()
    times = RankTime(Stopwatch(clock))
    waits: Any = Told(Wait("exposed_communication", 1.0, 1.5), exposed_communication=0.5)
    with pytest.raises(RuntimeError), times.step(waits, again=True):
        clock.now = 4.0
        raise RuntimeError
    times.broken(1, waits)
    times.heard(Aborted(1, 3.5, 2.0))
    clock.now = 5.0
    assert spent(times.watch) == {"recomputed": 3.5, "exposed_communication": 0.5, "re_forming": 1.0}


def test_ledger_of_a_rank_that_was_stopped_and_then_killed() -> None:
    """The part of its last step in which it stood still is others' time to find out, not computing."""
    clock, memory = Clock(), bytearray(MEMORY_BYTES)
    watch = Stopwatch(clock, memory=memory)
    watch.begin_step()
    clock.now = 10.0
    watch.end_step()
    watch.begin_step()
    dead = read_account(memory, 20.0, died=True, still_since=14.0)
    assert {name: seconds for name, seconds in dead.seconds.items() if seconds} == {
        "compute": 10.0,
        "recomputed": 4.0,
        "detection": 6.0,
    }


def test_ledger_dates_faults_by_what_the_beats_said() -> None:
    def sight(worker: str, ticks: int, alive: bool = True, out_s: float = 0.0) -> Sight:
        return Sight(worker, alive, Record(1, ticks=ticks), out_s=out_s)

    faults = FaultTimes()
    faults.heard(Beat("n0", 1, (sight("a", 1), sight("b", 1))), 100.0)
    faults.heard(Beat("n1", 1, (sight("c", 1),)), 100.5)
    faults.heard(Beat("n0", 2, (sight("a", 2), sight("b", 1))), 102.0)
    assert faults.age_s(m.Suspected(1, ["b"], "hangs"), 105.0) == 5.0, "its last sign of progress"
    assert faults.age_s(m.NodesLost(["n1"], "silent"), 104.0) == 3.5, "its last beat"
    assert faults.age_s(m.Suspected(1, (), "nobody in particular"), 105.0) == 0.0
    assert faults.age_s(m.NodesLost(["unheard of"], "gone"), 105.0) == 0.0
    faults.heard(Beat("n0", 3, (sight("a", 2, alive=False, out_s=0.25), sight("b", 1, out_s=1.0))), 103.0)
    faults.heard(Beat("n0", 4, (sight("a", 2, alive=False, out_s=1.25), sight("b", 1, out_s=2.0))), 104.0)
    assert faults.age_s(m.WorkersLost(["a"], "died"), 104.0) == 1.25, "the moment that its agent saw"
    assert faults.age_s(m.Suspected(1, ["b"], "stopped"), 104.0) == 2.0
    faults.heard(Beat("n0", 5, (sight("b", 2),)), 105.0)
    assert faults.age_s(m.Suspected(1, ["b"], "hangs"), 106.0) == 1.0, "it had gone on"
    assert faults.age_s(m.Tick(), 106.0) == 0.0


def test_ledger_names_spares_apart() -> None:
    """4 ranks and a spare for 10 s; the four compute for 9."""
    seconds = {"compute": 36.0, "init": 5.0, "idle": 9.0}
    told = Goodput(Ledger(50.0, seconds), 5, 10.0, spares=1)
    assert (told.goodput, told.goodput_without_spares) == (0.72, 0.9)
    assert told.to_text().startswith("goodput 0.7200 of 5 ranks over 10.0 s; 0.9000 of the 4 that are no spares\n")
    assert told.to_text().splitlines()[-1].split() == ["unattributed", "0.000%"]


def test_ledger_stands_in_the_report(tmp_path: Path) -> None:
    ledger = Ledger(20.0, {"compute": 12.0, "detection": 1.0, "exposed_communication": 6.9})
    pauses = (
        Pause(0.0, 1.0, 1, "start", "start", "elastic.start_timeout_s", 1),
        Pause(4.0, 4.5, 2, "shrink", "w1 <died>", "elastic.min_workers", 1, 1),
    )
    group = GroupAccount("pretrain", 0.0, 20.0, True, ((0.0, 2),), {"n0": NodeLife(0.0, None, 1)}, pauses, 1)
    report = account(group, [NodeAccount("n0", (RankAccount("w0", 0.0, 20.0, ledger, True),))])
    assert (report.lives, report.worst_unattributed) == (1, pytest.approx(0.1 / 20))
    assert "ranks that lived: 1, unattributed of one at most 0.500% of its life" in report.to_text()
    record = RunRecord("run-1", "llama3", "finished", [], groups=[report.to_json()])
    rows = time_spent(record.groups)
    assert rows[:4] == [
        ["", "pretrain: 2 ranks x 20.0 s"],
        ["goodput", "30.00%"],
        ["absent", "50.00%"],
        ["compute", "30.00%"],
    ]
    assert [row[0] for row in rows[4:]] == ["exposed communication", "detection", "unattributed"]
    assert [row[1] for row in interruptions(record.groups)] == ["pause", "500 ms"], "the start is no interruption"
    assert summarise(record)["groups"][0]["shares"]["detection"] == 0.025
    page, section = write(record, tmp_path).read_text(), "Where the time of the ranks went"
    assert section in page and "exposed communication" in page and "w1 \\u003cdied>" in page
    assert section not in write(RunRecord("run-2", "w", "finished", []), tmp_path).read_text()


def test_ledger_of_a_node_goes_on_under_its_next_agent(tmp_path: Path) -> None:
    """What the one before wrote stays; a process that died with it is accounted to its last sign, not to the day it is
    found."""
    settings = AgentSettings(accounts=(str(tmp_path / "store"), "run", "pretrain"))
    place = AgentPlace("g", "n0", tmp_path / "node" / "recua-g", settings)
    store = open_store(str(tmp_path / "store"))
    old = RankAccount("old", 1.0, 5.0, Ledger(4.0, {"compute": 4.0}))
    write_node(store, "run", "pretrain", NodeAccount("n0", (old, RankAccount("found", 1.0, 2.0, Ledger(1.0)))))
    writing = """
import sys, time
from pathlib import Path
from cluster.node.beacons import BeaconWriter
from cluster.goodput.stopwatch import Stopwatch
beacon = BeaconWriter(Path(sys.argv[1]) / "beacons" / "found.beacon")
watch = Stopwatch(born=time.monotonic() - 5, memory=beacon.account)
watch.enter("idle")
"""
    subprocess.run([sys.executable, "-c", writing, str(place.folder)], check=True, timeout=120)
    ended = time.time()
    agent = NodeAgent(place)
    try:
        deadline = time.monotonic() + 60
        while (told := read_node(store, "run", "pretrain", "n0")) is None or told.ranks[-1].ledger.lived_s < 5:
            assert time.monotonic() < deadline, told
            time.sleep(0.05)
    finally:
        agent.close(remove=True)
    kept, found = told.ranks
    assert (kept.worker, kept.until, kept.gone, kept.ledger.seconds["compute"]) == ("old", 5.0, True, 4.0)
    assert (found.worker, found.gone) == ("found", True) and found.ledger.unattributed_s == pytest.approx(0, abs=1e-3)
    assert found.until <= ended and found.ledger.lived_s == pytest.approx(found.ledger.seconds["init"], abs=0.1)
