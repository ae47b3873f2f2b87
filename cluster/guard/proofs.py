"""A rank's proof of a verified step, by which wrong memory and wrong computing are found.

`state`: digests of its part of the state after the step, by its place in the mesh; ranks with the same place hold the
same bits. `replay`: the digest of the result that all replicas compute from that state and the same sample; ranks at
the same place of their blocks compute the same bits. Both hold only among machines of one `kind`.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.config import ElasticSettings
from cluster.policies.corruption import Verdict, judge_digests


@dataclass(frozen=True)
class Proof:
    """Example: Proof(2, 100, {"shard=1": "9f3c..."}, "77ab...", "AMD EPYC, AVX2, 1 thread")."""

    generation: int
    step: int
    state: Mapping[str, str] = field(default_factory=dict)
    replay: str = ""
    kind: str = ""

    def to_note(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Proof":
        return cls(**note)


class Proofs:
    """The proofs of one generation's ranks.

    Args:
        settings: ranks are numbered block by block.
    """

    def __init__(self, settings: ElasticSettings) -> None:
        self._settings = settings
        self._world_size = 0
        self._steps: dict[int, dict[int, Proof]] = defaultdict(dict)
        self._judged = -1

    def begin(self, world_size: int) -> None:
        """A generation of `world_size` ranks has started to run."""
        self._world_size, self._judged = world_size, -1
        self._steps.clear()

    def heard(self, rank: int, proof: Proof) -> None:
        if proof.step > self._judged:
            self._steps[proof.step][rank] = proof

    def judged(self) -> Iterator[tuple[int, Verdict, Mapping[int, Proof]]]:
        """(step, verdict, proofs) of steps that all ranks have reported, in order, each once."""
        for step in sorted(self._steps):
            told = self._steps.get(step, {})
            if self._world_size and len(told) == self._world_size:
                self._judged = step
                for older in [one for one in self._steps if one <= step]:
                    del self._steps[older]
                yield step, judge(step, told, self._settings), told


def judge(step: int, told: Mapping[int, Proof], settings: ElasticSettings) -> Verdict:
    """The verdict on the proofs of all ranks."""
    return judge_digests(step, list(groups(told, settings.block)))


def groups(told: Mapping[int, Proof], block: int) -> Iterator[dict[int, str]]:
    """{rank: digest} of ranks that must agree."""
    found: dict[tuple[str, str, int], dict[int, str]] = defaultdict(dict)
    for rank, proof in told.items():
        for place, digest in proof.state.items():
            found["state", f"{place} {proof.kind}", 0][rank] = digest
        if proof.replay:
            found["replay", proof.kind, rank % block][rank] = proof.replay
    yield from (digests for digests in found.values() if len(digests) > 1)
