"""Fault points of pretraining, and what its campaign found: stores that are slow or down, agents that were replaced."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.pretrain.agent import ReplicaPlace
from actors.pretrain.batches import next_token_loss
from actors.pretrain.fault_points import FaultPoints
from actors.pretrain.lead import fell_short, in_words
from actors.pretrain.step_log import StepLog, read_steps
from actors.pretrain.task import PretrainTask
from cluster.config import ElasticSettings
from cluster.controller.fleet import AgentLost, Fleet, WorkerKind
from cluster.controller.join_board import JoinBoard
from cluster.controller.lead import GroupController, Listener
from cluster.core.beat_board import BeatBoard
from cluster.core.history import GroupJournal
from cluster.core.messages import Join, Joined, JoinMoved, SnapshotFlushed, Spawn, Tick, WorkersReady
from cluster.core.state_machine import StateMachine
from cluster.node.beacons import Record
from cluster.node.rank_watch import Beat, Sight
from cluster.policies.hang import RankProgress
from cluster.policies.rollback import DataWindow
from cluster.policies.snapshot import Restore
from data.mixture import Mixture, Source
from engines.collectives.process_groups import Rendezvous, StoreAddress, host_store
from engines.config import LearnerSettings, SnapshotSettings
from engines.elastic.learner import ElasticLearner, Recipe
from engines.snapshots import ShardName, StoreSource, node_folder, sealed
from infra.errors import ConfigError, PeersUnreachable, StepError, StoreError, SystemFault
from infra.fault_injection import FaultSchedule
from infra.storage import FolderStore, open_store
from models.llama import LlamaConfig
from workflows.worker.failures import describe

MODEL = LlamaConfig(dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=16, vocab_size=16, context=8)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_chaos_an_entry_happens_once_in_all_processes_and_a_star_every_time(tmp_path: Path) -> None:
    text = "a:2=fault,b:*=nan"
    first, second = (FaultSchedule.parse(text, once=tmp_path / "taken") for _ in range(2))
    assert [first.take("a") for _ in range(3)] == [None, "fault", None]
    assert [second.take("a") for _ in range(3)] == [None, None, None]
    assert [schedule.take("b") for schedule in (first, second, first)] == ["nan"] * 3
    (note,) = (tmp_path / "taken").iterdir()
    assert note.name == "a:2" and json.loads(note.read_text())["pid"] == os.getpid()
    for wrong in ("a:1=delay-", "a:1=delay-x", "a:**=kill", "a:1=delay-SECONDS"):
        with pytest.raises(ConfigError, match="point:hit=action"):
            FaultSchedule.parse(wrong)
    with pytest.raises(ValueError, match="nothing is computed"):
        FaultSchedule.parse("a:1=spike").reach("a")


@pytest.mark.parametrize(("action", "beats"), [("spin", True), ("deadlock", True), ("lock", False)])
def test_chaos_hangs_are_real(action: str, beats: bool) -> None:
    """Another thread of the process goes on, unless the interpreter is locked."""
    program = (
        "import sys, threading, time\n"
        "from infra.fault_injection import perform\n"
        f"threading.Thread(target=perform, args=('{action}', 'x'), daemon=True).start()\n"
        "time.sleep(0.5)\n"
        "while True: print('beat', flush=True); time.sleep(0.05)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.extend(process.stdout or ()))
    reader.start()
    try:
        if beats:
            wait_for(lambda: len(heard) > 3, f"{action} stopped the other thread")
        else:
            time.sleep(3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        reader.join()
    assert bool(heard) == beats


def test_chaos_points_of_pretraining(tmp_path: Path) -> None:
    text = "pretrain.step-3.rank-1.compute:1=fault,pretrain.generation-2.rank-0.load:1=error"
    points = FaultPoints(f"{text},pretrain.window-5.loss:*=spike", tmp_path)

    def ask(module: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, float]]:
        return torch.tensor(2.0), {"loss": 2.0, "samples": 7.0}

    module = torch.nn.Module()
    loss, sums = points.in_loss(ask, rank=0, step=3, window=5)(module, {})
    assert float(loss) == 80.0 and sums == {"loss": 80.0, "samples": 7.0}
    assert points.in_loss(ask, rank=0, step=3, window=6)(module, {})[1]["loss"] == 2.0
    with pytest.raises(SystemFault):
        points.in_loss(ask, rank=1, step=3, window=4)(module, {})
    points.reach("load", 0, 1)
    with pytest.raises(RuntimeError):
        points.reach("load", 0, 2)
    assert FaultPoints("", tmp_path).in_loss(ask, 0, 0, 0) is ask


def test_chaos_a_seat_is_a_rank_of_any_group_however_small(tmp_path: Path) -> None:
    text = "pretrain.step-3.seat-3.data:1=fault,pretrain.step-4.seat-3.answer:1=flip"
    for world_size, rank in ((4, 3), (3, 0), (2, 1), (1, 0)):
        points = FaultPoints(text, tmp_path / str(world_size))
        points.sit(world_size)
        for other in set(range(world_size)) - {rank}:
            points.reach("data", other, 3)
        with pytest.raises(SystemFault):
            points.reach("data", rank, 3)
        points.reach("data", rank, 3)
        ask = next_token_loss(7)
        assert (points.in_answer(ask, rank, 1, 3), points.in_answer(ask, rank, 1, 4) is ask) == (ask, False)


def test_chaos_checksums_of_samples_add_up_over_any_parts() -> None:
    mixture = Mixture([Source("a", 50, 1.0), Source("b", 50, 1.0)], seed=3)
    batch = mixture.samples(90, 40)
    whole = batch.checksum()
    assert whole == batch[:13].checksum() + batch[13:13].checksum() + batch[13:].checksum() < 40 * 2**31
    assert float(whole) == whole
    others = [mixture.samples(start, 40).checksum() for start in (89, 91, 190)]  # neighbours, and a later epoch
    assert len({whole, *others}) == 4


class Down(FolderStore):
    """A store that answers nobody, and counts who asked."""

    asked = 0

    def list(self, prefix: str) -> Iterator[str]:
        Down.asked += 1
        raise StoreError("down")


def steps(elastic: ElasticLearner, count: int) -> None:
    ids = torch.arange(9).repeat(2, 1) % 16
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
    for _ in range(count):
        elastic.train_step([batch], next_token_loss(16))
    assert elastic.snapshots is not None
    elastic.snapshots.settle()


def test_chaos_recovery_asks_a_store_only_for_what_memory_has_lost(tmp_path: Path) -> None:
    shared, down, store = tmp_path / "shm", Down(tmp_path / "down"), FolderStore(tmp_path / "store")
    host, address = host_store()
    recipe = Recipe(MODEL, LearnerSettings(), SnapshotSettings(flush_every=2), fsdp=False)
    elastic = ElasticLearner(recipe, "run", Rendezvous(address), shared=shared, store=store)
    elastic.join(0, 0, 1, fresh=True)
    for _ in range(5):  # a flusher that is busy takes no other step, and on a slow disk it outlasts steps this small
        steps(elastic, 1)
        assert elastic.flusher is not None and elastic.flusher.wait(60)
    unreachable = StoreSource(down, "run", tmp_path / "a")
    joined = elastic.join(1, 0, 1, stores=[unreachable], at_most=5)
    assert joined.step == 5 and Down.asked == 0
    steps(elastic, 1)
    elastic.leave()
    for name in sealed(node_folder("run", shared)):
        (node_folder("run", shared) / str(name)).unlink()
    joined = elastic.join(2, 0, 1, stores=[unreachable, StoreSource(store, "run", tmp_path / "b")], at_most=6)
    assert joined.step == 4 and Down.asked == 1 and "down" in "".join(joined.refused)
    elastic.leave()
    del host


def test_chaos_moments_of_snapshots_are_between_nothing_and_whole(tmp_path: Path) -> None:
    """At "snapshot" the shard has no name yet; at "flush" it is in the store and does not count."""
    shared, store = tmp_path / "shm", FolderStore(tmp_path / "store")
    host, address = host_store()
    seen: list[tuple[str, int, bool]] = []

    def reach(moment: str, rank: int, number: int) -> None:
        whole = (node_folder("run", shared) / str(ShardName(0, number, 0, 1))).exists()
        if moment == "flush":
            whole = bool(list(store.list("snapshots/run/manifests")))
            assert any(key.endswith(".shard") for key in store.list("snapshots/run"))
        seen.append((moment, number, whole))

    recipe = Recipe(MODEL, LearnerSettings(), SnapshotSettings(flush_every=100), fsdp=False)
    elastic = ElasticLearner(recipe, "run", Rendezvous(address), shared=shared, store=store, reach=reach)
    elastic.join(0, 0, 1, fresh=True)
    steps(elastic, 2)
    assert elastic.flusher is not None and elastic.flusher.wait(60)
    elastic.leave()
    assert seen[0] == ("load", 0, False)
    assert [entry for entry in seen if entry[0] == "snapshot"] == [
        ("snapshot", 0, False),
        ("snapshot", 1, False),
        ("snapshot", 2, False),
    ]
    assert [entry for entry in seen if entry[0] == "flush"] == [("flush", 0, False)]
    del host


class Slow(FolderStore):
    """Answers when it is let."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.let = threading.Event()
        self.let.set()
        self.fails = False

    def list(self, prefix: str) -> Iterator[str]:
        assert self.let.wait(60)
        if self.fails:
            raise StoreError("failing")
        return super().list(prefix)


