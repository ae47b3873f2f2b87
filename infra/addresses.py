"""The address at which other machines reach this one: one rule for all processes and libraries.

Processes give each other only one address, that of their node in Ray, which their parent passes down. Libraries that
open their own sockets would choose another one: gloo the one that the host's name resolves to (127.0.1.1 on Debian),
NCCL and vLLM by rules of their own. `sockets_at` makes them all use the interface that has the node's address.
"""

import contextlib
import errno
import ipaddress
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping

import psutil

from infra.errors import ConfigError

GLOO, NCCL, VLLM = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP"
AGAIN_S, LOOK_S = 0.1, 0.05
SILENT = "no answer"
Place = tuple[str, int]
"""Address and port."""
Interfaces = Mapping[str, tuple[str, ...]]
"""Name -> addresses, e.g. {"lo": ("127.0.0.1", "::1"), "eth0": ("10.0.0.4", "fe80::1%eth0")}."""


def interfaces() -> Interfaces:
    """This machine's interfaces, with their IPv4 and IPv6 addresses."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: tuple(one.address for one in found if one.family in families)
        for name, found in psutil.net_if_addrs().items()
    }


def interface_of(address: str, known: Interfaces | None = None) -> str | None:
    """The interface that has `address`; None if none has, e.g. behind NAT."""
    wanted = _parsed(address)
    for name, found in (interfaces() if known is None else known).items():
        if any(_parsed(one) == wanted for one in found):
            return name
        if wanted.is_loopback and any(_parsed(one).is_loopback for one in found):
            return name  # the loopback interface has all of 127.0.0.0/8
    return None


def sockets_at(
    address: str, environment: Mapping[str, str] = os.environ, known: Interfaces | None = None
) -> dict[str, str]:
    """Environment variables that make gloo, NCCL and vLLM use the interface of `address`, the node's address in Ray.

    Variables that `environment` already sets stay, because the machine's owner chose them.

    Raises:
        ConfigError: no interface has the address, or GLOO_SOCKET_IFNAME names one that does not exist.
    """
    known = interfaces() if known is None else known
    try:
        chosen = environment.get(GLOO) or interface_of(address, known)
    except ValueError:
        raise ConfigError(f"{address}, a node's address in Ray, is not an IP address: set --node-ip-address") from None
    if chosen is None:
        raise ConfigError(
            f"{address}, this node's address in Ray, is on none of its interfaces ({_listed(known)}): start its Ray "
            f"with --node-ip-address of one that the other nodes reach, or set {GLOO} to the interface's name there"
        )
    if missing := [name for name in chosen.split(",") if name not in known]:
        raise ConfigError(
            f"{GLOO}={chosen}: the node with the address {address} has no interface {missing[0]}, only "
            f"{_listed(known)}: set it to one of them before its Ray starts, or unset it"
        )
    return {
        GLOO: chosen,
        NCCL: environment.get(NCCL) or f"={chosen}",  # "=": exactly this name, not every name that begins with it
        VLLM: environment.get(VLLM) or address,
    }


def use_sockets_at(address: str) -> str:
    """Set the variables of `sockets_at` for this process and its children; returns the address that gloo listens on."""
    known = interfaces()
    chosen = sockets_at(address, known=known)
    os.environ.update(chosen)
    interface = chosen[GLOO].partition(",")[0]
    return address if interface == interface_of(address, known) else known[interface][0]


def is_loopback(address: str) -> bool:
    """Whether only this machine itself can reach `address`."""
    return _parsed(address).is_loopback


def listen(address: str, backlog: int = 128) -> socket.socket:
    """A listening socket on a free port of `address`, IPv4 or IPv6."""
    return socket.create_server((address, 0), family=family_of(address), backlog=backlog)


def family_of(host: str) -> socket.AddressFamily:
    """IPv6 for an IPv6 address; IPv4 for any other address and for names."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def with_port(host: str, port: int) -> str:
    """Host and port as in URLs and for gRPC: "10.0.0.4:80", "[fd00::4]:80"."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def unreachable(
    places: Iterable[Place], timeout_s: float, given_up: Callable[[], bool] = lambda: False
) -> dict[Place, str]:
    """The places that accept no connection within `timeout_s`, and why. All are tried at once.

    A place that refuses is retried until then, because a link may be coming back. `given_up` is called many times per
    second; True ends the search early.
    """
    deadline = time.monotonic() + timeout_s
    failed = _connect(places, deadline, given_up)
    while failed and time.monotonic() + AGAIN_S < deadline and not given_up():
        time.sleep(AGAIN_S)
        again = _connect(failed, deadline, given_up)
        failed = {place: failed[place] if why == SILENT else why for place, why in again.items()}
    return failed


def _connect(places: Iterable[Place], deadline: float, given_up: Callable[[], bool]) -> dict[Place, str]:
    """The places that did not connect, and why. Returns when all have answered, or at the deadline."""
    failed: dict[Place, str] = {}
    with contextlib.ExitStack() as opened, selectors.DefaultSelector() as selector:
        for place in places:
            family = family_of(place[0])
            connection = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
            connection.setblocking(False)
            code = connection.connect_ex(place)
            if code in (0, errno.EINPROGRESS):
                failed[place] = SILENT
                selector.register(connection, selectors.EVENT_WRITE, place)
            else:
                failed[place] = os.strerror(code)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0 and not given_up():
            for entry, _ in selector.select(min(left, LOOK_S)):
                assert isinstance(entry.fileobj, socket.socket)
                selector.unregister(entry.fileobj)
                code = entry.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    failed[entry.data] = os.strerror(code)
                else:
                    del failed[entry.data]
    return failed


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(address.partition("%")[0])


def _listed(known: Interfaces) -> str:
    return "; ".join(f"{name} {', '.join(found)}" for name, found in known.items() if found) or "none has an address"
