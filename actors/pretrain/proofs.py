"""A rank's proofs of verified steps, in its beacon, for the controller to compare."""

from cluster.config import ElasticSettings
from cluster.guard.proofs import Proof, judge
from cluster.node.beacons import BeaconWriter
from cluster.policies.corruption import is_due, replica_to_check
from engines.base import Batch, LossFn
from engines.elastic.learner import ElasticLearner
from engines.elastic.replay import processor_kind, replay


class Prover:
    """Makes the proofs of one generation, in the training thread.

    Args:
        last: the last step of training, which is always verified.
    """

    def __init__(self, beacon: BeaconWriter, elastic: ElasticLearner, settings: ElasticSettings, last: int) -> None:
        assert elastic.learner is not None
        self._beacon, self._elastic, self._settings, self._last = beacon, elastic, settings, last
        self._ranks = elastic.learner.ranks
        self._kind = processor_kind(self._ranks.device)
        self._open: Proof | None = None
        self._left = 0

    def wants_replay(self, step: int) -> int | None:
        """The replica whose data all compute after `step` steps; None: this step is not verified, or there is no other
        replica to compare with. The same on every rank without communication; each replica has its turn."""
        if not (is_due(step, self._settings) or step == self._last):
            return None
        return replica_to_check(step, self._ranks.data_size)

    def prove(self, sample: Batch, loss_fn: LossFn) -> None:
        """(collective) Replay `sample` from the present state. `leave` writes the proof once that state is sealed."""
        learner, groups = self._elastic.learner, self._elastic.groups
        assert learner is not None and groups is not None
        with groups.naming_lost_peers():
            digest = replay(learner, sample, loss_fn)
        self._open = Proof(groups.generation, learner.step, {}, digest, self._kind)

    def leave(self) -> None:
        """(collective if a proof is due) Write a due proof. Call this after every step: the next step seals the
        snapshot of a verified one. The ranks also exchange proofs, so that each knows which snapshot must stay."""
        snapshots, proof = self._elastic.snapshots, self._open
        if proof is None or snapshots is None or proof.step not in snapshots.digests:
            return
        whole = Proof(proof.generation, proof.step, snapshots.digests[proof.step], proof.replay, proof.kind)
        self._beacon.note(f"proof-{self._left % 2}", whole.to_note())
        assert self._elastic.groups is not None
        with self._elastic.groups.naming_lost_peers():
            told = {rank: Proof.from_note(note) for rank, note in enumerate(self._ranks.gather(whole.to_note()))}  # type: ignore[arg-type]
        if judge(proof.step, told, self._settings).decision.action == "go-on":
            self._elastic.milestones.verified = proof.step
        self._left, self._open = self._left + 1, None
