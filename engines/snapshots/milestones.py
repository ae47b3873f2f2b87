"""Snapshots that stay in memory beyond the newest ones: where to go back to from a corruption that is found late, or
from steps that are doubtful."""

from collections.abc import Iterable
from dataclasses import dataclass

KEPT = 2
"""Of the newest ones, which may not have been verified yet; also before doubtful steps: the controller may know of
the last one too late."""


@dataclass
class Milestones:
    """Of snapshots every `every` steps the first at or after each multiple of `apart`; apart 0: none.

    cluster.policies.corruption.is_due names the same steps (a test holds the two together). `verified`, which its owner
    moves on, is the last step that is known to be right. `doubtful`, likewise, is the first of the steps that may have
    to be undone (after a NaN or a spike of the loss); -1: none is.
    Example: Milestones(every=4, apart=10) are 12, 20, 32, 40 ...
    """

    every: int = 1
    apart: int = 0
    verified: int = 0
    doubtful: int = -1

    def has(self, step: int) -> bool:
        return self.apart > 0 and step > 0 and step % self.every == 0 and step % self.apart < self.every

    def kept(self, steps: Iterable[int], tight: bool = False) -> set[int]:
        """Of all steps at hand: the newest milestones, the newest verified, the last ones before doubtful steps. Where
        memory is `tight` the latter have to go: storage may have to do."""
        every = sorted(set(steps))
        found = [step for step in every if self.has(step)]
        right = [step for step in found if step <= self.verified]
        good = [step for step in every if step <= self.doubtful and not tight]
        return {*found[-KEPT:], *right[-1:], *good[-KEPT:]}


NO_MILESTONES = Milestones()
