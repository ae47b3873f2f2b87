"""The controller core against a small model of a cluster that obeys its commands, late, partly or not at all."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.config import ElasticSettings
from cluster.core import messages as m
from cluster.core.state_machine import ENDED, StateMachine
from cluster.policies.decision import Decision
from cluster.policies.snapshot import Restore, place_replicas

WHY = Decision("test", "the test says so", "none")


@dataclass
class Process:
    """One modelled worker. `lineage` stands for its parameters: equal lineages are equal bits."""

    node: str
    group: int | None = None
    """Generation whose process groups it is in."""
    rank: int = 0
    ready: bool = False
    stopped: bool = False
    step: int = 0
    lineage: int = 0


@dataclass
class World:
    """Nodes, processes and host memory as they are; the core only hears what is delivered to it."""

    elastic: ElasticSettings
    per_node: int
    core: StateMachine = field(init=False)
    now: float = 0.0
    nodes: set[str] = field(default_factory=set)
    apart: set[frozenset[str]] = field(default_factory=set)
    """Pairs of nodes without a way to each other."""
    processes: dict[str, Process] = field(default_factory=dict)
    memory: dict[str, dict[tuple[int, int], dict[int, int]]] = field(default_factory=dict)
    """node -> (generation, step) -> shard -> lineage."""
    storage: dict[int, tuple[int, int]] = field(default_factory=dict)
    """step -> (generation, lineage)."""
    sizes: dict[int, int] = field(default_factory=dict)
    """generation -> its world size."""
    pending: list[m.Event] = field(default_factory=list)
    old: list[m.Event] = field(default_factory=list)
    members: tuple[str, ...] = ()
    restore: Any = None
    controllers: int = 0
    added: int = 0
    ended: m.End | None = None
    reports: list[Decision] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.core = StateMachine(self.elastic)

    # ---- what the core is told, and what it says

    def tell(self, event: m.Event) -> None:
        before = self.core.generation
        for command in self.core.handle(event, self.now):
            self.obey(command)
        self.check(before)

    def deliver(self, index: int) -> None:
        if self.pending:
            event = self.pending.pop(index % len(self.pending))
            self.old.append(event)
            self.tell(event)

    def obey(self, command: m.Command) -> None:
        if isinstance(command, m.Spawn):
            for worker in command.workers:
                self.spawn(worker, command.avoid)
        elif isinstance(command, m.Abort):
            for worker in command.workers:
                process = self.processes.get(worker)
                if process and not process.stopped:
                    process.group, process.ready = None, False
                    self.pending.append(m.AbortAcked(command.generation, (worker,)))
        elif isinstance(command, m.Kill | m.Dismiss):
            for worker in command.workers:
                self.processes.pop(worker, None)
        elif isinstance(command, m.Join):
            self.join(command)
        elif isinstance(command, m.StopAtBoundary):
            self.boundary(command.generation)
        elif isinstance(command, m.Enquire):
            self.answer()
        elif isinstance(command, m.Report):
            self.reports.append(command.decision)
        else:
            assert isinstance(command, m.End)
            self.ended = command

    def spawn(self, worker: str, avoid: frozenset[str]) -> None:
        free = [
            n for n in sorted(self.nodes - avoid) if sum(p.node == n for p in self.processes.values()) < self.per_node
        ]
        if free:
            self.processes[worker] = Process(free[0])
            self.pending.append(m.WorkersReady({worker: free[0]}))
        else:
            self.pending.append(m.WorkersRefused((worker,), "no node has room"))

    def join(self, command: m.Join) -> None:
        inside = {worker for worker, process in self.processes.items() if process.group is not None}
        assert not inside, f"{inside} are still in an older generation"
        self.members, self.restore = tuple(command.ranks()), command.restore
        source = command.restore
        self.sizes[command.generation] = len(self.members)
        for rank, worker in enumerate(self.members):
            process = self.processes.get(worker)
            if process is None:
                continue  # it died, and the core has not heard of it yet
            process.group, process.rank, process.step = command.generation, rank, source.step
            process.lineage = 0
            if source.source == "memory":
                found = {self.lineage_of(source, shard) for shard in range(source.world_size)}
                assert len(found - {-2}) <= 1, f"step {source.step} is not whole in memory: {found}"
                if -2 in found:
                    self.pending.append(m.Suspected(command.generation, (), "a shard has no copy"))
                    return
                process.lineage = found.pop()
            elif source.source == "storage":
                process.lineage = self.storage[source.step][1]
            else:
                assert source.source == "start" and source.step == 0
        if all(worker in self.processes and not self.processes[worker].stopped for worker in self.members):
            if ways := self.broken_ways():
                self.pending.append(m.PeersApart(command.generation, ways, "no connection from n0 to n1"))
                return
            for worker in self.members:
                self.processes[worker].ready = True
                self.pending.append(m.Joined(command.generation, (worker,)))

    def broken_ways(self) -> list[tuple[str, str]]:
        node_of = {worker: self.processes[worker].node for worker in self.members}
        pairs = [(one, other) for one in self.members for other in self.members]
        return [pair for pair in pairs if frozenset(node_of[worker] for worker in pair) in self.apart]

    def lineage_of(self, source: Restore, shard: int) -> int:
        """What a reader gets; nodes that died without the core's knowledge are passed over."""
        stored = (source.generation, source.step)
        places = [node for node, shards in source.on.items() if shard in set(shards)]
        found = {self.memory[node][stored][shard] for node in places if node in self.nodes}
        if not found and source.step in self.core.book.flushed:
            return self.storage[source.step][1]
        unheard = any(isinstance(event, m.NodesLost) for event in self.pending)
        assert len(found) == 1 or (not found and unheard), f"shard {shard} of {stored}: {found}"
        return found.pop() if found else -2

    def complete(self, generation: int) -> bool:
        """All ranks of the generation live, move and hold the state: a collective can end."""
        own = [self.processes.get(worker) for worker in self.members]
        return bool(own) and all(p and p.ready and not p.stopped and p.group == generation for p in own)

    def boundary(self, generation: int) -> None:
        if self.complete(generation):
            self.step(0)
            step = self.processes[self.members[0]].step
            for worker in self.members:
                self.processes[worker].group, self.processes[worker].ready = None, False
                self.pending.append(m.BoundaryReached(generation, step, (worker,)))

    def answer(self) -> None:
        found = []
        for worker, process in sorted(self.processes.items()):
            state = "standby" if process.group is None else "joined" if process.ready else "joining"
            size = len(self.members)
            found.append(m.Found(worker, process.node, state, process.group or 0, process.rank, size, process.step))
        for node in sorted(self.nodes):
            for (generation, step), shards in self.memory.get(node, {}).items():
                self.pending.append(m.SnapshotHeld(generation, step, self.sizes[generation], {node: set(shards)}))
        for step, (generation, _) in self.storage.items():
            self.pending.append(m.SnapshotFlushed(generation, step))
        self.pending.append(m.Inventory(found, last=True))

    def deliver_all(self, index: int) -> None:
        for _ in range(40):
            self.deliver(0)

    # ---- what happens in the world

    def step(self, index: int) -> None:
        """All ranks commit one step and put their shards into their node's memory and the next rank's."""
        generation = max((p.group or 0 for p in self.processes.values()), default=0)
        if not self.complete(generation):
            return
        nodes = [self.processes[worker].node for worker in self.members]
        held_by = place_replicas(nodes, 1)
        for rank, worker in enumerate(self.members):
            process = self.processes[worker]
            process.step, process.lineage = process.step + 1, hash((process.lineage, generation)) % 10**9
            for node in [node for node, shards in held_by.items() if rank in shards]:
                self.memory.setdefault(node, {}).setdefault((generation, process.step), {})[rank] = process.lineage
                held = m.SnapshotHeld(generation, process.step, len(self.members), {node: {rank}})
                self.pending.append(held)
        step = self.processes[self.members[0]].step
        for stored in self.memory.values():
            for old in [old for old in stored if old[1] < step - 3]:
                del stored[old]
        self.pending.append(m.Progress(generation, step, 1.0))

    def flush(self, index: int) -> None:
        """The newest step of the running generation becomes whole in storage."""
        if self.complete(self.core.generation):
            process = self.processes[self.members[0]]
            self.storage[process.step] = (self.core.generation, process.lineage)
            self.pending.append(m.SnapshotFlushed(self.core.generation, process.step))

    def partial_step(self, index: int) -> None:
        """One rank dies after the vote: some apply the update, some do not, nobody has snapshotted."""
        generation = max((p.group or 0 for p in self.processes.values()), default=0)
        if self.complete(generation):
            for worker in self.members[: 1 + index % len(self.members)]:
                self.processes[worker].step += 1
                self.processes[worker].lineage = -1
            self.kill_worker(sorted(self.processes).index(self.members[index % len(self.members)]))

    def kill_worker(self, index: int) -> None:
        if self.processes:
            worker = sorted(self.processes)[index % len(self.processes)]
            del self.processes[worker]
            self.pending.append(m.WorkersLost((worker,), f"{worker} died"))

    def stop_worker(self, index: int) -> None:
        if self.processes:
            self.processes[sorted(self.processes)[index % len(self.processes)]].stopped = True

    def suspect(self, index: int) -> None:
        """The hang policy speaks: it names stopped processes only."""
        still = [worker for worker in self.members if worker in self.processes and self.processes[worker].stopped]
        if still:
            self.pending.append(m.Suspected(self.core.generation, still, "no progress"))

    def kill_node(self, index: int) -> None:
        if self.nodes:
            node = sorted(self.nodes)[index % len(self.nodes)]
            self.nodes.discard(node)
            self.memory.pop(node, None)
            self.processes = {w: p for w, p in self.processes.items() if p.node != node}
            self.pending.append(m.NodesLost((node,), f"{node} died"))

    def part_nodes(self, index: int) -> None:
        """The network between two nodes breaks, or every one is whole again."""
        nodes = sorted(self.nodes)
        if index % 3 == 0 or len(nodes) < 2:
            self.apart.clear()
        else:
            self.apart.add(frozenset((nodes[index % len(nodes)], nodes[(index + 1) % len(nodes)])))

    def add_node(self, index: int) -> None:
        """A name belongs to one life of a node, as Ray's node ids do; now and then a quarantined one is repaired."""
        self.added += 1
        self.nodes.add(f"m{self.added}")
        if index % 5 == 0 and self.core.roster.unfit:
            self.pending.append(m.NodesCleared(sorted(self.core.roster.unfit)[:1]))

    def drain_node(self, index: int) -> None:
        if self.nodes:
            node = sorted(self.nodes)[index % len(self.nodes)]
            self.pending.append(m.NodesDraining({node: self.now + index % 40}))

    def evict(self, index: int) -> None:
        if self.members:
            self.pending.append(m.Evict((self.members[index % len(self.members)],), WHY, unfit=index % 2 == 0))

    def roll_back(self, index: int) -> None:
        step = max(0, self.core.step - index % 2)
        guilty = self.members[:1] if index % 3 == 0 else ()
        self.pending.append(m.RollBack(self.core.generation, step, WHY, guilty))

    def repeat(self, index: int) -> None:
        """An old message comes once more, as from a retrying sender. Lost processes stay lost."""
        old = [event for event in self.old if not isinstance(event, m.NodesDraining | m.Evict | m.Inventory)]
        if old:
            self.tell(old[index % len(old)])

    def pass_time(self, index: int) -> None:
        self.now += 0.5 if index % 3 else 5.0
        self.tell(m.Tick())

    def restart_controller(self, index: int) -> None:
        """The old core is gone; messages under way reach the new one. Deaths that nobody heard of show as absence."""
        self.controllers += 1
        self.old.clear()
        self.pending = [e for e in self.pending if isinstance(e, m.Joined | m.AbortAcked | m.BoundaryReached)]
        prefix = f"c{self.controllers}-"
        self.core = StateMachine(self.elastic, prefix=prefix, joins=self.core.joins, adopting=True)
        self.tell(m.Tick())

    # ---- what must hold, always

    def check(self, generation_before: int) -> None:
        core, roster = self.core, self.core.roster
        assert core.generation >= generation_before
        groups = [roster.ordered, roster.standby, roster.joined, roster.aborted]
        assert len(set().union(*groups)) == sum(len(group) for group in groups), "a worker is in one state at a time"
        assert all(len(block) == self.elastic.block for block in core.blocks), "capacity is whole blocks"
        if core.phase == "running":
            seated = list(chain.from_iterable(core.blocks))
            assert roster.joined == set(seated) and len(seated) == len(roster.joined)
            assert self.elastic.min_workers <= len(seated) <= self.elastic.max_workers
            mine = [self.processes[w] for w in seated if w in self.processes and self.processes[w].lineage != -1]
            assert len({(p.step, p.lineage) for p in mine}) <= 1, "ranks of one generation hold different states"
        if core.phase in ("waiting", "failed"):
            assert core.reason
        if core.phase in ENDED:
            assert self.ended is not None and not roster.joined and core.next_deadline is None

    def settle(self) -> None:
        """From here on the platform is honest: everything is delivered, hangs are noticed, time goes on."""
        for _ in range(3000):
            if self.core.phase in ENDED:
                return
            if self.pending:
                self.deliver(0)
            elif self.core.phase == "running" and self.complete(self.core.generation):
                return
            elif self.core.phase == "running":
                dead = [worker for worker in self.members if worker not in self.processes]
                self.suspect(0)
                if dead:
                    self.pending.append(m.WorkersLost(dead, "found dead"))
                assert self.pending, "running, and nobody knows why there is no progress"
            else:
                deadline = self.core.next_deadline
                assert deadline is not None, f"{self.core.phase} with nothing to wait for"
                self.now = max(self.now + 0.01, deadline)
                self.tell(m.Tick())
        pytest.fail(f"still {self.core.phase} ({self.core.reason})")


