"""Machines that cannot reach each other: which of them stand aside, and for how long.

No node is blamed: a network that cannot form a group says nothing about a node. A node that stands aside keeps its
workers warm, and is tried again later.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from cluster.config import ElasticSettings

LONGEST_S = 1800.0
"""Longest time aside: another try stops all ranks for some seconds, which hardly matters this rarely."""


def stand_aside(ways: Collection[tuple[str, str]], nodes: Sequence[str]) -> tuple[str, ...]:
    """Nodes without which all others reach each other. Again and again the node with the most broken `ways` (from node,
    to node) is left out; of several the last in `nodes`, which are in the order of their ranks. A way from a node to
    itself stands for the way to the meeting point of all.

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
