"""Process groups that are aborted, left and formed again, by real processes over a store that none of them hosts."""

import gc
import json
import os
import pickle
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from engines.collectives import process_groups
from engines.collectives.process_groups import (
    ProcessGroups,
    Rendezvous,
    StoreAddress,
    host_store,
    meet_peers,
    open_sockets,
)
from engines.collectives.ranks import Ranks
from infra.addresses import listen
from infra.errors import NodeLost, PeersUnreachable
from tests.helpers.forks import FORKS, METHOD

CYCLES = 100
DEADLINE = 60.0


def leaks() -> tuple[int, int, int]:
    return len(open_sockets()), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def all_reduce(value: float) -> float:
    tensor = torch.tensor(value)
    dist.all_reduce(tensor)
    return float(tensor)


def cycle(generation: int, rank: int, rendezvous: Rendezvous) -> None:
    """Worlds of 4 (dp2 x tp2) and 3; in every other pair of generations the ranks above 0 wait for a silent rank 0."""
    world_size = 4 if generation % 2 == 0 else 3
    if rank >= world_size:
        return
    groups = ProcessGroups(generation, rank, world_size, rendezvous)
    ranks = groups.form(lambda: Ranks.over_all(2 if world_size == 4 else 1))
    assert ranks.mesh is not None and ranks.data_size == (2 if world_size == 4 else 3)
    assert all_reduce(1.0) == world_size
    if generation % 4 < 2 and rank > 0:
        control = threading.Timer(0.005, groups.abort)
        control.start()
        with pytest.raises(NodeLost, match=rf"rank {rank} of {world_size}, generation {generation}"):  # noqa: SIM117
            with groups.naming_lost_peers():
                all_reduce(1.0)
        control.join()
    elif generation % 4 >= 2:
        ranks.barrier()
    groups.leave()


def cycles(rank: int, address: StoreAddress) -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    rendezvous = Rendezvous(address)
    for generation in range(8):
        cycle(generation, rank, rendezvous)
    before = leaks()
    for generation in range(8, CYCLES + 8):
        cycle(generation, rank, rendezvous)
    after = leaks()
    assert all(now <= then + 2 for now, then in zip(after, before, strict=True)), (before, after)


def test_a_hundred_generations_in_one_process_leak_nothing() -> None:
    store, address = host_store()
    mp.start_processes(cycles, (address,), nprocs=4, start_method=METHOD)
    del store


def test_abort_leaves_foreign_connections_and_listeners_alone() -> None:
    """One that was opened while the groups were formed included."""
    listener = socket.create_server(("127.0.0.1", 0))

    def build() -> tuple[socket.socket, socket.socket]:
        dist.new_group([0])
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]

    store, address = host_store()
    groups = ProcessGroups(0, 0, 1, Rendezvous(address))
    with listener:
        client, server = groups.form(build)
        with client, server:
            assert groups.abort()
            client.sendall(b"still here")
            assert server.recv(10) == b"still here"
            socket.create_connection(listener.getsockname()).close()
    with pytest.raises(NodeLost):
        groups.form(build)
    groups.leave()
    del store


def never_answered(rank: int, address: StoreAddress, found: Any) -> None:
    """Rank 1 of 2 forms alone; its peer never comes."""
    rendezvous = Rendezvous(address)
    groups = ProcessGroups(3, 1, 2, rendezvous, form_timeout_s=600)
    threading.Timer(0.3, groups.abort).start()
    started = time.monotonic()
    with pytest.raises(NodeLost, match="was aborted"):
        groups.form(lambda: Ranks.over_all())
    groups.leave()
    again = ProcessGroups(4, 0, 1, rendezvous)  # and this process goes on alone
    again.form(lambda: Ranks.over_all())
    assert all_reduce(2.0) == 2.0
    again.leave()
    found.put(time.monotonic() - started)


def test_abort_wakes_a_rank_that_waits_for_a_peer_to_come() -> None:
    store, address = host_store()
    found = FORKS.SimpleQueue()
    mp.start_processes(never_answered, (address, found), nprocs=1, start_method=METHOD)
    assert found.get() < DEADLINE, "it waited for the forming to time out instead"
    del store


