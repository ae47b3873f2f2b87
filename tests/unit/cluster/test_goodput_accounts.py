"""What `recua goodput` reads: records of groups and nodes, added up; what is missing has a name."""

import time
from pathlib import Path

import pytest

from cluster.config import ElasticSettings
from cluster.core import messages as m
from cluster.core.state_machine import StateMachine
from cluster.goodput.accounts import (
    GroupAccount,
    NodeAccount,
    NodeLife,
    Pause,
    RankAccount,
    account,
    read_run,
    write_group,
    write_node,
)
from cluster.goodput.buckets import Ledger
from cluster.goodput.group_account import GroupWatch
from infra.errors import DataError
from infra.storage import FolderStore
from workflows.cli import main

PAUSE = Pause(104.0, 106.0, 2, "shrink", "w1 died", "elastic.min_workers", 1, 1)


def rank(worker: str, until: float, gone: bool = False) -> RankAccount:
    lived = until - 100
    return RankAccount(worker, 100, until, Ledger(lived, {"init": 1, "compute": lived - 1}), gone)


def group(ended: bool = True, **lives: NodeLife) -> GroupAccount:
    return GroupAccount("pretrain", 100, 120, ended, ((100, 2), (110, 4)), lives, (PAUSE,))


def test_capacity_changes_and_a_dead_rank_add_up_by_hand() -> None:
    """2 ranks asked for over 10 s, then 4 over 10 s: 60 rank-seconds. One lives for 20 s, one for 5."""
    whole = group(n0=NodeLife(100, None, 2))
    report = account(whole, [NodeAccount("n0", (rank("w0", 120), rank("w1", 105, gone=True)))])
    assert report.goodput.capacity * report.goodput.wall_s == pytest.approx(60)
    assert report.goodput.goodput == pytest.approx((19 + 4) / 60)
    assert report.goodput.absent_s == pytest.approx(60 - 25) and report.goodput.ledger.unattributed_s == 0
    assert report.missing == ()


def test_what_nobody_wrote_down_is_unattributed_and_named() -> None:
    """n0 died 10 s after its last word; n1 never wrote; n9 is not in the controller's record."""
    lives = {"n0": NodeLife(100, 115, 1), "n1": NodeLife(110, None, 2)}
    report = account(group(**lives), [NodeAccount("n0", (rank("w0", 105),)), NodeAccount("n9", (rank("x", 101),))])
    assert report.goodput.ledger.unattributed_s == pytest.approx(10 + 2 * 10)
    first, second, third = report.missing
    assert "n0" in first and "10.0 rank-seconds" in first
    assert "n1: no account" in second and "20.0 rank-seconds" in second
    assert "n9" in third


