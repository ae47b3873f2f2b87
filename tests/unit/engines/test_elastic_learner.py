"""Ranks that lose others, in real processes: survivors go on in-process, and the loss curve is that of a quiet run."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engines.collectives.join_signs import JoinSigns
from engines.collectives.process_groups import Rendezvous, host_store
from engines.config import SnapshotSettings
from engines.elastic.learner import ElasticLearner, Recipe
from engines.snapshots import SnapshotName, StoreSource, node_folder, sealed
from infra.errors import NodeLost
from infra.storage import FolderStore
from tests.helpers.elastic_ranks import (
    DEADLINE,
    MODEL,
    SETTINGS,
    STEPS,
    consumed,
    finish,
    loader,
    losses,
    quiet_curve,
    quiet_run,
    running,
    shared_memory,
    take_step,
)


@pytest.fixture
def shared() -> Iterator[Path]:
    with shared_memory() as folder:
        yield folder


@pytest.mark.parametrize(("fsdp", "steps"), [(True, 14), (False, 106)], ids=["sharded", "a hundred steps"])
def test_shrunk_then_grown_it_stays_on_the_quiet_curve(fsdp: bool, steps: int, shared: Path) -> None:
    """4 ranks lose one in a collective, 3 go on, 5 after them; a window that was dropped before stays dropped."""
    skipped, grows_at = 6, steps // 2
    with running(6, Recipe(MODEL, SETTINGS, seed=3, fsdp=fsdp), "run", shared) as group:
        group.send([0, 1, 2, 3], generation=0, fresh=True, victim=1, at=3, skip=skipped, until=steps)
        said, died = group.lose([0, 1, 2, 3], victim=1, generation=0)
        group.send([2, 0, 3], generation=1, until=grows_at)
        shrunk = finish(group, [2, 0, 3])
        group.send([4, 2, 0, 3, 5], generation=2, until=steps)
        grown = finish(group, [4, 2, 0, 3, 5])
    print(f"pause {shrunk.first_step_at - died:.3f} s, {shrunk.joined}")
    assert shrunk.joined.step in (2, 3), "more than one committed step was lost"
    assert shrunk.joined.snapshot == SnapshotName(0, shrunk.joined.step)
    assert grown.joined.snapshot == SnapshotName(1, grows_at)
    curve = {**losses(said), **shrunk.losses, **grown.losses}
    assert sorted(curve) == list(range(steps))
    assert [curve[step] for step in range(steps)] == pytest.approx(quiet_curve(steps, [skipped]), rel=1e-4)
    samples = {**consumed(said), **shrunk.consumed, **grown.consumed}
    assert samples == {step: sorted(index for _, _, index in loader([skipped]).batch(step).tuples()) for step in curve}
    assert samples[skipped] != sorted(index for _, _, index in loader().batch(skipped).tuples())
    assert not [name for name in sealed(node_folder("run", shared)) if name.generation < 2], "old shards stay"


@pytest.mark.parametrize(
    ("recipe", "victims"),
    [
        (Recipe(MODEL, SETTINGS, seed=3), (2, 0)),
        (Recipe(MODEL, SETTINGS, seed=3, tensor_parallel=2), (3, 0)),
        (Recipe(MODEL, SETTINGS, seed=3, fsdp=False), (0, 1)),
        (Recipe(MODEL, SETTINGS, seed=3, pipeline_parallel=2), (3, 0)),
        (Recipe(MODEL, SETTINGS, seed=3, shard_over=2), (3, 0)),
    ],
    ids=["dp4", "dp2 x tp2", "replicas", "dp2 x pp2", "hsdp 2 x 2"],
)
def test_with_spares_the_curve_is_bitwise_that_of_a_quiet_run(
    recipe: Recipe, victims: tuple[int, int], shared: Path
) -> None:
    """Twice a rank is lost, and its place (in its tensor-parallel block) is taken by a process that was waiting."""
    quiet = quiet_run(recipe, 4, shared)
    members, curve = [0, 1, 2, 3], {}
    with running(6, recipe, "run", shared) as group:
        for generation, victim in enumerate(victims):
            at = 2 + 3 * generation
            group.send(members, generation=generation, fresh=generation == 0, victim=victim, at=at)
            said, _ = group.lose(members, members[victim], generation)
            curve |= losses(said)
            members = [*members]
            members[victim] = 4 + generation
        group.send(members, generation=2)
        last = finish(group, members)
    curve |= last.losses
    assert last.joined.snapshot is not None and last.joined.snapshot.generation == 1 and last.joined.step >= 4
    assert curve == quiet.losses
    assert all(torch.equal(last.weights[name], tensor) for name, tensor in quiet.weights.items())


def test_a_tensor_parallel_block_short_of_a_rank_is_left_out(shared: Path) -> None:
    """dp2 x tp2 loses a rank without a spare: the other block goes on alone."""
    recipe = Recipe(MODEL, SETTINGS, seed=3, tensor_parallel=2)
    with running(4, recipe, "run", shared) as group:
        group.send([0, 1, 2, 3], generation=0, fresh=True, victim=1, at=4)
        said, _ = group.lose([0, 1, 2, 3], victim=1, generation=0)
        group.send([2, 3], generation=1)
        after = finish(group, [2, 3])
    expected = quiet_curve()
    assert {**losses(said), **after.losses} == pytest.approx(dict(enumerate(expected)), rel=1e-4)


def test_a_fault_during_recovery_and_two_at_once(shared: Path) -> None:
    """The second rank dies while generation 1 is formed, which is given up; then two more die together."""
    with running(6, Recipe(MODEL, SETTINGS, seed=3), "run", shared) as group:
        group.send([0, 1, 2, 3, 4, 5], generation=0, fresh=True, victim=5, at=2, until=STEPS)
        group.lose([0, 1, 2, 3, 4, 5], victim=5, generation=0)
        os.kill(group.processes[4].pid, signal.SIGSTOP)  # it will not come
        group.send([0, 1, 2, 3, 4], generation=1)
        group.processes[4].kill()
        group.lose([0, 1, 2, 3, 4], victim=4, generation=1)
        group.send([3, 2, 1, 0], generation=2, victim=0, at=5)
        group.lose([3, 2, 1, 0], victim=3, generation=2)
        group.processes[2].kill()
        group.send([0, 1], generation=3)
        after = finish(group, [0, 1])
    assert after.joined.step in (4, 5)
    assert after.losses == pytest.approx(dict(list(enumerate(quiet_curve()))[after.joined.step :]), rel=1e-4)


def test_a_damaged_newest_snapshot_gives_way_to_the_one_before(shared: Path) -> None:
    recipe = Recipe(MODEL, SETTINGS, seed=3)
    with running(2, recipe, "run", shared) as group:
        group.send([0, 1], generation=0, fresh=True, until=5)
        finish(group, [0, 1])
        folder = node_folder("run", shared)
        assert [name.step for name in sealed(folder)][-2:] == [5, 5]
        newest = folder / str(sealed(folder)[-1])
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
        group.send([1, 0], generation=1)
        after = finish(group, [1, 0])
        assert after.joined.step == 4
        assert after.losses == pytest.approx(dict(list(enumerate(quiet_curve()))[4:]), rel=1e-4)
        group.send([0, 1], generation=2, at_most=STEPS - 1, until=STEPS)  # roll back on demand
        assert finish(group, [0, 1]).joined.step == STEPS - 1


def test_when_all_memory_is_lost_it_goes_on_from_the_store(shared: Path, tmp_path: Path) -> None:
    store, settings = FolderStore(tmp_path / "store"), SnapshotSettings(flush_every=2)
    host, address = host_store()
    recipe = Recipe(MODEL, SETTINGS, settings, fsdp=False, seed=3)
    first = ElasticLearner(recipe, "run", Rendezvous(address), shared=shared / "first", store=store)
    first.join(0, 0, 1, fresh=True)
    for _ in range(6):
        assert first.learner is not None and first.flusher is not None
        take_step(first.learner, first.train_step)
        assert first.flusher.wait(DEADLINE)
    first_weights = list(first.learner.export())
    assert first.flusher.flushed == [0, 2, 4] and not first.flusher.problems
    first.leave()
    stages, moves = list[str](), list[tuple[str, str]]()
    signs = JoinSigns(stages.append, lambda name: moves.append((stages[-1], name)))
    second = ElasticLearner(recipe, "run", Rendezvous(address), shared=shared / "second", store=store, signs=signs)
    joined = second.join(1, 0, 1, sources=[StoreSource(store, "run", tmp_path / "scratch")])
    assert stages == ["form"] * 3 + ["build", "load", "wait", "load", "wait", "load", "build"]
    assert ("load", "fetch") in moves and moves.count(("load", "load")) > len(first_weights), "piece by piece"
    assert joined.snapshot == SnapshotName(0, 4) and second.learner is not None
    curve = [take_step(second.learner, second.train_step)[0] for _ in range(STEPS - 4)]
    second.leave()
    assert curve == quiet_curve()[4:]
    del host


@pytest.mark.parametrize("backward", [False, True])
def test_a_rank_that_computes_hears_of_an_abort_at_the_next_block(backward: bool, shared: Path) -> None:
    _, address = host_store()
    elastic = ElasticLearner(Recipe(MODEL, SETTINGS, fsdp=False, seed=3), "run", Rendezvous(address), shared=shared)
    elastic.join(0, 0, 1, fresh=True)
    assert elastic.learner is not None
    module = elastic.learner.module

    def loss(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if not backward:
            elastic.abort(0)
        logits = module(batch["input_ids"])
        elastic.abort(0)
        return logits.sum(), {}

    with pytest.raises(NodeLost, match="was aborted"):
        elastic.train_step([{"input_ids": torch.zeros(1, 4, dtype=torch.long)}], loss)
    reached = {name for name, weight in module.named_parameters() if weight.grad is not None}
    assert not any(name.startswith("layers.") for name in reached) and bool(reached) == backward
    elastic.leave()