def test_chaos_a_controller_does_not_wait_for_a_slow_store(tmp_path: Path) -> None:
    store = Slow(tmp_path)
    task = PretrainTask("g", store, StoreAddress("127.0.0.1", 1), ElasticSettings(), False)
    store.put("snapshots/g/manifests/00001-0000000008", b"{}")
    assert task.stored() == {(1, 8)}
    store.put("snapshots/g/manifests/00002-0000000016", b"{}")
    store.let.clear()
    assert task.stored() == task.stored() == {(1, 8)}, "it would wait for the store"
    store.let.set()
    wait_for(lambda: task.stored() == {(1, 8), (2, 16)}, "what was stored is never seen")
    store.fails = True
    for _ in range(5):
        assert task.stored() == {(1, 8), (2, 16)}
        time.sleep(0.01)
    store.fails = False
    store.put("snapshots/g/manifests/00002-0000000024", b"{}")
    wait_for(lambda: (2, 24) in task.stored(), "a store that failed is never asked again")


class Nothing:
    """A task with nothing stored."""

    replicated = False

    def orders(self, *_: Any) -> dict[str, Any]:
        return {}

    def stored(self, fresh: bool = False) -> list[tuple[int, int]]:
        return [(1, 1)] if fresh else []


def leader(folder: Path, rows: Sequence[Mapping[str, Any]], heard: list[Any]) -> GroupController:
    """A controller of generation 1, which runs."""
    journal = GroupJournal(open_store(folder), "g")
    settings = ElasticSettings(nonfinite_patience=2)

    def event(event: dict[str, Any]) -> None:
        heard.append((event["event"], GroupJournal(open_store(folder), "g").history.rollbacks))

    made = GroupController(Fleet("g", WorkerKind(object)), Nothing(), settings, journal, Listener(event=event), rows)
    made.core.phase, made.core.generation, made.core.joins[1] = "running", 1, 0
    return made


