"""Snapshots of one process: what is sealed is right, what is damaged or half written is refused; replicas, stores."""

import contextlib
import errno
import os
import random
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from engines.snapshots import (
    Flusher,
    FolderSource,
    Peer,
    Piece,
    ReplicaServer,
    ShardName,
    SnapshotName,
    Snapshots,
    Sources,
    StoreSource,
    forget,
    node_folder,
    open_shard,
    restore,
    sealed,
)
from engines.snapshots.dcp import DcpReader
from engines.snapshots.flush import upload
from infra.errors import CheckpointError, ResourceError, StoreError
from infra.storage import FolderStore, open_store
from tests.helpers.forks import FORKS

DEADLINE = 60.0
ROWS = 12


@pytest.fixture
def shared() -> Iterator[Path]:
    """A place in shared memory of this test's own."""
    folder = Path("/dev/shm") / f"recua-test-{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def whole(step: int) -> dict[str, torch.Tensor]:
    """The state after `step` steps: content that differs everywhere."""
    generator = torch.Generator().manual_seed(step)
    return {
        "matrix": torch.randn(ROWS, 5, generator=generator),
        "half": torch.randn(ROWS, generator=generator).bfloat16(),
        "scalar": torch.tensor(float(step)),
    }


def pieces(step: int, rank: int = 0, world_size: int = 1) -> list[Piece]:
    """Rank `rank`'s rows; the scalar is on every rank; a rank may have no rows."""
    found = []
    for name, tensor in whole(step).items():
        if not tensor.dim():
            found.append(Piece.whole(name, tensor))
            continue
        start, stop = ROWS * rank // world_size, ROWS * (rank + 1) // world_size
        offsets = (start,) + (0,) * (tensor.dim() - 1)
        found.append(Piece(name, tensor[start:stop].clone(), tuple(tensor.shape), offsets))
    return found


def take(folder: Path, step: int, rank: int, world_size: int, generation: int = 0, **options: Any) -> Snapshots:
    snapshots = Snapshots(folder, "run", generation, rank, world_size, **options)
    snapshots.take(step, pieces(step, rank, world_size), {"step": step})
    snapshots.settle()
    return snapshots


def take_all(folder: Path, step: int, world_size: int, generation: int = 0) -> None:
    for rank in range(world_size):
        take(folder, step, rank, world_size, generation).close()


def read(*sources: Any, rank: int = 0, world_size: int = 1) -> tuple[SnapshotName, list[Piece]]:
    """The newest snapshot, as a rank of another mesh has it."""
    available = Sources(sources)
    targets = [
        Piece(p.name, torch.full_like(p.tensor, -1), p.global_shape, p.offsets) for p in pieces(0, rank, world_size)
    ]
    for snapshot in available.snapshots():
        with contextlib.suppress(CheckpointError):
            restore(targets, available.reader(snapshot))
            return snapshot, targets
    raise CheckpointError("; ".join(available.refused) or "none")


def assert_is(targets: list[Piece], step: int, rank: int = 0, world_size: int = 1) -> None:
    for found, expected in zip(targets, pieces(step, rank, world_size), strict=True):
        assert torch.equal(found.tensor, expected.tensor), found.name


def test_any_mesh_reads_what_another_wrote(shared: Path) -> None:
    for writers in (1, 3, 5):
        folder = shared / str(writers)
        take_all(folder, 4, writers)
        for readers in (1, 2, 7):
            for rank in range(readers):
                snapshot, targets = read(FolderSource(folder), rank=rank, world_size=readers)
                assert snapshot == SnapshotName(0, 4)
                assert_is(targets, 4, rank, readers)


def test_torchs_own_loader_reads_it(shared: Path) -> None:
    take_all(shared, 4, 3)
    available = Sources([FolderSource(shared)])
    state = {name: torch.zeros_like(tensor) for name, tensor in whole(0).items()}
    dcp.load(state, storage_reader=DcpReader(available.reader(SnapshotName(0, 4))), no_dist=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in whole(4).items())


def test_the_newest_whole_snapshot_of_the_newest_generation_counts(shared: Path) -> None:
    for step in (3, 4):
        take_all(shared, step, 2)
    take(shared, 5, 0, 2).close()  # rank 1 never sealed its part of step 5
    assert read(FolderSource(shared))[0] == SnapshotName(0, 4)
    take_all(shared, 2, 1, generation=1)  # a roll-back to step 2
    assert read(FolderSource(shared))[0] == SnapshotName(1, 2)
    forget(shared, before=1)
    assert {name.generation for name in sealed(shared)} == {1}