ACTIONS: list[Callable[[World, int], None]] = [
    World.deliver, World.deliver, World.deliver, World.deliver_all, World.deliver_all, World.step, World.step,
    World.partial_step, World.flush, World.kill_worker, World.stop_worker, World.suspect, World.kill_node,
    World.part_nodes, World.add_node, World.drain_node, World.evict, World.roll_back, World.repeat, World.pass_time,
    World.restart_controller,
]  # fmt: skip

SHAPES = [
    ElasticSettings(min_workers=1, max_workers=3, max_faults_without_progress=4),
    ElasticSettings(min_workers=2, max_workers=6, tensor_parallel=2, spares=1, max_faults_without_progress=4),
    ElasticSettings(min_workers=4, max_workers=8, tensor_parallel=2, pipeline_parallel=2, quarantine_faults=2),
]
SHAPES = [shape.model_copy(update={"start_timeout_s": 20, "capacity_wait_s": 100}) for shape in SHAPES]


def running(shape: ElasticSettings, nodes: int, per_node: int) -> World:
    world = World(shape, per_node, nodes={f"n{i}" for i in range(nodes)})
    world.tell(m.Tick())
    world.settle()
    return world


@given(
    shape=st.sampled_from(SHAPES),
    nodes=st.integers(1, 4),
    faults=st.lists(st.tuples(st.integers(0, len(ACTIONS) - 1), st.integers(0, 50)), max_size=60),
    more=st.integers(0, 3),
)
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_fault_sequence_ends_running_or_failed_with_a_reason(
    shape: ElasticSettings, nodes: int, faults: list[tuple[int, int]], more: int
) -> None:
    """The invariants of `World.check` and `World.join` hold after every single message."""
    world = World(shape, 3, nodes={f"n{i}" for i in range(nodes)})
    world.tell(m.Tick())
    world.deliver_all(0)
    for action, index in faults:
        if world.core.phase in ENDED:
            break
        ACTIONS[action](world, index)
    for index in range(more):
        world.nodes.add(f"late{index}")
    world.settle()
    assert world.core.phase in ("running", "failed")
    if world.core.phase == "failed":
        assert world.ended is not None and not world.ended.succeeded and len(world.ended.decision.reason) > 10


