"""Beacons and the node watch, with real processes that are killed, stopped, locked and hung."""

import ctypes
import os
import platform
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.goodput.stopwatch import Stopwatch
from cluster.node.beacons import BeaconReader, BeaconWriter
from cluster.node.rank_watch import SHARD, Beat, RankWatch, Sight
from engines.snapshots import ShardName
from tests.helpers.forks import FORKS

DEADLINE = 60.0
SYS_EXIT = 93 if platform.machine() == "aarch64" else 60
"""The number of the system call that ends one thread."""


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path("/dev/shm") / f"recua-test-{uuid.uuid4().hex[:12]}"
    yield path
    shutil.rmtree(path, ignore_errors=True)


def rank(folder: Path, name: str, body: Callable[[BeaconWriter], None]) -> None:
    writer = BeaconWriter(folder / "beacons" / f"{name}.beacon")
    writer.set(state="joined", generation=1, world_size=2)
    body(writer)
    threading.Event().wait()


def stays(writer: BeaconWriter) -> None:
    watch = Stopwatch(memory=writer.account)
    watch.enter("compute")
    writer.enter("data")


def ends_slowly(writer: BeaconWriter) -> None:
    """Its first thread is no more, as in a process that was killed and whose memory is being taken back."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    threading.Thread(target=threading.Event().wait).start()
    writer.enter("data")
    signal.sigwait({signal.SIGUSR1})
    ctypes.CDLL(None).syscall(SYS_EXIT, 0)


def locks_the_interpreter(writer: BeaconWriter) -> None:
    time.sleep(0.3)
    ctypes.PyDLL(None).sleep(3600)  # keeps the GIL


def waits_for_what_never_comes(writer: BeaconWriter) -> None:
    writer.enter("data")
    threading.Event().wait()


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Any]]:
    processes = []

    def begin(name: str, body: Callable[[BeaconWriter], None]) -> Any:
        processes.append(FORKS.Process(target=rank, args=(folder, name, body)))
        processes[-1].start()
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.join()


def until(watch: RankWatch, seen: Callable[[dict[str, Sight]], bool]) -> tuple[Beat, dict[str, Sight]]:
    """The first beat after which `seen` holds."""
    number, deadline = 0, time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        beat = watch.wait(number, 0.5)
        number, sights = beat.number, {sight.worker: sight for sight in beat.sights}
        if seen(sights):
            return beat, sights
    raise AssertionError(f"not seen: {sights}")


def joined(*names: str) -> Callable[[dict[str, Sight]], bool]:
    return lambda sights: all(name in sights and sights[name].record.state == "joined" for name in names)


def test_elastic_death_is_seen_at_once_and_its_last_word_stays(folder: Path, start: Any, record_property: Any) -> None:
    watch = RankWatch("n0", folder)
    start("w0", stays)
    victim = start("w1", stays)
    until(watch, lambda sights: joined("w0", "w1")(sights) and sights["w1"].record.phase == "data")
    killed = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    _, sights = until(watch, lambda sights: not sights["w1"].alive)
    record_property("detection_s", time.monotonic() - killed)
    assert sights["w0"].alive and sights["w1"].record.generation == 1
    watch.discard(["w1"])
    _, sights = until(watch, lambda sights: "w1" not in sights)
    accounts = {one.worker: one for one in watch.account().ranks}
    assert accounts["w1"].gone and not accounts["w0"].gone
    lost = accounts["w1"].ledger.seconds
    assert lost["recomputed"] > 0 == lost["compute"], "the step under way when it died is computed again"
    watch.close(remove=True)
    assert not folder.exists()


def test_elastic_death_is_seen_before_the_kernel_is_done_with_the_process(folder: Path, start: Any) -> None:
    watch = RankWatch("n0", folder)
    start("w0", stays)
    victim = start("w1", ends_slowly)
    until(watch, lambda sights: joined("w0", "w1")(sights) and sights["w1"].record.phase == "data")
    os.kill(victim.pid, signal.SIGUSR1)
    _, sights = until(watch, lambda sights: not sights["w1"].alive)
    victim.join(0)
    assert victim.exitcode is None and sights["w0"].alive
    watch.close()


def test_elastic_stopped_process_is_told_from_a_living_one(folder: Path, start: Any) -> None:
    watch = RankWatch("n0", folder)
    start("w0", stays)
    victim = start("w1", stays)
    until(watch, joined("w0", "w1"))
    os.kill(victim.pid, signal.SIGSTOP)
    _, sights = until(watch, lambda sights: sights["w1"].pulse_age == float("inf"))
    assert sights["w1"].alive and sights["w0"].pulse_age < 30
    os.kill(victim.pid, signal.SIGCONT)
    until(watch, lambda sights: sights["w1"].pulse_age < 1)
    watch.close()


def test_elastic_pulse_of_a_locked_interpreter_stands_still(folder: Path, start: Any) -> None:
    watch = RankWatch("n0", folder)
    start("w0", locks_the_interpreter)
    _, sights = until(watch, lambda sights: "w0" in sights and sights["w0"].pulse_age > 1.0)
    assert sights["w0"].alive and sights["w0"].pulse_age != float("inf")
    watch.close()


def test_elastic_stacks_of_a_hung_rank_are_kept_before_it_is_killed(folder: Path, start: Any) -> None:
    watch = RankWatch("n0", folder)
    process = start("w0", waits_for_what_never_comes)
    until(watch, lambda sights: "w0" in sights and sights["w0"].record.phase == "data")
    stacks = watch.kill(["w0", "unknown"])
    assert list(stacks) == ["w0"]
    assert "waits_for_what_never_comes" in stacks["w0"] or "no Python stacks" in stacks["w0"], stacks
    until(watch, lambda sights: not sights["w0"].alive)
    process.join(DEADLINE)
    assert process.exitcode == -signal.SIGKILL
    assert watch.kill(["w0"]) == {}
    watch.close()


def test_elastic_agent_that_starts_later_finds_living_and_dead(folder: Path, start: Any) -> None:
    start("w0", stays)
    victim = start("w1", stays)
    first = RankWatch("n0", folder)
    until(first, joined("w0", "w1"))
    first.close()
    victim.kill()
    victim.join(DEADLINE)
    second = RankWatch("n0", folder)
    _, sights = until(second, lambda sights: len(sights) == 2)
    assert sights["w0"].alive and not sights["w1"].alive
    second.close()


def test_elastic_rows_come_in_order_without_gaps_and_of_the_present(folder: Path) -> None:
    writer = BeaconWriter(folder / "beacons" / "w0.beacon")
    for step in (3, 4, 5, 7):
        writer.say(step, {"step": step, "generation": 1 if step < 5 else 2})
    reader = BeaconReader(folder / "beacons" / "w0.beacon")
    assert [row["step"] for row in reader.rows(3, 0)] == [3, 4, 5]
    assert [row["step"] for row in reader.rows(4, 2)] == []
    assert [row["step"] for row in reader.rows(5, 2)] == [5]
    assert list(reader.rows(6, 0)) == []
    with pytest.raises(ValueError, match="at most"):
        writer.say(8, {"text": "x" * 1000})
    watch = RankWatch("n0", folder)
    beat = watch.wait(0, DEADLINE, first_row=4)
    assert [row["step"] for row in beat.rows] == [4, 5]
    watch.close()


def test_elastic_reader_never_sees_half_a_record(folder: Path) -> None:
    writer = BeaconWriter(folder / "beacons" / "w0.beacon")
    reader = BeaconReader(folder / "beacons" / "w0.beacon")
    ended = threading.Event()

    def write() -> None:
        for count in range(20000):
            writer.set(generation=count, step=count, ticks=count, rank=count)
        ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = set()
    while not ended.is_set():
        record = reader.read()
        assert record.generation == record.step == record.ticks == record.rank
        seen.add(record.step)
    thread.join()
    assert reader.read().step == 19999 and len(seen) > 1


def test_elastic_shards_are_named_as_the_snapshots_name_them(folder: Path) -> None:
    name = ShardName(3, 42, 1, 4)
    match = SHARD.fullmatch(str(name))
    assert match is not None and tuple(map(int, match.groups())) == (3, 42, 1, 4)
    folder.mkdir()
    (folder / str(name)).touch()
    (folder / f"{name}.writing").touch()
    watch = RankWatch("n0", folder)
    assert watch.shards() == [(3, 42, 1, 4)]
    watch.close()
