"""Applies the policies to ranks that train: slow, wrong, or about to fail. Nothing here knows Ray.

Nothing here waits. The controller passes beats on, and carries out the findings.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import ElasticSettings
from cluster.core import messages as m
from cluster.core.history import GroupJournal
from cluster.core.state_machine import StateMachine
from cluster.guard.admission import Admission
from cluster.guard.prediction import NodeTrend, decide_drain_ahead
from cluster.guard.proofs import Proof, Proofs
from cluster.guard.stragglers import Straggler, StragglerWatch
from cluster.node.health_watch import Reading
from cluster.node.rank_watch import Beat, Sight
from cluster.policies.corruption import Verdict, in_hindsight
from cluster.policies.decision import Decision, key
from cluster.policies.rollback import Rollback, SavedState, after_corruption


@dataclass(frozen=True)
class Finding:
    """`said`: (kind, facts) for people, see actors.pretrain.lead; `event`: for the core; `back`: the rollback, if
    training went wrong after step `step`; the `guilty` workers are replaced then."""

    said: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    event: m.Event | None = None
    back: Rollback | None = None
    step: int = 0
    guilty: tuple[str, ...] = ()


class Guard:
    """The guard of one group.

    Args:
        saved: the states that can be loaded now.
    """

    def __init__(
        self,
        settings: ElasticSettings,
        core: StateMachine,
        journal: GroupJournal,
        saved: Callable[[], Sequence[SavedState]],
    ) -> None:
        self._settings, self._core, self._journal, self._saved = settings, core, journal, saved
        self._stragglers, self._proofs = StragglerWatch(settings), Proofs(settings)
        self.admission = Admission(settings)
        self._trends: dict[str, NodeTrend] = defaultdict(NodeTrend)
        self._readings: dict[str, int] = {}
        self._verified_at = 0.0

    def begin(self, now: float) -> None:
        """A generation has started to run."""
        self._stragglers.begin()
        self._proofs.begin(sum(map(len, self._core.blocks)))
        self._verified_at = now

    def saw(self, beat: Beat, now: float) -> Iterator[Finding]:
        """Judge one node's beat."""
        self.admission.heard(beat.node, beat.sink)
        yield from self._foresee(beat.node, beat.health, now)
        yield from self._watch(beat.sights, now)

    def lose_node(self, node: str, workers: Iterable[str]) -> None:
        """Forget a lost node and its workers."""
        self.admission.lose(node, workers)
        self._trends.pop(node, None)
        self._readings.pop(node, None)

    def _foresee(self, node: str, reading: Reading, now: float) -> Iterator[Finding]:
        """Let a node that is likely to fail leave before it does, as soon as there is a replacement."""
        if self._readings.get(node, 0) == reading.number:
            return
        self._readings[node] = reading.number
        self._trends[node].observe(now, reading.signals)
        decision = decide_drain_ahead(node[:12], self._trends[node], self._settings)
        if decision.action == "drain" and node not in self._core.roster.draining:
            facts = {"what": f"node {node[:12]} may fail soon: {decision.reason}", "node": node, "notice": "predicted"}
            said = ("detected", facts), ("decided", {"decision": str(decision), "action": "drain"})
            yield Finding(said=said, event=m.NodesDraining({node: math.inf}))

    def _watch(self, sights: Iterable[Sight], now: float) -> Iterator[Finding]:
        core = self._core
        if core.phase not in ("running", "stopping"):
            return
        for sight in sights:
            record = sight.record
            if record.generation != core.generation or not sight.alive:
                continue
            if record.state == "joined":
                self._stragglers.saw(record.rank, record.step, record.own_s)
            for proof in (Proof.from_note(note) for name, note in sight.notes.items() if name.startswith("proof")):
                if proof.generation == core.generation:
                    self._proofs.heard(record.rank, proof)
        for step, verdict, told in self._proofs.judged():
            yield self._verified(step, verdict, told, now)
            if core.phase not in ("running", "stopping"):  # steps after a wrong one are wrong too
                return
        if core.phase == "running":
            yield from map(_slow, self._stragglers.judge(core))

    def _verified(self, step: int, verdict: Verdict, told: Mapping[int, Proof], now: float) -> Finding:
        """All ranks' digests are there: the state after `step` steps is right, or training goes back."""
        since, self._verified_at = now - self._verified_at, now
        history = self._journal.history
        if verdict.decision.action == "go-on":
            self._journal.note(verified=step)
            self._core.book.verified = step
            return self._named_later(step, told)
        members = self._core.members
        guilty = tuple(members[rank] for rank in verdict.guilty)
        back = after_corruption(step - 1, verdict.guilty, self._saved(), history.rollbacks, self._settings)
        nodes = [self._core.roster.node_of[worker] for worker in guilty]
        note: dict[str, Any] = {"step": step, "to_step": back.to_step, "workers": list(guilty), "nodes": nodes}
        if not guilty:
            note["said"] = {str(rank): [members[rank], *_words(told[rank])] for rank in verdict.undecided}
        self._journal.note(corruptions=(*history.corruptions, note))
        who = ", ".join(f"{worker} (rank {members.index(worker)})" for worker in guilty)
        what = f"{who or 'some rank'} remembers or computes wrongly: {verdict.decision.reason}"
        facts = {"what": what, "workers": list(guilty), "after_s": since}
        return Finding(said=(("detected", facts),), back=back, step=step - 1, guilty=guilty)

    def _named_later(self, step: int, told: Mapping[int, Proof]) -> Finding:
        """The state after `step` steps is right. If ranks disagreed about it before, evict the one that was wrong."""
        verified = "verified", {"step": step, "ranks": len(told)}
        corruptions = self._journal.history.corruptions
        last = corruptions[-1] if corruptions else {}
        if last.get("step") != step or "said" not in last:
            return Finding(said=(verified,))
        first = {int(rank): words for rank, (_, *words) in last["said"].items()}
        wrong = in_hindsight(first, {rank: _words(proof) for rank, proof in told.items()})
        node_of, workers = self._core.roster.node_of, [last["said"][str(rank)][0] for rank in wrong]
        guilty = [worker for worker in workers if worker in node_of]
        named = {name: value for name, value in last.items() if name != "said"}
        named |= {"workers": guilty, "nodes": [node_of[worker] for worker in guilty]}
        self._journal.note(corruptions=(*corruptions[:-1], named))
        if not guilty:
            return Finding(said=(verified,))
        who = ", ".join(guilty)
        what = f"{who} was wrong when the ranks disagreed at step {step}: computed again, all say what the others said"
        decision = Decision("quarantine", what, key("verify_every"))
        return Finding((verified, ("detected", {"what": what, "workers": guilty})), m.Evict(guilty, decision))


def _words(proof: Proof) -> list[Any]:
    """The parts of a proof that must be the same when a step is computed again."""
    return [dict(proof.state), proof.replay, proof.kind]


def _slow(one: Straggler) -> Finding:
    """A straggler is evicted, or reported."""
    if one.decision.action == "evict":
        return Finding(event=m.Evict([one.worker], one.decision, one.unfit))
    facts = {"decision": str(one.decision), "action": "report", "worker": one.worker, "rank": one.slow.rank}
    return Finding(said=(("decided", {**facts, "ratio": round(one.slow.ratio, 2)}),))
