"""Whether a set of resource bundles can ever be placed on a cluster. Ray itself would wait for ever.

A bundle is a set of resources of one node, by Ray's names: {"CPU": 4.0, "GPU": 1.0}. Strategies are Ray's: PACK and
SPREAD (best effort), STRICT_PACK (all bundles on one node), STRICT_SPREAD (each bundle on another node).
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from infra.errors import ConfigError

SMALLEST = 1e-4
"""Ray counts resources in ten-thousandths."""
STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
Bundle = Mapping[str, float]


def check_amount(setting: str, resource: str, amount: Any) -> float:
    """An amount of a resource as a Python number that Ray can count; `setting` names where it was given.

    Raises:
        ConfigError: it is not a finite number, is negative, or has a fraction that Ray cannot count.
    """
    number = check_number(setting, amount)
    if number < 0:
        raise ConfigError(f"{setting}={amount}: must not be negative")
    if 0 < number < SMALLEST:
        raise ConfigError(f"{setting}={amount}: Ray counts in steps of {SMALLEST:g}; give at least that, or 0 for none")
    if resource == "GPU" and number > 1 and number != int(number):
        raise ConfigError(f"{setting}={amount}: more than one GPU must be a whole number of them")
    return number


def check_number(setting: str, value: Any) -> float:
    """A finite number as a Python number.

    Raises:
        ConfigError: `value` is not a finite number.
    """
    try:
        finite = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        finite = False
    if not finite:
        raise ConfigError(f"{setting}={value!r}: must be a finite number")
    return value if isinstance(value, (int, float)) else float(value)


def unplaceable(bundles: Sequence[Bundle], strategy: str, nodes: Sequence[Bundle]) -> str | None:
    """Why `nodes`, all of them empty, cannot hold `bundles`; None if they can, or if only trying would tell (bundles of
    several shapes)."""
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
    """How many copies of a bundle an empty node holds."""
    return min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in bundle.items() if amount > 0)


def _total(bundles: Sequence[Bundle]) -> dict[str, float]:
    names = dict.fromkeys(name for bundle in bundles for name in bundle)
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in names}


def _most(bundle: Bundle, nodes: Sequence[Bundle]) -> str:
    """The resources that no node has enough of, with the most that one node has."""
    most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in bundle}
    short = [_amount(name, most[name]) for name, amount in bundle.items() if amount > most[name]]
    return f" (the most on one node: {', '.join(short)})" if short else ""