def outcome(step: int, committed: bool = True) -> dict[str, Any]:
    return {"step": step, "loss": 3.0 if committed else math.nan, "committed": committed, "generation": 1}


def test_chaos_a_rollback_is_known_to_whoever_leads_next(tmp_path: Path) -> None:
    """Bad losses on both sides of a controller's death are one streak; what is decided holds for its successors."""
    heard: list[Any] = []
    first = leader(tmp_path, [], heard)
    rows = [outcome(0), outcome(1), outcome(2, committed=False)]
    for row in rows:
        first.row(dict(row))
    assert first.journal.history.rollbacks == 0
    second = leader(tmp_path, rows, heard)
    second.row(outcome(3, committed=False))
    assert ("rolled-back", 0) in heard, "whoever hears of it must have taken back its rows before it is journaled"
    history = GroupJournal(open_store(tmp_path), "g").history
    assert second.core.book.flushed == {1}, "storage may be all that is left of older states: it is asked before"
    assert (history.rollbacks, history.joins, history.skipped) == (1, {2: 2}, (DataWindow(2, 3),)), (
        "nobody has told of that snapshot, but ranks that agreed on step 2 hold the state before it"
    )
    journal = GroupJournal(open_store(tmp_path), "g")
    third = GroupController(Fleet("g", WorkerKind(object)), Nothing(), ElasticSettings(), journal, Listener())
    assert third.core.generation == 2 and not third.core._valid(1, 3), "what was undone counts again"