@pytest.fixture
def world() -> World:
    """Four tp2 blocks and one spare on three nodes, running, two steps committed."""
    shape = ElasticSettings(min_workers=4, max_workers=8, tensor_parallel=2, spares=1)
    world = World(shape, 3, nodes={"n0", "n1", "n2"})
    world.tell(m.Tick())
    world.settle()
    for _ in range(2):
        world.step(0)
        world.deliver_all(0)
    return world


def test_a_spare_fills_the_hole_in_the_same_pause_and_one_partial_step_is_lost(world: World) -> None:
    before = world.core.blocks
    world.partial_step(3)  # ranks 0 to 3 applied step 3, rank 3 died
    world.settle()
    assert world.core.phase == "running" and world.core.generation == 2
    assert sum(old != new for old, new in zip(before, world.core.blocks, strict=True)) == 1
    assert {process.step for w, process in world.processes.items() if w in world.members} == {2}
    assert [d.action for d in world.reports[-2:]] == ["memory", "replace"] and world.reports[-1].key == "elastic.spares"
    assert len(world.core.roster.standby) == 1, "the spare was replaced in the background"


def test_without_room_it_shrinks_by_whole_blocks_and_grows_back_at_a_boundary(world: World) -> None:
    world.kill_node(2)
    world.settle()
    assert len(world.members) == 6 and world.core.blocks == tuple(
        block for block in world.core.blocks if len(block) == 2
    )
    step = world.core.step
    world.add_node(1)
    world.now += 10
    world.tell(m.Tick())
    world.settle()
    assert len(world.members) == 8
    assert world.core.step == step + 1, "nothing was lost: the boundary's own step counts"


