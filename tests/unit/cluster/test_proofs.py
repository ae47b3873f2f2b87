"""Proofs of verified steps: who must agree with whom, which snapshots stay, what the guard makes of a disagreement."""

from pathlib import Path

import pytest
import torch

from cluster.config import ElasticSettings
from cluster.core import messages as m
from cluster.core.history import GroupJournal
from cluster.guard.guard import Finding, Guard
from cluster.guard.proofs import Proof, groups
from cluster.node.beacons import BeaconReader, BeaconWriter, Record
from cluster.node.rank_watch import Beat, Sight
from cluster.policies.corruption import is_due
from cluster.policies.rollback import SavedState
from cluster.policies.snapshot import SnapshotBook, choose
from engines.snapshots import Milestones, Piece, ShardName, Snapshots, forget, sealed
from infra.storage import open_store
from tests.helpers.guarded_group import running


def proofs(generation: int, step: int, states: list[dict[str, str]], replays: list[str]) -> dict[int, Proof]:
    both = zip(states, replays, strict=True)
    return {rank: Proof(generation, step, state, replay, "cpu") for rank, (state, replay) in enumerate(both)}


def test_guard_replicas_shards_and_replays_are_compared_with_their_like() -> None:
    """Two replicas of two shards each, blocks of one rank: shards agree across replicas, replays among all."""
    told = proofs(1, 8, [{"shard=0": "x"}, {"shard=1": "y"}, {"shard=0": "x"}, {"shard=1": "z"}], ["r", "r", "r", "q"])
    assert sorted(map(str, groups(told, 1))) == sorted(
        map(str, [{0: "x", 2: "x"}, {1: "y", 3: "z"}, {0: "r", 1: "r", 2: "r", 3: "q"}])
    )
    blocks = [sorted(digests) for digests in groups(told, 2)]
    assert [0, 2] in blocks and [1, 3] in blocks, "in blocks of two, replays agree at the same place of each"


def test_guard_other_processors_are_not_compared() -> None:
    told = {0: Proof(1, 8, {"": "x"}, "r", "old cpu"), 1: Proof(1, 8, {"": "y"}, "s", "new cpu")}
    assert list(groups(told, 1)) == []


@pytest.mark.parametrize("every, apart", [(1, 50), (4, 10), (7, 50), (20, 6), (3, 3)])
def test_guard_engines_keep_the_snapshots_that_policies_verify(every: int, apart: int) -> None:
    settings = ElasticSettings(snapshot_every=every, verify_every=apart)
    milestones = Milestones(every, apart)
    steps = range(0, 400)
    due = [step for step in steps if milestones.has(step)]
    assert due == [step for step in steps if is_due(step, settings)] and len(due) >= 7
    assert milestones.kept(steps) == set(due[-2:])
    milestones.verified = due[2]
    assert milestones.kept(steps) == {due[2], *due[-2:]}


def test_guard_milestones_outlive_recycling_and_the_next_generation(tmp_path: Path) -> None:
    milestones = Milestones(1, 10)
    pieces = [Piece.whole("w", torch.zeros(8))]

    def take(generation: int, steps: range) -> None:
        snapshots = Snapshots(tmp_path, "run", generation, 0, 1, milestones=milestones)
        for step in steps:
            pieces[0].tensor.fill_(step)
            snapshots.take(step, pieces, {})
            snapshots.settle()
        assert set(snapshots.digests) == set(steps[-4:]) and len(set(map(str, snapshots.digests.values()))) == 4
        snapshots.close()

    take(1, range(1, 36))
    assert {20, 30, 34, 35} <= {name.step for name in sealed(tmp_path)} <= {20, 30, 33, 34, 35}
    take(2, range(26, 31))  # it went back to 25
    forget(tmp_path, before=2, milestones=milestones, until=25)
    assert [str(name) for name in sealed(tmp_path) if name.generation == 1] == [str(ShardName(1, 20, 0, 1))]
    take(3, range(31, 42))
    forget(tmp_path, before=3, milestones=milestones, until=30)
    assert [(name.generation, name.step) for name in sealed(tmp_path) if name.generation < 3] == [(2, 30)]


def test_guard_the_book_knows_the_snapshots_that_stay() -> None:
    book = SnapshotBook(lambda step: step % 10 == 0)
    for step in range(1, 36):
        book.held(step, 1, 1, {"a": [0]})
    assert set(book.snapshots) == {20, 30, 34, 35}
    restore, _ = choose(book, 29)
    assert restore is not None and (restore.step, restore.source) == (20, "memory")
    book.verified = 20
    for step in range(36, 66):
        book.held(step, 1, 1, {"a": [0]})
    assert set(book.snapshots) == {20, 50, 60, 64, 65}, "what is verified stays until something newer is"


def test_guard_notes_in_a_beacon_are_the_newest_of_their_name(tmp_path: Path) -> None:
    writer = BeaconWriter(tmp_path / "w0.beacon")
    reader = BeaconReader(tmp_path / "w0.beacon")
    assert reader.notes() == {}
    writer.note("proof-0", {"step": 10})
    writer.note("proof-1", {"step": 20})
    assert reader.notes() == {"proof-0": {"step": 10}, "proof-1": {"step": 20}}
    writer.note("proof-0", {"step": 30})
    assert reader.notes()["proof-0"] == {"step": 30}
    with pytest.raises(ValueError, match="bytes"):
        writer.note("proof-0", {"step": "x" * 2000})
    writer.close()