def test_chaos_a_rollback_that_falls_due_while_ranks_re_form_is_made_as_soon_as_they_run(tmp_path: Path) -> None:
    heard: list[Any] = []
    controller = leader(tmp_path, [], heard)
    core = controller.core
    core.phase, core.generation = "forming", 2
    for row in [outcome(0), outcome(1), outcome(2, committed=False), outcome(3, committed=False)]:
        controller.row(dict(row))
    assert controller.journal.history.rollbacks == 0 and controller.rows.next == 4
    core.phase = "running"
    core.joins[2] = 4
    controller._roll_back_now()
    history = GroupJournal(open_store(tmp_path), "g").history
    assert (history.rollbacks, history.skipped, history.joins[3]) == (1, (DataWindow(2, 3),), 1)
    assert controller.rows.next == 1 and [kind for kind, _ in heard].count("rolled-back") == 1
    controller._roll_back_now()
    assert controller.journal.history.rollbacks == 1


def test_chaos_undone_rows_are_taken_back_at_once(tmp_path: Path) -> None:
    metrics = StepLog(open_store(tmp_path))
    for step in range(5):
        metrics.write({"step": step})
    metrics.undo(3)
    assert [row["step"] for row in read_steps(open_store(tmp_path))] == [0, 1, 2]
    metrics.write({"step": 3})
    metrics.close()
    assert [row["step"] for row in read_steps(open_store(tmp_path))] == [0, 1, 2, 3]


def test_chaos_an_agent_that_was_replaced_is_asked_again_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its predecessor's replica server is gone: shards sent there would have no replica."""
    monkeypatch.setattr("actors.pretrain.task.ray.get", lambda reference, timeout: reference)

    class Agent:
        def __init__(self, port: int) -> None:
            self.port = port
            self.replica_server = self

        def remote(self) -> ReplicaPlace:
            return ReplicaPlace("127.0.0.1", self.port, "token")

    task = PretrainTask("g", FolderStore(Path("/nowhere")), StoreAddress("", 1), ElasticSettings(), False)
    fleet = Fleet("g", WorkerKind(object))
    fleet.agents = {"n0": Agent(1), "n1": Agent(2)}
    assert {node: place.port for node, place in task._replica_places(fleet, {"n0", "n1"}).items()} == {"n0": 1, "n1": 2}
    fleet.agents["n1"] = Agent(3)
    assert {node: place.port for node, place in task._replica_places(fleet, {"n0", "n1"}).items()} == {"n0": 1, "n1": 3}


def test_chaos_a_slow_last_flush_is_no_hang(tmp_path: Path) -> None:
    host, address = host_store()
    let, waited = threading.Event(), 0

    def reach(moment: str, rank: int, number: int) -> None:
        assert moment != "flush" or let.wait(60)

    def waiting() -> None:
        nonlocal waited
        waited += 1
        if waited == 2:
            let.set()

    recipe = Recipe(MODEL, LearnerSettings(), SnapshotSettings(flush_every=100), fsdp=False)
    store = FolderStore(tmp_path / "store")
    elastic = ElasticLearner(recipe, "run", Rendezvous(address), shared=tmp_path / "shm", store=store, reach=reach)
    elastic.join(0, 0, 1, fresh=True)
    steps(elastic, 2)
    elastic.flush_last(waiting)
    elastic.leave()
    assert waited >= 2
    assert [name.step for name in StoreSource(store, "run", tmp_path / "a").names()] == [0, 2]
    del host


def test_chaos_storage_is_looked_at_again_before_ranks_are_sent_there(tmp_path: Path) -> None:
    """Retention has removed what was known of; the newer snapshot that it made room for is taken, if it may be."""
    store, heard = Slow(tmp_path / "store"), list[Any]()
    task = PretrainTask("g", store, StoreAddress("127.0.0.1", 1), ElasticSettings(), False)
    store.put("snapshots/g/manifests/00001-0000000008", b"{}")
    controller = leader(tmp_path, [], heard)
    controller.task = task
    assert task.stored() == {(1, 8)}
    for step in (16, 24):
        store.put(f"snapshots/g/manifests/00001-{step:010d}", b"{}")
    store.delete("snapshots/g/manifests/00001-0000000008")
    assert controller._newest_stored(8) == 24
    controller.journal.note(joins={1: 0, 2: 23})
    controller.core.generation = 2
    controller._join(Join(2, (), Restore(8, "storage"), 0.0))
    assert controller.journal.history.joins[2] == 16, "a later recovery must count what these ranks were sent to"
    store.fails = True
    assert controller._newest_stored(8) == 16


