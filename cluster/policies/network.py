"""Machines that have no way to each other: which of them to do without, and for how long.

Nobody is to blame: a network that cannot form a group says nothing of a node. Who stands aside stays warm, and is tried
again later.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from cluster.config import ElasticSettings

LONGEST_S = 1800.0
"""Trying again stops everybody for some seconds: that seldom it costs next to nothing."""


def stand_aside(ways: Collection[tuple[str, str]], nodes: Sequence[str]) -> tuple[str, ...]:
    """Nodes without which all others reach each other: one after the other that with the most broken `ways` (from node,
    to node); of several the last of `nodes`, which are in the order of their ranks. A way from a node to itself is one
    to where all meet.

    Example: b reaches neither a nor c: stand_aside([("b", "a"), ("c", "b")], "abc") is ("b",).
    """
    broken = {frozenset(way) for way in ways}
    out = []
    while broken:
        count = Counter(node for way in broken for node in way)
        worst = max(count, key=lambda node: (count[node], nodes.index(node)))
        out.append(worst)
        broken = {way for way in broken if worst not in way}
    return tuple(out)


def aside_s(times: int, settings: ElasticSettings) -> float:
    """How long a node stands aside for the `times`-th time in a row."""
    return min(LONGEST_S, settings.respawn_backoff_s * 2.0 ** min(times - 1, 20))
