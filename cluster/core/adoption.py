"""How a restarted controller interprets the live workers that node agents report."""

from collections.abc import Collection
from dataclasses import dataclass

from cluster.config import ElasticSettings
from cluster.core.messages import Found
from cluster.policies.failure import AdoptionView
from cluster.policies.layout import Block


@dataclass(frozen=True)
class Takeover:
    """`blocks`: of the newest generation, with stand-in names for ranks that did not answer. `seated`: workers in any
    generation. `step`: the newest step that a rank of the newest generation has committed."""

    view: AdoptionView
    blocks: tuple[Block, ...]
    seated: frozenset[str]
    step: int


def read_inventory(found: Collection[Found], known_generation: int, settings: ElasticSettings) -> Takeover:
    """A generation counts as whole only if all its ranks have state "joined", and the journal knows no later one."""
    seated = [one for one in found if one.state in ("joining", "joined")]
    newest = max((one.generation for one in seated), default=0)
    current = {one.rank: one for one in seated if one.generation == newest}
    world = max((one.world_size for one in current.values()), default=0)
    present = sum(one.state == "joined" for one in current.values())
    strays = len(seated) - len(current)
    if newest < known_generation or world % settings.block:
        strays += 1
    names = [current[rank].worker if rank in current else f"lost rank {rank}" for rank in range(world)]
    size = settings.block
    blocks = tuple(tuple(names[start : start + size]) for start in range(0, world - world % size, size))
    step = max((one.step for one in current.values()), default=0)
    view = AdoptionView(newest, world, present, strays)
    return Takeover(view, blocks, frozenset(one.worker for one in seated), step)