def test_a_noticed_preemption_loses_no_step(world: World) -> None:
    world.now = 100
    world.tell(m.Progress(1, 2, 1.0))
    world.add_node(1)
    world.tell(m.NodesDraining({"n1": 130.0}))
    assert world.core.phase == "running" and world.reports[-1].action == "hold"
    world.deliver_all(0)
    world.settle()
    assert world.core.step == 3 and "n1" not in {world.core.roster.node_of[worker] for worker in world.members}
    assert not [d for d in world.reports if d.action in ("memory", "shrink")]


def test_a_fault_while_recovering_starts_the_next_generation(world: World) -> None:
    world.kill_worker(0)
    while world.core.phase != "forming":
        world.deliver(0)
    world.kill_worker(1)
    world.settle()
    assert world.core.generation == 3 and world.core.phase == "running" and world.core.high_step == 2


def test_a_restarted_controller_adopts_the_running_group_untouched(world: World) -> None:
    members, generation = world.members, world.core.generation
    world.restart_controller(0)
    world.settle()
    assert (world.members, world.core.generation) == (members, generation)
    assert world.core.roster.joined == set(members) and world.core.step == 2 and world.core.book.snapshots[2].whole
    assert any(d.action == "adopt" for d in world.reports)


def test_messages_of_an_older_generation_are_dropped(world: World) -> None:
    world.kill_worker(0)
    world.settle()
    for stale in (
        m.Joined(1, world.members),
        m.AbortAcked(1, world.members),
        m.Suspected(1, world.members, "late"),
        m.Progress(1, 99, 1.0),
        m.BoundaryReached(1, 99, world.members),
        m.RollBack(1, 0, WHY),
        m.SnapshotHeld(1, 99, 8, {"n0": set(range(8))}),
        m.Finished(1, 99),
    ):
        world.tell(stale)
    assert world.core.phase == "running" and world.core.generation == 2 and world.core.step == 2