def test_a_replicated_tensor_needs_one_survivor(shared: Path) -> None:
    replicated = [Piece.whole(name, tensor) for name, tensor in whole(6).items()]
    for rank in range(3):
        snapshots = Snapshots(shared, "run", 0, rank, 3)
        snapshots.take(6, replicated, {})
        snapshots.settle()
        snapshots.close()
    for rank in (0, 2):
        (shared / str(ShardName(0, 6, rank, 3))).unlink()
    assert_is(read(FolderSource(shared))[1], 6)


def test_memory_is_recycled_and_two_snapshots_stay_whole(shared: Path) -> None:
    snapshots = Snapshots(shared, "run", 0, 0, 1, keep=2, every=2)
    for step in range(12):
        assert snapshots.take(step, pieces(step), {"step": step}) == (step % 2 == 0)
        snapshots.settle()
        assert len(list(shared.iterdir())) <= 3
    assert [name.step for name in sealed(shared)] == [6, 8, 10]
    with snapshots.reading(6) as held:
        for step in (12, 14):
            snapshots.take(step, pieces(step), {})
            snapshots.settle()
        assert held is not None and open_shard(held).step == 6, "recycled under a reader"
    with snapshots.reading(8) as gone:
        assert gone is None
    assert snapshots.last is not None and snapshots.last.step == 14
    snapshots.close(remove=True)
    assert not list(shared.iterdir())


def test_a_step_that_is_taken_again_has_one_file(shared: Path) -> None:
    snapshots = Snapshots(shared, "run", 0, 0, 1, keep=2)
    for step in (0, 1, 1, 2, 2, 3, 4, 5):
        assert snapshots.take(step, pieces(step), {"step": step})
        snapshots.settle()
    assert [open_shard(shared / str(name)).step for name in sealed(shared)] == [3, 4, 5]
    snapshots.close(remove=True)


