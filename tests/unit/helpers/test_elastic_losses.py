"""The elastic campaign's judgement of lost steps, and what its summary counts."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.campaign_results import since
from tests.chaos.elastic_losses import Life, Stored, Taken, copies_gone, losses

ON_THREE = {0: "n0", 1: "n1", 2: "n2"}


def life(start: int, reached: int, joined_at: float, advanced_at: float, nodes: dict[int, str] | None = None) -> Life:
    nodes = nodes or ON_THREE
    return Life(nodes, len(nodes), start, reached, joined_at, advanced_at)


def test_chaos_one_lost_copy_excuses_no_lost_step() -> None:
    """Shards of n0 lie on n1 too, those of n1 on n2."""
    lives = {1: life(0, 20, 0.0, 10.0), 2: life(17, 30, 12.0, 20.0)}
    for taken in ([], [Taken("node", 11.0, "n0")], [Taken("node", 11.0, "n1"), Taken("drain", 13.0, "n2")]):
        assert losses(lives, taken, [], False) == ["generation 2 went back from step 20 to 17"]
    assert losses({1: lives[1], 2: life(19, 30, 12.0, 20.0)}, [], [], False) == []


def test_chaos_two_lost_copies_of_one_shard_excuse_it_as_far_as_storage_reaches_back() -> None:
    others = {0: "n2", 1: "n3", 2: "n4"}
    lives = {1: life(0, 20, 0.0, 10.0), 2: life(17, 30, 12.0, 20.0, others), 3: life(28, 60, 25.0, 40.0, others)}
    both = [Taken("node", 11.0, "n0"), Taken("raylet", 11.5, "n1")]
    assert copies_gone(lives, both, 2, False) == "node and raylet"
    assert losses(lives, both, [], False) == ["generation 3 went back from step 30 to 28"], "that is another one"
    stored = [Stored(1, 8, 4.0), Stored(1, 16, 8.0)]
    assert losses({1: lives[1], 2: lives[2]}, both, [], False, stored) == []
    assert losses({1: lives[1], 2: lives[2]}, both, [], False, [*stored, Stored(1, 18, 9.0)]) == [
        "generation 2 went back from step 20 to 17 (node and raylet; storage had 18)"
    ]
    assert losses({1: lives[1], 2: lives[2]}, both, [], False, [*stored, Stored(1, 18, 10.5)]) == [], "it came too late"
    again = {1: lives[1], 2: replace(lives[2], start=19), 3: life(16, 60, 25.0, 40.0, others)}
    twice = [*both, Taken("wipe", 22.0, until=22.1)]
    assert losses(again, twice, [], False, stored) == []
    discarded = [*stored, Stored(1, 20, 9.5)]
    assert losses(again, twice, [], False, discarded) == [], "of a discarded future: generation 2 began before it"
    assert losses({1: lives[1], 2: lives[2]}, both, [], True), "every rank had the whole state: n2 still has it"
    everywhere = [*both, Taken("sigterm", 11.9, "n2")]
    assert losses({1: lives[1], 2: lives[2]}, everywhere, [], True) == []


def test_chaos_an_agent_or_a_flipped_bit_takes_a_copy_for_a_while_only() -> None:
    lives = {1: life(0, 20, 0.0, 10.0), 2: life(17, 30, 12.0, 20.0)}
    node = Taken("node", 11.0, "n0")
    for other in (Taken("agent", 5.0, "n1", until=9.5), Taken("flip", 10.5, "n1", (1, 0), until=10.5)):
        assert losses(lives, [node, other], [], False) == []
        assert losses(lives, [node, replace(other, at=1.0, until=8.0)], [], False), "there was a newer copy"
    assert losses(lives, [node, Taken("flip", 10.5, "n1", (1, 1), until=10.5)], [], False), "of another shard"
    assert losses(lives, [Taken("wipe", 10.5, until=10.6)], [], False) == []


def test_chaos_what_a_lost_generation_did_not_commit_is_read_from_the_one_before() -> None:
    lives = {1: life(0, 20, 0.0, 10.0), 2: life(20, 20, 12.0, 12.0), 3: life(16, 60, 15.0, 40.0)}
    assert losses(lives, [Taken("node", 11.0, "n0"), Taken("node", 13.0, "n1")], [], False) == []
    lives[2] = life(19, 19, 12.0, 12.0)
    lives[3] = life(18, 60, 15.0, 40.0)
    assert losses(lives, [], [], False) == ["generation 3 went back from step 20 to 18"], "two recoveries, two steps"


def test_chaos_a_rollback_excuses_itself_once() -> None:
    lives = {1: life(0, 25, 0.0, 10.0), 2: life(23, 40, 12.0, 20.0), 3: life(23, 60, 25.0, 40.0)}
    assert losses(lives, [], [23], False) == ["generation 3 went back from step 40 to 23"]
    assert losses(lives, [], [23, 23], False) == []


def test_chaos_a_rollback_whose_state_is_lost_meanwhile_ends_before_it() -> None:
    """What storage has after the step that training was sent back to is no help; and it excuses nothing else."""
    others = {0: "n3", 1: "n4", 2: "n5"}
    lives = {1: life(0, 28, 0.0, 10.0), 2: life(16, 40, 15.0, 20.0, others), 3: life(24, 60, 25.0, 40.0, others)}
    gone = [Taken("node", 11.0, "n0"), Taken("node", 12.0, "n1")]
    stored = [Stored(1, 16, 5.0), Stored(1, 24, 9.0)]
    back = "generation 2 went back from step 28 to 16 (node; storage had 24)"
    assert losses({1: lives[1], 2: lives[2]}, gone, [23], False, stored) == []
    assert losses({1: lives[1], 2: lives[2]}, gone, [], False, stored) == [back]
    assert losses(lives, gone, [23], False, stored) == ["generation 3 went back from step 40 to 24"]


def test_chaos_runs_are_told_apart_by_time_and_by_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    commits = []
    for text in ("older", "newer"):
        git("-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", text)
        commits.append(git("rev-parse", "--short", "HEAD"))
    older, newer = commits
    lines = [{"commit": older, "time": 0}, {"commit": "0000000", "time": 1}, {"commit": f"{newer}+", "time": 2e9}]
    assert since(lines, newer) == since(lines, "2030-01-01") == lines[2:]
    assert since(lines, older) == [lines[0], lines[2]]