def test_a_stopped_rank_is_killed_when_it_does_not_acknowledge(world: World) -> None:
    stuck = world.members[5]
    world.processes[stuck].stopped = True
    world.kill_worker(0)
    world.settle()
    assert world.core.worker(stuck).state == "gone" and stuck not in world.processes
    assert [d.key for d in world.reports if d.action == "kill"] == ["elastic.abort_timeout_s"]


def test_rolling_back_takes_the_asked_step_and_quarantines_the_guilty_node() -> None:
    shape = ElasticSettings(min_workers=1, max_workers=3)
    world = World(shape, 1, nodes={"n0", "n1", "n2", "n3"})
    world.tell(m.Tick())
    world.settle()
    for _ in range(3):
        world.step(0)
        world.deliver_all(0)
    guilty = world.members[1]
    world.tell(m.RollBack(1, 2, Decision("roll-back", "digests disagree", "elastic.snapshot_replicas"), (guilty,)))
    world.settle()
    assert world.core.joins[2] == 2 and world.core.roster.unfit == {"n1"}
    assert guilty not in world.processes and len(world.core.roster.joined) >= 2


def test_a_run_that_cannot_progress_fails_and_says_why() -> None:
    shape = ElasticSettings(min_workers=1, max_workers=2, spares=2, max_faults_without_progress=3)
    world = World(shape, 4, nodes={"n0"})
    world.tell(m.Tick())
    world.settle()
    for _ in range(20):
        if world.core.phase in ENDED:
            break
        world.kill_worker(sorted(world.processes).index(world.members[0]))
        world.settle()
    assert world.ended is not None and world.ended.decision.key == "elastic.max_faults_without_progress"
    assert "fault 4 without a new committed step" in world.ended.decision.reason