def test_full_memory_is_an_error_where_training_waits(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    snapshots = Snapshots(shared, "run", 0, 0, 1)
    monkeypatch.setattr(os, "posix_fallocate", full)
    snapshots.take(0, pieces(0), {})
    with pytest.raises(ResourceError, match=r"snapshots\.keep"):
        snapshots.settle()
    monkeypatch.undo()
    snapshots.take(1, pieces(1), {})
    assert snapshots.settle() is not None
    snapshots.close()


def test_no_cut_and_no_flipped_bit_loads_wrongly(shared: Path) -> None:
    """Refused, or (in padding) as it was."""
    take(shared, 3, 0, 1).close()
    path = shared / str(ShardName(0, 3, 0, 1))
    content = path.read_bytes()
    generator = random.Random(0)
    used = [*range(64), *range(64, 600, 7), *range(len(content) - 400, len(content), 3)]
    used += [generator.randrange(len(content)) for _ in range(300)]
    refused = 0
    for position in used:
        damaged = bytearray(content)
        damaged[position] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            assert_is(read(FolderSource(shared))[1], 3)
        except CheckpointError:
            refused += 1
    assert refused > 200
    for length in [0, 1, 63, 64, *(generator.randrange(len(content)) for _ in range(100)), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read(FolderSource(shared))
    path.write_bytes(content)
    assert_is(read(FolderSource(shared))[1], 3)


def snapshot_forever(folder: Path, started: Any) -> None:
    snapshots = Snapshots(folder, "run", 0, 0, 1)
    step = 0
    while True:
        big = torch.full((1 << 18,), float(step))
        snapshots.take(step, [*pieces(step), Piece.whole("big", big)], {"step": step})
        snapshots.settle()
        if step == 3:
            started.set()
        step += 1


def test_killed_at_any_moment_it_leaves_the_newest_two_whole(shared: Path) -> None:
    generator = random.Random(1)
    for attempt in range(8):
        folder, started = shared / str(attempt), FORKS.Event()
        process = FORKS.Process(target=snapshot_forever, args=(folder, started))
        process.start()
        try:
            assert started.wait(DEADLINE)
            time.sleep(generator.random() * 0.02)  # where in a snapshot it is hit
        finally:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        names = sealed(folder)
        assert len(names) in (2, 3)
        for name in names:
            shard = open_shard(folder / str(name))
            big = next(part for part in shard.layout.parts if part.name == "big")
            assert torch.equal(shard.tensor(big), torch.full((1 << 18,), float(name.step)))
            assert shard.progress == {"step": name.step}
        assert names[-1].step - names[0].step == len(names) - 1


# ---- replicas ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(shared: Path) -> Iterator[ReplicaServer]:
    with ReplicaServer("secret", root=shared / "other") as server:
        yield server


def peer_of(server: ReplicaServer, token: str = "secret") -> Peer:
    return Peer(server.host, server.port, token, "run", timeout_s=DEADLINE)


def test_a_lost_nodes_shard_comes_from_its_replica(shared: Path, server: ReplicaServer) -> None:
    own = shared / "own"
    for rank in range(2):
        snapshots = Snapshots(own, "run", 0, rank, 2, holders=[peer_of(server)] if rank else [])
        for step in range(5):
            snapshots.take(step, pieces(step, rank, 2), {})
            acknowledged = snapshots.settle()
            assert acknowledged is not None and not acknowledged.problems
        snapshots.close()
    held = sealed(node_folder("run", shared / "other"))
    assert [name.step for name in held] == [2, 3, 4] and {name.rank for name in held} == {1}
    for name in sealed(own):
        if name.rank == 1:
            (own / str(name)).unlink()  # the node is gone
    with pytest.raises(CheckpointError):
        read(FolderSource(own))
    snapshot, targets = read(FolderSource(own), peer_of(server))
    assert snapshot.step == 4
    assert_is(targets, 4)


def test_a_corrupted_replica_is_refused_and_the_next_one_taken(shared: Path, server: ReplicaServer) -> None:
    with ReplicaServer("secret", root=shared / "third") as third:
        take(shared / "own", 4, 0, 1, holders=[peer_of(server), peer_of(third)]).close()
        (shared / "own" / str(ShardName(0, 4, 0, 1))).unlink()
        replica = node_folder("run", shared / "other") / str(ShardName(0, 4, 0, 1))
        content = bytearray(replica.read_bytes())
        content[len(content) // 2] ^= 4
        with pytest.raises(CheckpointError):
            replica.write_bytes(content[: len(content) // 2])
            read(peer_of(server))
        data = content.index(whole(4)["matrix"].numpy().tobytes()[:16])
        content = bytearray(content)
        content[data] ^= 4
        replica.write_bytes(content)
        available = Sources([peer_of(server), peer_of(third)])
        targets = [Piece.whole(name, torch.zeros_like(tensor)) for name, tensor in whole(0).items()]
        restore(targets, available.reader(SnapshotName(0, 4)))
        assert_is(targets, 4)
        assert any("damaged" in line and str(server.port) in line for line in available.refused)


def test_what_arrives_damaged_or_not_at_all_is_not_kept(shared: Path, server: ReplicaServer) -> None:
    take(shared / "own", 4, 0, 1).close()
    path = shared / "own" / str(ShardName(0, 4, 0, 1))
    content = path.read_bytes()
    damaged = shared / "damaged"
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        peer_of(server).put(ShardName(0, 4, 0, 1), damaged)
    with pytest.raises(CheckpointError, match="is generation-00000"):
        peer_of(server).put(ShardName(0, 5, 0, 1), path)
    with pytest.raises(StoreError, match="wrong token"):
        peer_of(server, "guess").put(ShardName(0, 4, 0, 1), path)
    for run in ("../run", "", "a/b"):
        with pytest.raises(StoreError, match="not a run"):
            Peer(server.host, server.port, "secret", run).names()
    with socket.create_connection((server.host, server.port)) as half:  # a sender that dies in the middle
        request = f'{{"token": "secret", "op": "put", "run": "run", "name": "{path.name}", "bytes": {len(content)}}}\n'
        half.sendall(request.encode() + content[: len(content) // 2])
        half.shutdown(socket.SHUT_WR)
        assert b"error" in half.recv(1000)
    assert peer_of(server).names() == []
    assert not list(node_folder("run", shared / "other").iterdir())
    peer = peer_of(server)
    peer.put(ShardName(0, 4, 0, 1), path)
    assert peer.names() == [ShardName(0, 4, 0, 1)] and peer.layout(ShardName(0, 4, 0, 1)).world_size == 1


def test_a_silent_holder_is_cut_and_reported(shared: Path) -> None:
    """A node that takes connections and says nothing: `cut` from the control thread ends the wait."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        peer = Peer("127.0.0.1", silent.getsockname()[1], "secret", "run", timeout_s=600)
        snapshots = Snapshots(shared, "run", 0, 0, 1, holders=[peer])
        snapshots.take(0, pieces(0), {})
        accepted = silent.accept()[0]  # it is in `put` now
        threading.Timer(0.05, snapshots.cut).start()
        acknowledged = snapshots.settle()
        assert (
            acknowledged is not None
            and len(acknowledged.problems) == 1
            and "peer 127.0.0.1" in acknowledged.problems[0]
        )
        snapshots.close()
        accepted.close()


# ---- the store ---------------------------------------------------------------------------------------------------


def flush_all(store: Any, folder: Path, step: int, world_size: int, keep: int = 2) -> None:
    for rank in range(world_size):
        upload(store, "run", folder / str(ShardName(0, step, rank, world_size)), keep)


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_flushed_snapshots_come_back_from_a_store(
    kind: str, shared: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = open_store(tmp_path / "store" if kind == "folder" else request.getfixturevalue("s3_url"))
    source = StoreSource(store, "run", tmp_path / "scratch")
    for step in (2, 4, 6):
        take_all(shared, step, 2)
        upload(store, "run", shared / str(ShardName(0, step, 1, 2)), 2)
        assert step not in {name.step for name in source.names()}, "visible before it is complete"
        upload(store, "run", shared / str(ShardName(0, step, 0, 2)), 2)
    source = StoreSource(store, "run", tmp_path / "scratch")
    assert {name.step for name in source.names()} == {4, 6}
    assert not [key for key in store.list("snapshots/run") if "0000000002" in key]
    snapshot, targets = read(source, rank=2, world_size=3)
    assert snapshot.step == 6
    assert_is(targets, 6, 2, 3)


class Crashing:
    """A store that stops in the middle of operation number `at`, as a killed process does."""

    def __init__(self, store: FolderStore, at: int) -> None:
        self.store, self.left, self.url = store, at, store.url

    def __getattr__(self, name: str) -> Callable[..., Any]:
        self.left -= 1
        if self.left < 0:
            raise StoreError("killed here")
        return getattr(self.store, name)


def test_a_flush_that_is_cut_off_anywhere_changes_nothing_that_is_read(shared: Path, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        take_all(shared, step, 2)
    finished, at = False, 0
    while not finished:
        store = FolderStore(tmp_path / f"store-{at}")
        for step in (1, 2):
            flush_all(store, shared, step, 2)
        upload(store, "run", shared / str(ShardName(0, 3, 0, 2)), 2)
        crashing = Crashing(store, at)
        try:
            upload(crashing, "run", shared / str(ShardName(0, 3, 1, 2)), 2)  # type: ignore[arg-type]
            finished = True
        except StoreError:
            pass
        snapshot, targets = read(StoreSource(store, "run", tmp_path / "scratch"))
        assert_is(targets, snapshot.step)
        assert snapshot.step in ((3,) if finished else (2, 3))
        flush_all(store, shared, 3, 2)  # tried again
        assert {name.step for name in StoreSource(store, "run", tmp_path).names()} == {2, 3}
        at += 1
    assert at > 6


def test_a_damaged_object_gives_way_to_the_snapshot_before(shared: Path, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    for step in (1, 2):
        take_all(shared, step, 2)
        flush_all(store, shared, step, 2)
    victim = next(key for key in store.list("snapshots/run") if key.endswith(str(ShardName(0, 2, 1, 2))))
    path = store.local_path(victim)
    assert path is not None
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    snapshot, targets = read(StoreSource(store, "run", tmp_path / "scratch"))
    assert snapshot.step == 1
    assert_is(targets, 1)


def test_the_flusher_works_beside_the_snapshots(shared: Path, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    snapshots = Snapshots(shared, "run", 0, 0, 1)
    flusher = Flusher(store, "run", snapshots.reading)
    for step in range(6):
        snapshots.take(step, pieces(step), {})
        snapshots.settle()
        if step % 2:
            assert flusher.offer(step) and flusher.wait(DEADLINE)
    assert flusher.flushed == [1, 3, 5] and not flusher.problems
    snapshots.close(remove=True)
    flusher.offer(0)  # gone from memory
    assert flusher.wait(DEADLINE) and flusher.flushed == [1, 3, 5]
    flusher.close()
    assert_is(read(StoreSource(store, "run", tmp_path))[1], 5)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_rank_that_holds_all_of_the_state_reads_its_own_copy_alone_unless_it_is_damaged(
    shared: Path, damaged: bool
) -> None:
    state = [Piece.whole(name, torch.randn(3, 5)) for name in ("a", "b")]
    for rank in range(3):
        snapshots = Snapshots(shared, "run", 1, rank, 3)
        snapshots.take(7, state, {"of": rank})
        snapshots.settle()
        snapshots.close()
    if damaged:
        path = shared / str(ShardName(1, 7, 1, 3))
        content = bytearray(path.read_bytes())
        content[content.index(state[0].tensor.numpy().tobytes())] ^= 1
        path.write_bytes(content)
    opened: list[str] = []

    class Watched(FolderSource):
        def open(self, name: ShardName, *_: Any) -> Any:
            opened.append(str(name.rank))
            return super().open(name)

    targets = [Piece.whole(piece.name, torch.zeros(3, 5)) for piece in state]
    reader = Sources([Watched(shared)]).reader(SnapshotName(1, 7), rank=1)
    restore(targets, reader)
    assert all(torch.equal(one.tensor, other.tensor) for one, other in zip(targets, state, strict=True))
    assert opened == (["1", "0"] if damaged else ["1"])
    assert reader.progress(1)["of_rank"] == (0 if damaged else 1)
