"""The ledger: every second once, nothing left over, shrunk groups count as loss."""

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.goodput.buckets import BUCKETS, Goodput, Ledger, merge
from cluster.goodput.stopwatch import MEMORY_BYTES, Stopwatch, read_account
from infra.errors import DataError


class Clock:
    """Time that tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield Clock()


def test_a_step_by_hand(clock: Clock) -> None:
    """1 s unattributed, 2 init, 3 compute, 1 data wait, 4 of a lost step, 5 re-forming, 3 recomputed, 2 idle."""
    stopwatch = Stopwatch(clock)
    clock.now += 1
    stopwatch.enter("init")
    clock.now += 2
    stopwatch.begin_step()
    clock.now += 3
    stopwatch.end_step()
    stopwatch.enter("data_wait")
    clock.now += 1
    stopwatch.begin_step()
    clock.now += 4
    stopwatch.step_lost()
    stopwatch.fault_known(began=111, heard=111)
    clock.now += 5
    stopwatch.begin_step(recomputing=True)
    clock.now += 3
    stopwatch.enter("idle")
    clock.now += 2
    ledger = stopwatch.ledger()
    assert ledger.lived_s == 21 and ledger.unattributed_s == 1
    wanted = {"init": 2, "compute": 3, "data_wait": 1, "recomputed": 4 + 3, "re_forming": 5, "idle": 2}
    assert {name: value for name, value in ledger.seconds.items() if value} == wanted


def test_a_killed_rank_s_account_is_read_by_another_and_its_last_step_does_not_count(clock: Clock) -> None:
    memory = bytearray(MEMORY_BYTES)
    assert read_account(memory, 0.0) == Ledger(0.0)
    stopwatch = Stopwatch(clock, memory=memory)
    stopwatch.begin_step()
    clock.now += 5
    stopwatch.begin_step()
    clock.now += 2
    stopwatch.begin_step()
    torn = bytearray(memory)
    torn[:8] = (int.from_bytes(memory[:8], "little") - 1).to_bytes(8, "little")  # killed before the number was written
    for bytes_ in (memory, torn):
        dead = read_account(bytes_, clock.now + 1, died=True)
        assert dead.lived_s == 8 and dead.unattributed_s == 0
    assert (dead.seconds["compute"], dead.seconds["recomputed"]) == (5, 3)
    alive = read_account(memory, clock.now + 1)
    assert alive.seconds["compute"] == 8


def test_the_time_until_a_fault_was_known_is_detection_not_recomputing(clock: Clock) -> None:
    """Broken off after 5 s, known 2 s later, handled 1 s after that."""
    stopwatch = Stopwatch(clock)
    stopwatch.begin_step()
    clock.now += 5
    stopwatch.step_lost()
    clock.now += 3
    stopwatch.fault_known(began=104, heard=107)
    clock.now += 1
    seconds = stopwatch.ledger().seconds
    assert {name: value for name, value in seconds.items() if value} == {
        "recomputed": 5,
        "detection": 2,
        "re_forming": 1 + 1,
    }


def test_an_unknown_bucket_is_refused(clock: Clock) -> None:
    with pytest.raises(ValueError, match="coffee"):
        Stopwatch(clock).enter("coffee")


def test_time_before_the_stopwatch_counts_too(clock: Clock) -> None:
    ledger = Stopwatch(clock, born=90.0).ledger()
    assert (ledger.seconds["init"], ledger.unattributed_s) == (10, 0)


def test_exposed_communication_is_moved_never_invented(clock: Clock) -> None:
    stopwatch = Stopwatch(clock)
    stopwatch.begin_step()
    clock.now += 5
    stopwatch.enter("idle")
    stopwatch.reattribute("compute", "exposed_communication", 2)
    stopwatch.reattribute("compute", "pipeline_bubble", 99)
    ledger = stopwatch.ledger()
    assert (ledger.seconds["exposed_communication"], ledger.seconds["pipeline_bubble"]) == (2, 3)
    assert ledger.unattributed_s == 0


@given(st.lists(st.tuples(st.sampled_from([*BUCKETS, "leave"]), st.floats(0, 100)), max_size=30))
def test_buckets_and_unattributed_make_the_life(moves: list[tuple[str, float]]) -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock)
    unclaimed, inside = 0.0, False
    for bucket, seconds in moves:
        if bucket == "leave":
            stopwatch.leave()
        else:
            stopwatch.enter(bucket)
        inside = bucket != "leave"
        clock.now += seconds
        unclaimed += 0 if inside else seconds
    ledger = stopwatch.ledger()
    assert ledger.unattributed_s == pytest.approx(unclaimed, abs=1e-6)
    assert min(ledger.seconds.values()) >= 0


def test_capacity_that_was_not_there_is_loss() -> None:
    """4 ranks asked for, 10 s; one died after 4 s: 3 x 9 + 3 s of computing in 40 rank-seconds."""
    whole, dead = Ledger(10, {"compute": 9, "init": 1}), Ledger(4, {"compute": 3, "init": 1})
    account = Goodput(merge([whole, whole, whole, dead]), 4, 10)
    assert account.goodput == pytest.approx(30 / 40)
    assert account.absent_s == 6
    shares = account.to_json()["shares"]
    assert sum(shares.values()) == pytest.approx(1) and shares["absent"] == 0.15
    assert "absent" in account.to_text() and account.to_text().startswith("goodput 0.7500 of 4 ranks over 10.0 s")


def test_json_comes_back_and_bad_json_is_named() -> None:
    ledger = Ledger(10, {"compute": 9.5})
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))).seconds["compute"] == 9.5
    for bad in ({"format": 9}, {"format": 1, "lived_s": 1}, {"format": 1, "lived_s": 1, "seconds": {"coffee": 1}}):
        with pytest.raises(DataError, match="goodput ledger"):
            Ledger.from_json(bad)
    with pytest.raises(ValueError, match="coffee"):
        Ledger(1, {"coffee": 1})