def test_machines_without_a_way_to_each_other_stand_aside_unblamed_and_are_tried_again() -> None:
    shape = ElasticSettings(min_workers=1, max_workers=3, quarantine_faults=1, max_faults_without_progress=0)
    world = World(shape, 1, nodes={"n0", "n1", "n2"}, apart={frozenset({"n0", "n1"})})
    world.tell(m.Tick())
    world.settle()
    core = world.core
    assert core.phase == "running" and len(world.members) == 2 and core.roster.aside.keys() == {"n1"}
    assert [d.key for d in world.reports if d.action == "stand-aside"] == ["elastic.respawn_backoff_s"]
    world.now += 10
    world.tell(m.Tick())
    world.deliver_all(0)
    world.settle()
    assert len(world.members) == 2 and core.roster.aside["n1"] >= world.now + 19, "still apart: more seldom"
    world.apart.clear()
    world.now += 20
    world.tell(m.Tick())
    world.settle()
    assert len(world.members) == 3 and not core.roster.unfit and not core.faults_without_progress
    assert len(world.processes) == 3, "who stood aside was kept warm"


def test_machines_that_never_reach_each_other_end_a_run_that_needs_them_with_the_reason() -> None:
    shape = ElasticSettings(min_workers=2, max_workers=2, capacity_wait_s=100)
    world = World(shape, 1, nodes={"n0", "n1"}, apart={frozenset({"n0", "n1"})})
    world.tell(m.Tick())
    world.settle()
    assert world.core.phase == "failed" and 100 <= world.now < 200
    assert world.core.reason == "no connection from n0 to n1: 2 ranks after 100 s of waiting, 2 needed"


def test_a_lost_node_that_comes_back_is_used_again_without_a_stain() -> None:
    shape = ElasticSettings(min_workers=1, max_workers=2, quarantine_faults=1)
    world = World(shape, 1, nodes={"n0", "n1"})
    world.tell(m.Tick())
    world.settle()
    world.kill_node(1)
    world.deliver_all(0)
    stale = sorted(world.core.roster.ordered)
    world.nodes.add("n1")
    world.tell(m.NodesCleared(["n1"]))
    world.now += 10
    world.tell(m.Tick())
    world.settle()
    assert len(world.members) == 2 and not world.core.roster.unfit
    assert not set(stale) & world.core.roster.ordered, "what was told to avoid it is ordered again"


def test_too_few_nodes_wait_and_then_fail_with_the_numbers() -> None:
    world = World(
        ElasticSettings(min_workers=4, max_workers=4, capacity_wait_s=50, start_timeout_s=10), 3, nodes={"n0"}
    )
    world.tell(m.Tick())
    world.settle()
    assert world.core.phase == "failed"
    assert world.core.reason == "start: 3 ranks after 50 s of waiting, 4 needed"
