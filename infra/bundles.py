"""Whether a set of resource bundles can ever be placed on a cluster: asked before Ray is, which would wait for ever.

A bundle is what must lie on one node, by Ray's names: {"CPU": 4.0, "GPU": 1.0}. Strategies are Ray's: PACK and SPREAD
(best effort), STRICT_PACK (all on one node), STRICT_SPREAD (each on another node).
"""

from collections.abc import Mapping, Sequence

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
Bundle = Mapping[str, float]


def unplaceable(bundles: Sequence[Bundle], strategy: str, nodes: Sequence[Bundle]) -> str | None:
    """Why `nodes`, all of them empty, cannot hold `bundles`; None where they can, or where only trying would tell
    (bundles of several shapes)."""
    for bundle in bundles:
        if not any(_fits(bundle, node) for node in nodes):
            return f"no node has {show_bundle(bundle)}{_most(bundle, nodes)}"
    if strategy == "STRICT_PACK":
        whole = _total(bundles)
        if not any(_fits(whole, node) for node in nodes):
            return f"STRICT_PACK wants {show_bundle(whole)} on one node, and none has that{_most(whole, nodes)}"
        return None
    alike = all(bundle == bundles[0] for bundle in bundles)
    if strategy == "STRICT_SPREAD":
        able = [node for node in nodes if any(_fits(bundle, node) for bundle in bundles)]
        if len(able) < len(bundles):
            return f"STRICT_SPREAD wants {len(bundles)} nodes, and {len(able)} can hold such a bundle"
        return None
    whole, there = _total(bundles), _total(nodes)
    for name, amount in whole.items():
        if amount > there.get(name, 0.0):
            return f"that is {_amount(name, amount)} in all, and this cluster has {_amount(name, there.get(name, 0.0))}"
    if alike and (held := sum(_times(bundles[0], node) for node in nodes)) < len(bundles):
        return f"this cluster's nodes can hold {held} such bundles"
    return None


def show_bundle(bundle: Bundle) -> str:
    """{"CPU": 1.0, "memory": 2**30} -> "CPU=1, memory=1GiB"."""
    return ", ".join(_amount(name, amount) for name, amount in bundle.items())


def _amount(name: str, amount: float) -> str:
    return f"{name}={amount / (1 << 30):.3g}GiB" if name == "memory" else f"{name}={amount:g}"


def _fits(bundle: Bundle, node: Bundle) -> bool:
    return all(node.get(name, 0.0) >= amount for name, amount in bundle.items())


def _times(bundle: Bundle, node: Bundle) -> int:
    """How often an empty node holds a bundle."""
    return min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in bundle.items() if amount > 0)


def _total(bundles: Sequence[Bundle]) -> dict[str, float]:
    names = dict.fromkeys(name for bundle in bundles for name in bundle)
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in names}


def _most(bundle: Bundle, nodes: Sequence[Bundle]) -> str:
    """What is short of it, where it is one resource alone."""
    most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in bundle}
    short = [_amount(name, most[name]) for name, amount in bundle.items() if amount > most[name]]
    return f" (the most on one node: {', '.join(short)})" if short else ""
