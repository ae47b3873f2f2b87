"""Decisions after a failure: of ranks, of the whole group, of the controller, of a group that cannot shrink."""

from dataclasses import dataclass

from cluster.config import ElasticSettings
from cluster.policies.decision import Decision, key


@dataclass(frozen=True)
class FailureView:
    """The state after a failure, in whole blocks.

    Example: rank 5 of four tp2 blocks died, no spare: FailureView("worker w5 died", 1, 1, 4, 3, 0, "memory").
    """

    cause: str
    lost: int
    """Ranks lost."""
    damaged: int
    """Blocks that the lost ranks were part of."""
    before: int
    """Blocks of the generation that failed."""
    after: int
    """Whole blocks that survivors and ready spares can form now."""
    faults_without_progress: int
    """Faults since the last new committed step, this one included."""
    restore: str
    """Source of the state: "memory", "storage", "start" (no step was ever saved) or "nowhere"."""


def decide_failure(view: FailureView, settings: ElasticSettings) -> Decision:
    """replace (spares fill all holes), shrink, wait (too few for `min_workers`) or fail."""
    scope = _scope(view)
    if view.faults_without_progress > settings.max_faults_without_progress:
        text = f"{scope}: fault {view.faults_without_progress} without a new committed step"
        return Decision("fail", text, key("max_faults_without_progress"))
    if view.restore == "nowhere":
        return Decision("fail", f"{scope}: no whole copy of the state is left", key("snapshot_replicas"))
    source = {"memory": "from host memory", "storage": "from storage", "start": "from the start"}[view.restore]
    if view.after < settings.min_blocks:
        have, need = view.after * settings.block, settings.min_workers
        return Decision("wait", f"{scope}: {have} usable ranks, {need} needed", key("min_workers"))
    if view.after >= view.before:
        how = "spares fill the holes" if view.lost else "all ranks are there"
        return Decision("replace", f"{scope}: {how}, restore {source}", key("spares"))
    text = f"{scope}: {view.after} of {view.before} blocks go on, restore {source}"
    return Decision("shrink", text, key("min_workers"))


def _scope(view: FailureView) -> str:
    if view.lost == 0:
        return view.cause
    ranks = f"{view.lost} rank{'s' * (view.lost != 1)}"
    if view.damaged == view.before:
        where = "in every block" if view.before > 1 else "of the only block"
    else:
        where = f"in {view.damaged} of {view.before} blocks"
    return f"{view.cause} ({ranks} {where})"


@dataclass(frozen=True)
class AdoptionView:
    """The group as a restarted controller finds it: newest generation, its size, the number of its joined ranks."""

    generation: int
    world_size: int
    present: int
    strays: int
    """Workers still joined to an older generation."""


def decide_adoption(view: AdoptionView, settings: ElasticSettings) -> Decision:
    """adopt (training continues untouched), re-form (some are missing) or start (there are no ranks)."""
    if view.present == 0:
        return Decision("start", "controller restarted: no living worker of this run", key("adopt_timeout_s"))
    found = f"controller restarted: {view.present} of {view.world_size} ranks of generation {view.generation} answered"
    if view.present == view.world_size and not view.strays and view.world_size >= settings.min_workers:
        return Decision("adopt", found, key("adopt_timeout_s"))
    return Decision("re-form", found, key("adopt_timeout_s"))