def sends_to_a_silent_peer(rank: int, address: StoreAddress, ended: Any) -> None:
    """Rank 0's data is being written when the connection goes: gloo itself would sleep until its timeout."""
    torch.set_num_threads(1)
    groups = ProcessGroups(0, rank, 2, Rendezvous(address), timeout_s=600)
    groups.form(lambda: None)
    data = torch.zeros(1 << 24)
    if rank:
        announced = dist.irecv(data, 0)
        signal.raise_signal(signal.SIGSTOP)
        del announced
    control = threading.Timer(0.5, lambda: ended.put(groups.abort(DEADLINE)))
    control.start()
    with pytest.raises(NodeLost), groups.naming_lost_peers():
        dist.send(data, 1)
    control.join()
    groups.leave()
    ended.put(True)
    ended.close()
    ended.join_thread()


def test_abort_wakes_a_rank_in_the_middle_of_a_write() -> None:
    store, address = host_store()
    ended = FORKS.Queue()
    ranks = [FORKS.Process(target=sends_to_a_silent_peer, args=(rank, address, ended)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        assert ended.get(timeout=DEADLINE) and ended.get(timeout=DEADLINE)
        ranks[0].join(DEADLINE)
        assert ranks[0].exitcode == 0
    finally:
        for process in ranks:
            process.kill()
            process.join()
    del store


def test_a_missing_store_and_a_missing_peer_are_named() -> None:
    store, address = host_store()
    with pytest.raises(NodeLost, match="rank 0 of 2, generation 7, lost a peer"):
        ProcessGroups(7, 0, 2, Rendezvous(address), form_timeout_s=0.5).form(lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(NodeLost, match="lost a peer"):
        ProcessGroups(8, 0, 2, Rendezvous(StoreAddress("127.0.0.1", port), timeout_s=0.5)).form(lambda: None)
    assert not dist.is_initialized()
    del store


def test_ranks_of_two_machines_try_the_way_to_each_other_before_they_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback stands for a network here."""
    monkeypatch.setattr(process_groups, "is_loopback", lambda address: False)
    store = dist.HashStore()
    places = ["127.0.0.1", "127.0.0.2", "127.0.0.1"]
    with ThreadPoolExecutor(3) as ranks:
        for met in [ranks.submit(meet_peers, store, rank, 3, place, place) for rank, place in enumerate(places)]:
            met.result(DEADLINE)


def test_machines_without_a_way_to_each_other_are_named_with_both_addresses_and_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_groups, "is_loopback", lambda address: False)
    monkeypatch.setattr(process_groups, "MEET_S", 0.1)
    store = dist.HashStore()
    with listen("127.0.0.2") as closed:
        store.set("door/1", json.dumps(["10.0.0.5", 1, *closed.getsockname()]))
    store.set("missing/1", json.dumps([[1, 0, "10.0.0.5 to 127.0.0.1: no answer"]]))
    with pytest.raises(PeersUnreachable, match="GLOO_SOCKET_IFNAME") as caught:
        meet_peers(store, 0, 2, "127.0.0.1", "127.0.0.1")
    assert caught.value.ways == ((0, 1), (1, 0))
    said = "127.0.0.1 to 10.0.0.5 (at 127.0.0.2): Connection refused; 10.0.0.5 to 127.0.0.1: no answer"
    assert said in str(caught.value) == str(pickle.loads(pickle.dumps(caught.value)))


def test_machines_that_listen_on_loopback_are_told_so() -> None:
    """Each would connect to itself."""
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as ranks:
        for met in [ranks.submit(meet_peers, store, rank, 2, f"10.0.0.{rank}", "127.0.0.1") for rank in range(2)]:
            with pytest.raises(
                PeersUnreachable, match=r"10\.0\.0\.0 to 10\.0\.0\.1 \(at 127\.0\.0\.1\): that is loopback"
            ):
                met.result(DEADLINE)


def test_a_rank_without_a_way_to_where_all_meet_says_so_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_groups, "MEET_S", 0.1)
    with listen("127.0.0.1") as closed:
        port = closed.getsockname()[1]
    groups = ProcessGroups(7, 1, 2, Rendezvous(StoreAddress("127.0.0.1", port)), address="127.0.0.1")
    with pytest.raises(PeersUnreachable, match=f"127.0.0.1 to 127.0.0.1:{port}, where ranks meet: Conn") as caught:
        groups.form(lambda: None)
    assert caught.value.ways == ((1, 1),)
    groups.leave()


def test_groups_are_formed_over_the_interface_of_the_address_given() -> None:
    """Whatever the host's name resolves to."""
    _host, address = host_store()
    groups = ProcessGroups(0, 0, 1, Rendezvous(address), address="127.0.0.1")
    groups.form(lambda: None)
    assert {entry.local[0] for entry in open_sockets() if entry.listens and entry.local[1] != address.port} <= {
        "127.0.0.1"
    }
    groups.leave()
