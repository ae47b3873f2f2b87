"""When a recovery may have lost more than one committed step: only where faults had taken every copy of some shard.

Pure: it is told what the ranks' beacons said of each generation, and which memory the campaign's faults took and when.
Each rank's shard lies on its own node and on the next one in the ring of the group's nodes (see
`cluster.policies.snapshot.place_replicas`); where every rank holds the whole state, any rank's will do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SLACK_S = 1.0
"""Between a commit and when the campaign has seen it."""


@dataclass
class Life:
    """One generation. `nodes`: of each rank; `start`, `reached`: committed steps; times by the monotonic clock: when it
    was first seen at work, and when its last commit was."""

    nodes: dict[int, str]
    world_size: int
    start: int
    reached: int
    joined_at: float
    advanced_at: float


@dataclass
class Taken:
    """What a fault made unreadable: all that lay on `node` (empty: on every node), or one shard of one generation
    there. `until`: what is written later can be read."""

    what: str
    at: float
    node: str = ""
    shard: tuple[int, int] | None = None
    """(generation, rank)"""
    until: float = math.inf


@dataclass
class Stored:
    """A snapshot whose manifest was in the store, and when it was first seen there."""

    generation: int
    step: int
    at: float


def losses(
    lives: Mapping[int, Life],
    taken: Sequence[Taken],
    back: Sequence[int],
    replicated: bool,
    stored: Sequence[Stored] = (),
) -> list[str]:
    """Every recovery that lost more than it may, in words.

    Args:
        back: steps that training was sent back to on purpose, each once.
        stored: what a recovery can go on from where memory has no copy.
    """
    found, left = [], list(back)
    at = 0
    for generation, life in sorted(lives.items()):
        lost = at - life.start
        sent = next((step for step in left if 0 <= step - life.start <= 1), None) if lost > 1 else None
        if sent is not None:
            left.remove(sent)
        elif lost > 1:
            why = copies_gone(lives, taken, generation, replicated)
            sent = min((step for step in left if life.start <= step < at), default=None)
            if sent is not None and why:  # sent back, and then the state there was lost
                left.remove(sent)
            there = newest_stored(lives, stored, generation, at if sent is None else sent)
            if not why or life.start < there:
                more = why and f" ({why}; storage had {there})"
                found.append(f"generation {generation} went back from step {at} to {life.start}{more}")
        at = life.reached if lost > 1 else max(at, life.reached)
    return found


def newest_stored(lives: Mapping[int, Life], stored: Sequence[Stored], generation: int, at_most: int) -> int:
    """The last step up to `at_most` that was whole in the store when the last one before `generation` was committed; 0:
    none. What a generation stored after a later one's start belongs to a discarded future."""
    before = {one: life for one, life in lives.items() if one < generation}
    known_at = max((life.advanced_at for life in before.values()), default=0.0)

    def counts(one: Stored) -> bool:
        later = [life.start for number, life in before.items() if number > one.generation]
        return one.at <= known_at and one.step <= at_most and all(one.step <= start for start in later)

    return max((one.step for one in stored if counts(one)), default=0)


def copies_gone(lives: Mapping[int, Life], taken: Sequence[Taken], generation: int, replicated: bool) -> str:
    """Which faults left no copy of some shard to the recovery that `generation` came of; empty: there was one of each.

    Where it had to be read from is the last earlier generation that committed a step: with that commit all of the
    snapshot before it had its copies, and they are kept until a later generation commits one.
    """
    now = lives[generation].joined_at
    worked = [one for one, life in lives.items() if one < generation and life.reached > life.start]
    if not worked:
        return ""
    source = max(worked)
    life = lives[source]
    nodes = [life.nodes.get(rank, "") for rank in range(life.world_size)]
    ring = list(dict.fromkeys(nodes))
    whys: list[str] = []
    for rank, node in enumerate(nodes):
        holders = {node} if replicated else {node, ring[(ring.index(node) + 1) % len(ring)]}
        why = [_taken_there(taken, holder, (source, rank), life.advanced_at - SLACK_S, now) for holder in holders]
        if all(why):
            whys.append(" and ".join(sorted(set(why))))
    return whys[0] if whys and (not replicated or len(whys) == len(nodes)) else ""


def _taken_there(taken: Sequence[Taken], node: str, shard: tuple[int, int], since: float, now: float) -> str:
    for one in taken:
        there = one.node in ("", node) and one.shard in (None, shard)
        if there and one.at <= now and one.until >= since:
            return one.what
    return ""