def test_chaos_a_newer_state_than_asked_for_counts_as_it_is() -> None:
    core = StateMachine(ElasticSettings(max_workers=1, min_workers=1, start_timeout_s=1))
    (spawn,) = core.handle(Tick(), 0.0)
    assert isinstance(spawn, Spawn)
    core.handle(WorkersReady({spawn.workers[0]: "n0"}), 1.0)
    core.step = 8
    core.handle(Joined(1, spawn.workers, 16), 2.0)
    assert (core.phase, core.step, core.joins) == ("running", 16, {1: 16})


@pytest.mark.parametrize(("pulse_age", "seen"), [(math.inf, True), (1.0, False), (11.0, True)])
def test_chaos_a_rank_that_stands_still_in_a_recovery_is_seen(pulse_age: float, seen: bool, tmp_path: Path) -> None:
    """Stopped at once, locked after ten times the patience for one that trains (here 10 s); not only by the others'
    `join_timeout_s`."""
    heard: list[Any] = []
    controller = leader(tmp_path, [], heard)
    core = controller.core
    core.generation, core.phase, core.blocks = 2, "forming", (("w0",), ("w1",))
    for worker in ("w0", "w1"):
        core.roster.place(worker, "n0")
        core.roster.joined.add(worker)
    controller._join(Join(2, core.blocks, Restore(3, "memory"), time.monotonic() + 60))
    records = [Record(os.getpid(), state="joining", generation=2, rank=rank, world_size=2) for rank in (0, 1)]
    sights = (Sight("w0", True, records[0]), Sight("w1", True, records[1], pulse_age=pulse_age))
    controller.hearing._hear_beat(Beat("n0", 1, sights=sights), time.monotonic())
    assert ("detected" in [kind for kind, _ in heard]) == seen
    assert ("w1" in core.roster.node_of) != seen and core.phase == ("aborting" if seen else "forming")


def test_chaos_a_rank_that_hangs_on_its_way_into_a_generation_is_named(tmp_path: Path) -> None:
    """Not those that wait for it; and not one that only lacks a processor, however long."""
    heard: list[Any] = []
    controller = leader(tmp_path, [], [])
    controller.listener, controller.hearing.joining = (
        Listener(event=heard.append),
        JoinBoard(ElasticSettings(join_stall_s=10)),
    )
    core = controller.core
    core.generation, core.phase, core.blocks = 2, "forming", (("w0",), ("w1",), ("w2",))
    for worker in ("w0", "w1", "w2"):
        core.roster.place(worker, "n0")
        core.roster.joined.add(worker)
    controller._join(Join(2, core.blocks, Restore(3, "memory"), time.monotonic() + 60))

    def see(at: float, w1: float, starved_s: float = 0.0) -> None:
        """`at` seconds after rank 2 got to its meeting, and `w1` after rank 1 last read a piece."""
        common: dict[str, Any] = {"state": "joining", "generation": 2, "world_size": 3}
        records = [
            Record(os.getpid(), rank=0, phase="wait", ticks=6, entered_at=1.0, **common),
            Record(os.getpid(), rank=1, phase="load", ticks=5, entered_at=at - w1, **common),
            Record(os.getpid(), rank=2, phase="wait", ticks=6, entered_at=0.0, **common),
        ]
        ages = (at - 1.0, w1, at)
        starved = (0.0, starved_s, 0.0)
        sights = tuple(Sight(f"w{rank}", True, records[rank], ages[rank], starved_s=starved[rank]) for rank in range(3))
        controller.hearing._hear_beat(Beat("n0", 1, sights=sights), time.monotonic())
        controller.hearing.judge()

    for second in range(0, 60, 5):
        see(second, 0.0)  # a large shard, piece by piece
    for second in (1.0, 30.0):
        see(55.0 + second, second, starved_s=25.0)
    assert not heard and core.phase == "forming", heard
    see(100.0, 45.0, starved_s=25.0)
    (detected,) = [event for event in heard if event["event"] == "detected"]
    assert detected["workers"] == ["w1"] and "no progress" in detected["what"] and "load" in detected["what"]
    assert core.phase == "aborting" and core.roster.joined == {"w0", "w2"}