@pytest.mark.parametrize("again, named", [(["x", "x"], ["w1"]), (["q", "q"], [])], ids=["told", "spread"])
def test_guard_two_that_disagree_go_back_without_a_name_and_the_step_computed_again_tells(
    again: list[str], named: list[str], tmp_path: Path
) -> None:
    """Also to a controller that comes later. Where neither had been right, what one got wrong had reached the other."""
    settings = ElasticSettings(max_workers=2, min_workers=1, verify_every=10)
    core = running(settings, ["a", "b", "c"])
    saved = [SavedState(0), SavedState(10), SavedState(19, verified=False)]

    def hear(guard: Guard, generation: int, step: int, digests: list[str]) -> list[Finding]:
        found = []
        for rank, digest in enumerate(digests):
            note = Proof(generation, step, {"": digest}, "r", "cpu").to_note()
            record = Record(pid=1, generation=generation, rank=rank, world_size=2, state="joined", step=step)
            sight = Sight(f"w{rank}", True, record, notes={"proof-0": note})
            found += list(guard.saw(Beat("ab"[rank], 1, (sight,)), 100.0 + step))
        return found

    guard = Guard(settings, core, GroupJournal(open_store(tmp_path), "x"), lambda: saved)
    guard.begin(100.0)
    core.handle(m.SnapshotFlushed(1, 10), 150)
    (bad,) = hear(guard, 1, 20, ["x", "z"])
    assert bad.guilty == () and bad.back is not None and bad.back.to_step == 10
    assert "ranks 0, 1 disagree, and none has a majority" in str(bad.said) and "some rank" in str(bad.said)
    assert "nobody is named" in bad.back.decision.reason and bad.back.decision.key == "elastic.verify_every"
    (abort,) = [one for one in core.handle(m.RollBack(1, 10, bad.back.decision), 200) if not isinstance(one, m.Report)]
    assert isinstance(abort, m.Abort) and abort.workers == {"w0", "w1"}, "nobody is killed"
    (join,) = [one for one in core.handle(m.AbortAcked(1, ["w0", "w1"]), 201) if isinstance(one, m.Join)]
    assert join.restore.step == 10 and join.ranks() == {"w0": 0, "w1": 1}
    core.handle(m.Joined(2, ["w0", "w1"]), 202)
    journal = GroupJournal(open_store(tmp_path), "x")
    later = Guard(settings, core, journal, lambda: saved)
    later.begin(202.0)
    (good,) = hear(later, 2, 20, again)
    assert good.said[0][0] == "verified" and good.back is None and journal.history.verified == 20
    assert journal.history.corruptions[0]["workers"] == named and "said" not in journal.history.corruptions[0]
    assert isinstance(good.event, m.Evict) == bool(named)
    if good.event is not None:
        assert good.said[1][1]["workers"] == named
        core.handle(good.event, 203)
        assert "b" in core.roster.unfit and "w1" in core.roster.leaving


def test_guard_a_wrong_rank_sends_training_back_to_what_was_verified(tmp_path: Path) -> None:
    settings = ElasticSettings(max_workers=3, min_workers=2, verify_every=10)
    core = running(settings, ["a", "b", "c"])
    journal = GroupJournal(open_store(tmp_path), "x")
    saved = [SavedState(0), SavedState(10), SavedState(20), SavedState(29)]

    def states() -> list[SavedState]:
        return [SavedState(one.step, one.step <= journal.history.verified) for one in saved]

    guard = Guard(settings, core, journal, states)
    guard.begin(100.0)

    def hear(step: int, digests: list[str]) -> list:
        found = []
        for rank, digest in enumerate(digests):
            note = Proof(1, step, {"": digest}, "r", "cpu").to_note()
            record = Record(pid=1, generation=1, rank=rank, world_size=3, state="joined", step=step)
            sight = Sight(f"w{rank}", True, record, notes={"proof-0": note})
            found += list(guard.saw(Beat("abc"[rank], 1, (sight,)), 100.0 + step))
        return found

    (good,) = hear(10, ["x", "x", "x"])
    assert good.said[0][0] == "verified" and journal.history.verified == 10
    (bad,) = hear(20, ["x", "z", "x"])
    assert bad.guilty == ("w1",) and bad.back is not None and bad.back.to_step == 10
    kind, facts = bad.said[0]
    assert kind == "detected" and facts["after_s"] == 10.0 and "w1 (rank 1)" in facts["what"]
    again = GroupJournal(open_store(tmp_path), "x").history
    assert again.verified == 10 and again.corruptions == (
        {"step": 20, "to_step": 10, "workers": ["w1"], "nodes": ["b"]},
    )
    core.handle(m.RollBack(1, 10, bad.back.decision, bad.guilty), 200)
    assert "b" in core.roster.unfit and hear(30, ["x", "x", "x"]) == [], "nothing is judged while training stands still"
