"""Silent corruption: finds ranks that compute wrongly, by comparing ranks that must agree, and by replay.

1. Ranks that hold the same shard of the state after step k must hold the same bits: their digests are compared.
2. Ranks that share nothing are checked by replay: all of them compute a sampled micro-batch of one of theirs.
If two disagree, a third one that computes the same decides; the minority is guilty. Without a majority no rank is
named, all go back to the last verified state, and the same step is computed again: a rank whose first result equals
the second one of all was right (`in_hindsight`). `cluster.policies.rollback.after_corruption` decides the rollback, the
controller takes out the guilty node (`RollBack.guilty`).
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.config import ElasticSettings
from cluster.policies.decision import Decision, key


@dataclass(frozen=True)
class Verdict:
    """`decision.action`: go-on, arbitrate (another rank's replay must decide between the `undecided`) or roll-back.

    Example: digests {0: "a", 4: "b", 8: "a"} of one shard: roll-back, guilty (4,).
    """

    decision: Decision
    guilty: tuple[int, ...] = ()
    undecided: tuple[int, ...] = ()


def is_due(step: int, settings: ElasticSettings) -> bool:
    """Whether the state after `step` steps is verified: the first snapshot at or after every multiple."""
    every = settings.snapshot_every
    return step > 0 and step % every == 0 and step % settings.verify_every < every


def replica_to_check(step: int, replicas: int) -> int | None:
    """The replica whose micro-batch all replicas compute again at `step`: the same on every rank without communication,
    and each replica in turn. None: there is no other replica to compare with."""
    return random.Random(f"replay 0 {step}").randrange(replicas) if replicas > 1 else None


def judge_digests(step: int, groups: Sequence[Mapping[int, str]]) -> Verdict:
    """One mapping {rank: digest} per set of ranks that must agree (holders of a shard, or a replay and its origin)."""
    guilty: list[int] = []
    undecided: list[int] = []
    for digests in groups:
        counts = Counter(digests.values()).most_common()
        if len(counts) < 2:
            continue
        if counts[0][1] > counts[1][1]:
            guilty += [rank for rank, digest in digests.items() if digest != counts[0][0]]
        else:
            undecided += digests
    name = key("verify_every")
    guilty, undecided = sorted(set(guilty)), sorted(set(undecided))
    if guilty:
        who = f"ranks {_list(guilty)} differ" if len(guilty) > 1 else f"rank {guilty[0]} differs"
        text = f"step {step}: {who} from those that must agree"
        return Verdict(Decision("roll-back", text, name), tuple(guilty), tuple(undecided))
    if undecided:
        text = f"step {step}: ranks {_list(undecided)} disagree, and none has a majority"
        return Verdict(Decision("arbitrate", text, name), (), tuple(undecided))
    return Verdict(Decision("go-on", f"step {step}: all digests agree", name))


def in_hindsight(first: Mapping[int, object], again: Mapping[int, object]) -> tuple[int, ...]:
    """The wrong ranks of a disagreement without a majority: {rank: result} at `first`, and the agreed results of the
    same step, computed `again` from a verified state. Empty if no first result equals the agreed one: the error had
    spread to the others' state, or this platform does not compute the same bits twice.
    """
    if not first.keys() <= again.keys():
        return ()
    wrong = tuple(sorted(rank for rank, said in first.items() if said != again[rank]))
    return wrong if len(wrong) < len(first) else ()


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in sorted(ranks))