def test_chaos_a_large_state_may_take_its_time_to_load_while_it_comes(tmp_path: Path) -> None:
    """Beat after beat a little more of it, for five times `join_timeout_s`; then nothing does."""
    controller = leader(tmp_path, [], [])
    core = controller.core
    core.generation, core.phase, core.blocks, core._deadline = 2, "forming", (("w0",),), 1060.0
    core.roster.place("w0", "n0")
    core.roster.joined.add("w0")
    controller.hearing.joining.begin(2, 1)
    for at in range(1000, 1300, 20):
        record = Record(os.getpid(), state="joining", generation=2, world_size=1, phase="fetch", entered_at=float(at))
        moved = controller.hearing.joining.saw((Sight("w0", True, record),))
        assert moved and not controller.hearing.joining.saw((Sight("w0", True, record),))
        core.handle(JoinMoved(2), float(at))
        core.handle(Tick(), at + 19.0)
        assert core.phase == "forming", at
    core.handle(Tick(), 1341.0)
    assert core.phase == "aborting" and "none got on for 60 s (elastic.join_timeout_s)" in core.reason


def test_chaos_a_worker_that_fails_while_it_warms_up_ends_the_run_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time-out of the start would come minutes later, and would not say why."""
    controller = leader(tmp_path, [], [])
    monkeypatch.setattr(controller.fleet, "ask", lambda worker, method: StepError(f"{worker}: no such device"))
    controller.core.phase, controller.core.generation = "starting", 0
    controller.core.roster.ordered.add("w7")
    failed = Sight("w7", True, Record(os.getpid(), state="failed"))
    controller.fleet.node_of["w7"] = "n0"
    for at in (0.0, 0.5, 2.0):
        assert controller._error is None
        controller.hearing._hear_beat(Beat("n0", 1, sights=(failed,)), at)
    assert str(controller._error) == "w7: no such device"


def test_chaos_a_replacement_that_fails_while_it_warms_up_is_ordered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever trains trains on."""
    heard: list[Any] = []
    controller = leader(tmp_path, [], heard)
    core = controller.core
    core.blocks = (("w0",),)
    core.roster.place("w0", "n1")
    core.roster.joined.add("w0")
    monkeypatch.setattr(controller.fleet, "ask", lambda worker, method: StepError(f"{worker}: no such device"))
    core.roster.ordered.add("w7")
    controller.fleet.node_of["w7"] = "n0"
    failed = Sight("w7", True, Record(os.getpid(), state="failed"))
    for at in (0.0, 2.0, 4.0):
        controller.hearing._sights["w7"] = failed
        controller.hearing._settle(at)
    assert controller._error is None and core.phase == "running" and "w7" not in core.roster.ordered
    assert [kind for kind, _ in heard].count("detected") == 1


def test_chaos_a_rollback_that_an_earlier_controller_did_not_come_to_falls_due_again(tmp_path: Path) -> None:
    """It was killed between the outcomes and what followed from them; good steps came after."""
    rows = [outcome(step, committed=step not in (2, 3)) for step in range(6)]
    heard: list[Any] = []
    controller = leader(tmp_path, rows, heard)
    controller._roll_back_now()
    history = GroupJournal(open_store(tmp_path), "g").history
    assert (history.rollbacks, history.skipped, history.joins[2]) == (1, (DataWindow(2, 3),), 1)
    assert controller.rows.next == 1 and controller.judge.due is None
    again = leader(tmp_path, rows[:1], heard)
    again._roll_back_now()
    assert again.journal.history.rollbacks == 1


