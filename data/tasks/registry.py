"""All task kinds, and deterministic, disjoint sets of problems drawn from them."""

from collections.abc import Mapping, Sequence
from random import Random

from data.config import TaskSettings
from data.tasks import arithmetic, safety, stdlib, strings
from data.tasks.problem import Problem, Split, TaskKind, side_of
from infra.errors import ConfigError, nearest

_FAMILIES = (arithmetic, strings, stdlib, safety)
_GIVE_UP_AFTER = 20_000
"""Draws without a new held-out problem after which a kind counts as used up."""


def all_kinds(settings: TaskSettings) -> dict[str, TaskKind]:
    """Name -> kind, at the sizes of `settings`."""
    return {kind.name: kind for family in _FAMILIES for kind in family.kinds(settings)}


def kind_names() -> list[str]:
    """Every known task kind, sorted."""
    return sorted(all_kinds(TaskSettings()))


def make_problems(
    kinds: Mapping[str, float] | Sequence[str] | None,
    count: int,
    seed: int,
    split: Split,
    settings: TaskSettings | None = None,
) -> list[Problem]:
    """Draw `count` problems in a mixed order. Equal arguments give equal lists on every machine (for stdlib/* kinds:
    with the same Python version).

    `kinds` maps names to weights (a plain list gives all the same weight, None takes `settings.kinds`). The splits are
    disjoint: a stable hash of each problem's canonical operands decides, independent of the seed. Training problems are
    drawn with replacement. Held-out problems are distinct; a small kind that runs out (the standard library has a fixed
    number of functions) leaves its remaining share to the others.

    Raises:
        ConfigError: an unknown kind (the message names the nearest known one), a bad weight, too few held-out problems.
    """
    settings = settings or TaskSettings()
    known = all_kinds(settings)
    weights = _weights(settings.kinds if kinds is None else kinds, known)
    if split not in ("train", "held_out"):
        raise ValueError(f"split {split!r}: train or held_out")
    sources = {name: _Source(known[name], seed, split) for name in weights}
    problems: list[Problem] = []
    while len(problems) < count and weights:
        for name, share in _shares(weights, count - len(problems)).items():
            drawn = sources[name].take(share)
            problems += drawn
            if len(drawn) < share:
                del weights[name]
    if len(problems) < count:
        raise ConfigError(
            f"tasks.kinds: only {len(problems)} different {split} problems of {', '.join(sorted(sources))}, "
            f"{count} are needed; ask for fewer, add kinds or raise the sizes (tasks.*_digits, tasks.*_length)"
        )
    Random(f"order {seed} {split}").shuffle(problems)
    return problems


class _Source:
    """Endless training problems, or distinct held-out ones, of one kind."""

    def __init__(self, kind: TaskKind, seed: int, split: Split) -> None:
        self._kind = kind
        self._split = split
        self._rng = Random(f"{seed} {split} {kind.name}")
        self._seen: set[str] = set()

    def take(self, count: int) -> list[Problem]:
        """Up to `count` problems; fewer if `_GIVE_UP_AFTER` draws gave no new one."""
        problems: list[Problem] = []
        misses = 0
        while len(problems) < count and misses < _GIVE_UP_AFTER:
            draw = self._kind.draw(self._rng)
            misses += 1
            if side_of(self._kind.name, draw.operands) != self._split or draw.prompt in self._seen:
                continue
            if self._split == "held_out":
                self._seen.add(draw.prompt)
            problems.append(self._kind.problem(draw))
            misses = 0
        return problems


def _weights(kinds: Mapping[str, float] | Sequence[str], known: Mapping[str, TaskKind]) -> dict[str, float]:
    weights = dict(kinds) if isinstance(kinds, Mapping) else dict.fromkeys(kinds, 1.0)
    for name, weight in weights.items():
        if name not in known:
            raise ConfigError(f"tasks.kinds: unknown kind {name!r}{nearest(name, sorted(known))}")
        if not weight >= 0:
            raise ConfigError(f"tasks.kinds: {name} has weight {weight}; weights are 0 or more")
    weights = {name: weight for name, weight in sorted(weights.items()) if weight > 0}
    if not weights:
        raise ConfigError("tasks.kinds: no kind has a positive weight")
    return weights


def _shares(weights: Mapping[str, float], count: int) -> dict[str, int]:
    """Split `count` by weight; the rest after rounding down goes to the largest remainders, ties by name."""
    total = sum(weights.values())
    exact = {name: count * weight / total for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    left = count - sum(shares.values())
    for name in sorted(exact, key=lambda name: (shares[name] - exact[name], name))[:left]:
        shares[name] += 1
    return shares
