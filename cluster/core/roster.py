"""The workers of a run as disjoint sets, one per state of a worker's life.

spawned -> standby -> joined (generation, rank) -> aborted -> standby | dead | quarantined. A dead or dismissed worker
is in no set, and its late messages are ignored; a quarantined node's name stays here.
"""

from collections.abc import Collection, Iterable


class Roster:
    """Sets of worker names; the cost of a change grows only with the workers that change."""

    def __init__(self, prefix: str) -> None:
        self.ordered: set[str] = set()
        self.standby: set[str] = set()
        self.joined: set[str] = set()
        self.aborted: set[str] = set()
        self.leaving: dict[str, str] = {}
        """Joined or aborted workers that the next generation leaves out, and why."""
        self.node_of: dict[str, str] = {}
        self.unfit: set[str] = set()
        """Quarantined nodes."""
        self.draining: dict[str, float] = {}
        """Nodes that will leave, with their deadlines."""
        self.aside: dict[str, float] = {}
        """Nodes that others cannot reach, and until when no generation takes them in."""
        self._on_node: dict[str, set[str]] = {}
        self._prefix, self._count = prefix, 0

    @property
    def alive(self) -> int:
        """The number of usable workers: on standby or in a generation, without leaving ones."""
        return len(self.standby) + len(self.joined) + len(self.aborted) - len(self.leaving)

    def order(self, count: int) -> tuple[str, ...]:
        """Names for `count` new workers."""
        names = tuple(f"{self._prefix}{self._count + index}" for index in range(count))
        self._count += count
        self.ordered.update(names)
        return names

    def place(self, worker: str, node: str) -> None:
        self.node_of[worker] = node
        self._on_node.setdefault(node, set()).add(worker)

    def on(self, nodes: Iterable[str]) -> set[str]:
        return {worker for node in nodes for worker in self._on_node.get(node, ())}

    def usable(self, node: str) -> bool:
        return node not in self.unfit and node not in self.draining

    def within_reach(self) -> set[str]:
        """Workers on standby that a generation may take in."""
        return self.standby - self.on(self.aside)

    def usable_outside(self, node: str) -> int:
        """The number of workers left without `node`."""
        inside = self.on([node]) - self.leaving.keys()
        return self.alive - len(inside)

    def forget(self, workers: Collection[str]) -> set[str]:
        """Remove workers from all sets; returns those that were known."""
        known = {worker for worker in workers if worker in self.node_of or worker in self.ordered}
        for group in (self.ordered, self.standby, self.joined, self.aborted):
            group -= known
        for worker in known:
            self.leaving.pop(worker, None)
            node = self.node_of.pop(worker, None)
            if node is not None:
                self._on_node[node].discard(worker)
                if not self._on_node[node]:
                    del self._on_node[node]
        return known

    def leave(self, workers: Iterable[str], why: str) -> set[str]:
        """Mark members of a generation; returns those of `workers` on standby, which can be dismissed at once."""
        idle = set()
        for worker in workers:
            if worker in self.standby:
                idle.add(worker)
            elif worker in self.joined or worker in self.aborted:
                self.leaving.setdefault(worker, why)
        return idle