def test_chaos_a_hang_on_the_way_to_a_boundary_is_no_matter_of_the_boundary_s_time_out(tmp_path: Path) -> None:
    """Whoever has stopped there already is not to blame, whatever it did when it was last seen at work."""
    heard: list[Any] = []
    controller = leader(tmp_path, [], heard)
    core, now = controller.core, time.monotonic()
    core.phase, core.blocks = "stopping", (("w0",), ("w1",))
    core._deadline = now + 600
    for worker in ("w0", "w1"):
        core.roster.place(worker, "n0")
        core.roster.joined.add(worker)
        controller.fleet.node_of[worker] = "n0"
    controller.hearing.board.begin(1, now)
    for state in ("joined", "boundary"):
        first = Record(os.getpid(), state=state, generation=1, rank=0, world_size=2, step=3, phase="data", ticks=9)
        second = Record(os.getpid(), state="joined", generation=1, rank=1, world_size=2, step=3, phase="data", ticks=8)
        controller.hearing._hear_beat(Beat("n0", 1, sights=(Sight("w0", True, first), Sight("w1", True, second))), now)
    assert set(controller.hearing.board.ranks) == {1}
    controller.hearing.judge()
    assert "detected" not in [kind for kind, _ in heard]
    controller.hearing.board._moved_at = now - 500
    controller.hearing.judge()
    assert "detected" in [kind for kind, _ in heard]
    assert "w1" not in core.roster.node_of and "w0" in core.roster.node_of and core.phase == "forming"


def test_chaos_what_an_older_generation_flushed_counts_as_far_as_later_ones_went_on_from_it() -> None:
    core = StateMachine(ElasticSettings(), joins={1: 0, 2: 9})
    core.phase = "running"
    for step in (8, 16):
        core.handle(SnapshotFlushed(1, step), 0.0)
    assert core.book.flushed == {8}


def test_chaos_a_node_whose_agent_starts_again_is_not_silent() -> None:
    """Its ranks live on and nobody can say so: it must not count as lost, nor they as hung."""
    board = BeatBoard(ElasticSettings())
    board.begin(1, 0.0)
    for second in range(8):
        for node, rank in (("n0", 0), ("n1", 1)):
            at = float(second)
            board.beat(node, 1, [RankProgress(rank, second, "collective", second, at, at)], at)
    board.deafen("n1")
    for second in range(8, 40):
        board.beat("n0", 1, [RankProgress(0, 7, "collective", 7, 7.0, 1.0 * second)], 1.0 * second)
        assert board.silent_nodes(1.0 * second) == [] and board.judge(1.0 * second)[1] is None
    board.beat("n1", 1, [RankProgress(1, 7, "data", 7, 7.0, 40.0)], 40.0)
    assert board.judge(41.0)[1] is None
    assert set(board.silent_nodes(50.0)) == {"n0", "n1"}
    assert board.judge(50.0)[1] is not None, "judged again from when it was heard"
    board.deafen("n1")
    board.forget("n1")
    assert board.judge(90.0)[1] is not None, "a node that is gone is not waited for"


@pytest.mark.parametrize("error", [SystemExit(1), StepError("wrong")], ids=["ended", "failed"])
def test_chaos_ranks_outlive_a_controller_that_ray_takes_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """A driver dies, and Ray raises SystemExit in the processes of its steps; only an error ends the group."""
    controller, calls = leader(tmp_path, [], []), []

    def wait(*_: Any) -> list[Any]:
        raise error

    monkeypatch.setattr(controller.fleet, "open_agents", list)
    monkeypatch.setattr(controller.fleet, "wait", wait)
    monkeypatch.setattr(controller.fleet, "refuse_impossible", lambda count: None)
    monkeypatch.setattr("cluster.controller.fleet.end_workers", calls.append)
    with pytest.raises(type(error)):
        controller.run()
    assert calls == (["g"] if isinstance(error, StepError) else [])


def test_chaos_a_step_whose_process_ray_ends_is_lost_and_not_wrong() -> None:
    told = SystemExit(1)
    told.ray_terminate_msg = "The process receives a SIGTERM."  # type: ignore[attr-defined]
    record = describe(told)
    assert (record["kind"], record["type"]) == ("system", "NodeLost") and "SIGTERM" in record["message"]
    assert describe(SystemExit(1))["kind"] == "user"