def test_records_come_back_and_a_running_group_is_accounted_as_far_as_it_has_written(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    assert read_run(store, "r") == []
    write_node(store, "r", "pretrain", NodeAccount("n0", (rank("w0", 130),)))
    with pytest.raises(DataError, match=r"no group\.json"):
        read_run(store, "r")
    write_group(store, "r", group(ended=False, n0=NodeLife(100, None, 1)))
    (report,) = read_run(store, "r")
    assert report.goodput.wall_s == 30 and report.pauses == (PAUSE,)
    assert report.goodput.ledger.unattributed_s == 0 and "has not ended" in report.missing[0]
    store.put("runs/r/goodput/pretrain/group.json", b'{"format": 9}')
    with pytest.raises(DataError, match="format 9"):
        read_run(store, "r")
    store.put("runs/r/goodput/pretrain/group.json", b'{"form')
    with pytest.raises(DataError, match=r"group\.json: not a goodput record"):
        read_run(store, "r")


def test_the_watch_reads_pauses_and_lost_steps_off_the_controller() -> None:
    """A rank dies in step 9 when snapshot 8 is the newest: one step lost; the start is a pause of its own."""
    core = StateMachine(ElasticSettings(min_workers=1, max_workers=2))
    watch = GroupWatch("pretrain", core, 0.0)
    pauses = []

    def tell(event: m.Event, now: float) -> None:
        pause = watch.saw(event, core.handle(event, now), now)
        if pause is not None:
            pauses.append(pause)

    tell(m.Tick(), 0)
    tell(m.WorkersReady({"w0": "n0", "w1": "n1"}), 5)
    tell(m.Joined(1, ("w0", "w1")), 7)
    tell(m.SnapshotHeld(1, 8, 2, {"n0": (0, 1)}), 20)
    tell(m.Progress(1, 9, 1.0), 21)
    tell(m.NodesLost(("n1",), "n1 died"), 22)
    tell(m.AbortAcked(1, ("w0",)), 22.5)
    tell(m.Joined(2, ("w0",)), 23)
    start, lost = pauses
    assert (start.began, start.ended, start.ranks, start.lost_steps) == (0, 7, 2, 0)
    assert (lost.began, lost.ended, lost.ranks, lost.lost_steps) == (22, 23, 1, 1)
    assert lost.action == "shrink" and "n1 died" in lost.reason and lost.key == "elastic.min_workers"
    told = watch.account(30)
    assert told.nodes == {"n0": NodeLife(5, None, 1), "n1": NodeLife(5, 22, 1)} and not told.ended
    again = GroupWatch("pretrain", StateMachine(ElasticSettings(max_workers=2), adopting=True), 40.0, told)
    assert again.account(41).pauses == told.pauses and again.account(41).started == 0
    assert again.account(41).nodes["n0"].lost == 30, "as long as nobody has heard of it"
    again.saw(m.Inventory([m.Found("w0", "n0", "joined")]), [], 42.0)
    assert again.account(43).nodes["n0"].lost is None and again.account(43).nodes["n1"].lost == 22


def test_a_group_that_ended_and_goes_on_later_asked_for_nothing_in_between() -> None:
    """2 ranks from 100 to 110 and 4 to 120, as it ended; 2 again from 1000 on, of which one lives to 1010."""
    core = StateMachine(ElasticSettings(min_workers=1, max_workers=2))
    watch = GroupWatch("pretrain", core, 1000.0, group(n0=NodeLife(100, None, 2)))
    report = account(watch.account(1010.0), [NodeAccount("n0", (rank("w0", 120, gone=True), rank("w1", 1010)))])
    assert report.goodput.capacity * report.goodput.wall_s == pytest.approx(2 * 10 + 4 * 10 + 2 * 10)


def test_ranks_are_counted_once_and_none_is_forgotten() -> None:
    """Node n1 took over what n0 left in the machine's memory; of n2's two ranks one was never written down."""
    lives = {"n0": NodeLife(100, 110, 1), "n1": NodeLife(111, None, 1), "n2": NodeLife(105, 115, 2)}
    nodes = [
        NodeAccount("n0", (rank("w0", 109),)),
        NodeAccount("n1", (rank("w0", 108, gone=True), rank("w1", 120))),
        NodeAccount("n2", (rank("w2", 115, gone=True),)),
    ]
    report = account(group(**lives), nodes)
    assert report.lives == 3 and report.goodput.ledger.lived_s == pytest.approx(10 + 20 + 15 + 10)
    assert report.goodput.ledger.unattributed_s == pytest.approx(1 + 10)
    assert [text for text in report.missing if "n2: no account of 1; 10.0 rank-seconds" in text], report.missing


def test_the_command_prints_shares_pauses_and_gaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = FolderStore(tmp_path)
    store.put("runs/r1/run.json", b'{"workflow": "w", "recipe": {}, "created": 1}')
    options = ["--store", str(tmp_path)]
    with pytest.raises(SystemExit) as refused:
        main.main(["goodput", "r1", *options])
    assert refused.value.code == 2
    assert "no elastic group" in capsys.readouterr().err
    write_node(store, "r1", "pretrain", NodeAccount("n0", (rank("w0", 120),)))
    write_group(store, "r1", group(n0=NodeLife(100, None, 1), n1=NodeLife(100, None, 1)))
    with pytest.raises(SystemExit) as done:
        main.main(["goodput", "r1", *options])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("pretrain: goodput 0.3167 of 3 ranks over 20.0 s\n")
    assert "unattributed" in text and "missing: n1: no account; 20.0 rank-seconds are unattributed" in text
    clock = time.strftime("%H:%M:%S", time.localtime(104))
    assert f"{clock}  2.00 s  1 step lost  shrink: w1 died (elastic.min_workers)" in text
    with pytest.raises(SystemExit):
        main.main(["goodput", "r1", "--json", *options])
    assert '"goodput": 0.316667' in capsys.readouterr().out
