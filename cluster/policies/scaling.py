"""How many workers to order, and when to grow. When to shrink follows from cluster.policies.failure."""

from dataclasses import dataclass

from cluster.config import ElasticSettings
from cluster.policies.decision import Decision, key


def workers_to_order(alive: int, ordered: int, settings: ElasticSettings) -> int:
    """Workers to spawn for the full group and its spares; `ordered` ones are starting already."""
    return max(0, settings.max_workers + settings.spares - alive - ordered)


@dataclass(frozen=True)
class GrowthView:
    """Capacity at a step boundary, e.g. 3 blocks run, 1 more is warm, the last pause took 0.5 s."""

    blocks: int
    reachable: int
    """Blocks after growing now, at most `max_blocks`."""
    pause_s: float
    """Seconds that the last re-forming cost every rank (0 if none was measured)."""
    quiet_s: float
    """Expected seconds until another re-forming comes anyway (the run's own mean time between them)."""


def decide_growth(view: GrowthView, settings: ElasticSettings) -> Decision:
    """grow (at the next step boundary) or keep.

    A growth stops all `blocks` for `pause_s` and gains `reachable - blocks` for `quiet_s`: it pays if the gain is
    larger. Otherwise the warm workers wait, and the next re-forming takes them in at no cost.
    """
    gained = view.reachable - view.blocks
    if gained <= 0:
        return Decision("keep", f"{view.blocks} blocks, nothing to add", key("max_workers"))
    if settings.growth_must_pay and gained * view.quiet_s < view.blocks * view.pause_s:
        text = f"{gained} blocks for {view.quiet_s:.0f} s do not outweigh {view.blocks} blocks for {view.pause_s:.1f} s"
        return Decision("keep", text, key("growth_must_pay"))
    return Decision("grow", f"{view.blocks} to {view.reachable} blocks at the next step boundary", key("max_workers"))