def test_a_training_that_ended_with_fewer_ranks_than_asked_for_says_so_at_its_end() -> None:
    whole = {"generation": 1, "ranks": 2, "step": 0}
    shrunk = {"generation": 2, "ranks": 1, "step": 30, "reason": "node n1 lost"}
    assert fell_short([], 100, 2) is None and fell_short([whole], 100, 2) is None
    assert fell_short([whole, shrunk, {"generation": 3, "ranks": 2, "step": 90}], 100, 2) is None
    rolled_back = {"generation": 3, "ranks": 1, "step": 20, "reason": "node n1 lost"}
    assert fell_short([whole, shrunk, rolled_back], 100, 2)["short_steps"] == 80  # type: ignore[index]
    short = fell_short([whole, shrunk], 100, 2)
    assert short is not None and in_words(short) == (
        "it ended with 1 of the 2 ranks asked for (workers), and took 70 of its 100 steps with fewer than that: "
        "node n1 lost"
    )


def pair(folder: Path, heard: list[Any]) -> GroupController:
    """Two ranks on two nodes; `heard` is what was said."""
    controller = leader(folder, [], [])
    controller.listener = Listener(event=heard.append)
    core = controller.core
    core.blocks = (("w0",), ("w1",))
    for worker, node in (("w0", "n0"), ("w1", "n1")):
        core.roster.place(worker, node)
        core.roster.joined.add(worker)
        controller.fleet.node_of[worker] = node
    return controller


def test_a_lost_node_that_beats_again_is_taken_back_and_its_given_up_rank_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []
    killed: list[Any] = []
    controller = pair(tmp_path, heard)
    monkeypatch.setattr(controller.fleet, "kill", lambda workers, reason: killed.extend(workers) or [])
    controller.hearing._lose_node("n1", "no beat for 2.5 s")
    assert controller.core.phase in ("aborting", "forming") and "n1" in controller.fleet._lost
    controller.hearing.hear(AgentLost("n1", True, "its link is cut"))
    assert "n1" in controller.fleet._lost and "n1" not in controller.fleet.agents, "it did not come back yet"
    stray = Sight("w1", True, Record(os.getpid(), state="aborted", generation=1, rank=1, world_size=2))
    controller.hearing._hear_beat(Beat("n1", 5, sights=(stray,)), time.monotonic())
    assert killed == ["w1", "c0w0"], "and who was ordered while that node was to be avoided is ordered again"
    assert "n1" not in controller.fleet._lost
    assert "n1" not in controller.core._dead_nodes and not controller.core.roster.unfit
    assert any("n1 is back" in event.get("what", "") for event in heard)


def test_ranks_that_find_no_way_to_each_other_are_told_of_once_and_without_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []
    controller = pair(tmp_path, heard)
    core = controller.core
    core.phase = "forming"
    failure = PeersUnreachable([(0, 1), (1, 0)], ["10.0.0.1 to 10.0.0.2: no answer", "10.0.0.2 to 10.0.0.1: no answer"])
    monkeypatch.setattr(controller.fleet, "ask", lambda worker, method: failure)
    for at in (0.0, 1.0):
        for rank, node in enumerate(("n0", "n1")):
            record = Record(os.getpid(), state="aborted", generation=1, rank=rank, world_size=2, phase="apart")
            controller.hearing._hear_beat(Beat(node, 1, sights=(Sight(f"w{rank}", True, record),)), at)
    said = [event["what"] for event in heard if event["event"] == "detected"]
    assert len(said) == 1 and "10.0.0.1 to 10.0.0.2: no answer" in said[0] and "GLOO_SOCKET_IFNAME" in said[0]
    assert core.roster.aside.keys() == {"n1"} and not core.roster.unfit and not core._node_faults


def test_a_node_that_never_answers_is_named_with_both_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []
    controller = pair(tmp_path, heard)
    fleet = controller.fleet
    fleet.agents, fleet._numbers, fleet._opened = {"n0": None, "n1": None}, {"n0": 4, "n1": 0}, {"n0": 0.0, "n1": 0.0}
    monkeypatch.setattr("cluster.controller.fleet.time.monotonic", lambda: 100.0)
    monkeypatch.setattr(fleet, "address", lambda node: "10.0.0.2")
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.1")
    for _ in range(2):
        controller.hearing._name_unanswered()
    (said,) = [event["what"] for event in heard]
    assert said.startswith("node n1 at 10.0.0.2 has not answered the controller at 10.0.0.1 for 60 s. Nodes must reach")
