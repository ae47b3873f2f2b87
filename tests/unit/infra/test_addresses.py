"""The one address that a machine's processes are reached at, and what libraries are told of it."""

import queue
import socket
from typing import Any

import pytest

from cluster.node.wire_speed import Sink
from engines.snapshots.replicas import ReplicaServer
from infra.addresses import (
    Interfaces,
    interface_of,
    interfaces,
    listen,
    sockets_at,
    unreachable,
    use_sockets_at,
    with_port,
)
from infra.errors import ConfigError
from serving.preflight import pick_ports
from workflows.worker.channel import Listener, Sender

KNOWN: Interfaces = {
    "lo": ("127.0.0.1", "::1"),
    "eth0": ("10.0.0.4", "10.0.0.44", "fe80::1%eth0"),
    "ib0": ("192.168.7.4", "fd00::4"),
    "docker0": (),
}


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.0.0.4", "eth0"),
        ("10.0.0.44", "eth0"),
        ("192.168.7.4", "ib0"),
        ("fd00::4", "ib0"),
        ("FD00:0::4", "ib0"),
        ("fe80::1", "eth0"),
        ("127.0.0.1", "lo"),
        ("127.0.1.1", "lo"),
        ("::1", "lo"),
        ("10.0.0.5", None),
    ],
)
def test_the_interface_that_owns_an_address_is_found_among_several(address: str, name: str | None) -> None:
    assert interface_of(address, KNOWN) == name


def test_libraries_are_told_that_interface_whatever_the_hosts_name_resolves_to() -> None:
    """Not a word of the name: on Debian it is 127.0.1.1's."""
    assert sockets_at("10.0.0.4", {}, KNOWN) == {
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "=eth0",
        "VLLM_HOST_IP": "10.0.0.4",
    }
    assert sockets_at("fd00::4", {}, KNOWN)["GLOO_SOCKET_IFNAME"] == "ib0"


def test_what_somebody_chose_on_the_machine_stays() -> None:
    chosen = {"GLOO_SOCKET_IFNAME": "ib0", "VLLM_HOST_IP": "192.168.7.4"}
    assert sockets_at("10.0.0.4", chosen, KNOWN) == {**chosen, "NCCL_SOCKET_IFNAME": "=ib0"}
    nccl = {"NCCL_SOCKET_IFNAME": "^docker"}
    assert sockets_at("10.0.0.4", nccl, KNOWN)["NCCL_SOCKET_IFNAME"] == "^docker"
    behind_nat = sockets_at("203.0.113.9", {"GLOO_SOCKET_IFNAME": "eth0"}, KNOWN)
    assert behind_nat["GLOO_SOCKET_IFNAME"] == "eth0"


@pytest.mark.parametrize(
    ("address", "environment", "said"),
    [
        ("203.0.113.9", {}, r"203\.0\.113\.9.* none of its interfaces \(lo 127.*eth0 10.*--node-ip-address.*GLOO_SOCK"),
        ("10.0.0.4", {"GLOO_SOCKET_IFNAME": "eth9"}, r"GLOO_SOCKET_IFNAME=eth9: .*10\.0\.0\.4 has no interface eth9"),
        ("10.0.0.4", {"GLOO_SOCKET_IFNAME": "eth0,eth9"}, "has no interface eth9"),
        ("some-host", {}, "some-host.* is not an IP address: .*--node-ip-address"),
    ],
)
def test_a_missing_interface_is_named_with_the_setting(address: str, environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sockets_at(address, environment, KNOWN)


def test_this_machine_has_loopback_and_a_process_can_be_bound_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP"):
        monkeypatch.delenv(name, raising=False)
    loopback = interface_of("127.0.0.1")
    assert loopback is not None and "127.0.0.1" in interfaces()[loopback]
    assert use_sockets_at("127.0.0.1") == "127.0.0.1"
    assert sockets_at("127.0.0.1")["GLOO_SOCKET_IFNAME"] == loopback


def test_who_cannot_be_reached_is_told_with_the_reason() -> None:
    with listen("127.0.0.1") as open_door:
        with listen("127.0.0.1") as closed:
            nobody = closed.getsockname()
        there = open_door.getsockname()
        assert unreachable([there, nobody], timeout_s=2) == {nobody: "Connection refused"}
        assert unreachable([], timeout_s=0.5) == {}
        assert unreachable([nobody], timeout_s=600, given_up=lambda: True), "nobody waits for the answer any more"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_ipv6_is_reached_as_well() -> None:
    try:
        door = listen("::1")
    except OSError:
        pytest.skip("no IPv6 on loopback here")
    with door:
        assert unreachable([door.getsockname()[:2]], timeout_s=5) == {}


def test_an_address_with_its_port_is_written_as_urls_have_it() -> None:
    assert [with_port(host, 80) for host in ("10.0.0.4", "fd00::4", "localhost")] == [
        "10.0.0.4:80",
        "[fd00::4]:80",
        "localhost:80",
    ]


@pytest.mark.skipif("::1" not in str(interfaces()), reason="this machine has no IPv6")
def test_what_listens_at_a_nodes_address_does_so_where_that_is_ipv6() -> None:
    told: queue.Queue[dict[str, Any]] = queue.Queue()
    channel, sink = Listener("::1", told.put), Sink("::1")
    try:
        Sender(channel.address).send({"kind": "log"})
        assert told.get(timeout=60) == {"kind": "log"}
        with ReplicaServer("token", host="::1") as replicas:
            for port in (sink.address.port, replicas.port):
                assert unreachable([("::1", port)], 60) == {}
    finally:
        channel.close()
        sink.close()
    assert all(pick_ports("::1", 0, 0))
