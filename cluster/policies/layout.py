"""Places of workers: whole model-parallel blocks from survivors and spares, with the smallest change."""

from collections.abc import Collection, Iterable, Mapping
from heapq import heapify, heappop, heappush

Block = tuple[str, ...]
"""Workers of one block in rank order (tensor-parallel ranks are neighbours), e.g. ("w4", "w5") for tp2."""


def mend(
    blocks: Iterable[Block],
    gone: Collection[str],
    pool: Collection[str],
    node_of: Mapping[str, str],
    block_size: int,
    most: int,
) -> tuple[Block, ...]:
    """The whole blocks that can be formed now, at most `most`.

    1. Untouched blocks stay as they are, in their order. 2. Damaged blocks are filled from `pool`, those with the
    fewest holes first; a hole prefers a worker of its own node, then of the block's nodes. 3. Blocks that
    cannot be filled are dissolved; their survivors and the rest of the pool form new blocks, node by node.

    Args:
        blocks: of the last generation. gone: workers that must not be used (dead, leaving).
        pool: usable workers outside `blocks`. node_of: worker -> node.
    """
    gone, pool = set(gone), set(pool)
    slots: list[Block | None] = []
    damaged: list[tuple[int, Block]] = []
    for block in blocks:
        if gone.isdisjoint(block):
            slots.append(block)
        else:
            damaged.append((len(slots), block))
            slots.append(None)
    damaged.sort(key=lambda item: sum(worker in gone for worker in item[1]))
    for place, block in damaged:
        holes = sum(worker in gone for worker in block)
        if holes <= len(pool):
            slots[place] = _fill(block, gone, pool, node_of)
        else:
            pool.update(worker for worker in block if worker not in gone)
    whole = [block for block in slots if block is not None][:most]
    whole += _new_blocks(pool, node_of, block_size, most - len(whole))
    return tuple(whole)


def _fill(block: Block, gone: set[str], pool: set[str], node_of: Mapping[str, str]) -> Block:
    home = {node_of[worker] for worker in block if worker not in gone and worker in node_of}
    filled = list(block)
    for index, worker in enumerate(block):
        if worker in gone:
            old = node_of.get(worker)
            best = min(
                pool, key=lambda spare: (node_of[spare] != old, node_of[spare] not in home, node_of[spare], spare)
            )
            pool.discard(best)
            filled[index] = best
    return tuple(filled)


def _new_blocks(free: Collection[str], node_of: Mapping[str, str], block_size: int, most: int) -> list[Block]:
    """At most `most` blocks. Each takes nodes with many free workers first, so that it spans few nodes."""
    on: dict[str, list[str]] = {}
    for worker in sorted(free, reverse=True):
        on.setdefault(node_of[worker], []).append(worker)
    nodes = [(-min(len(workers), block_size), node) for node, workers in on.items()]
    heapify(nodes)
    made: list[Block] = []
    for _ in range(min(most, len(free) // block_size)):
        block: list[str] = []
        while len(block) < block_size:
            _, node = heappop(nodes)
            workers = on[node]
            while workers and len(block) < block_size:
                block.append(workers.pop())
        if workers:
            heappush(nodes, (-min(len(workers), block_size), node))
        made.append(tuple(block))
    return made
