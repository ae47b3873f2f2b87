"""At which address of a machine others reach it: one rule for every process that others talk to, and for every library.

Processes give each other one address alone, that of their node in Ray; whoever starts them passes it down. Libraries
that open sockets of their own would take another: gloo what the host's name resolves to (127.0.1.1 on Debian), NCCL and
vLLM what looks best to them. `sockets_at` tells them all to use the interface that owns that one address.
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
Place = tuple[str, int]
"""Address and port."""
Interfaces = Mapping[str, tuple[str, ...]]
"""Name -> addresses, e.g. {"lo": ("127.0.0.1", "::1"), "eth0": ("10.0.0.4", "fe80::1%eth0")}."""


def interfaces() -> Interfaces:
    """This machine's, with their IPv4 and IPv6 addresses."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: tuple(one.address for one in found if one.family in families)
        for name, found in psutil.net_if_addrs().items()
    }


def interface_of(address: str, known: Interfaces | None = None) -> str | None:
    """The interface that has `address`; None where no one has, e.g. behind NAT."""
    wanted = _parsed(address)
    for name, found in (interfaces() if known is None else known).items():
        if any(_parsed(one) == wanted for one in found):
            return name
        if wanted.is_loopback and any(_parsed(one).is_loopback for one in found):
            return name  # all of 127.0.0.0/8 is its
    return None


def sockets_at(
    address: str, environment: Mapping[str, str] = os.environ, known: Interfaces | None = None
) -> dict[str, str]:
    """The variables by which gloo, NCCL and vLLM use the interface that owns `address`, the node's one in Ray.

    What `environment` says of an interface already stays: somebody chose it on this machine.

    Raises:
        ConfigError: no interface has the address, or GLOO_SOCKET_IFNAME names one that is not there.
    """
    known = interfaces() if known is None else known
    try:
        chosen = environment.get(GLOO) or interface_of(address, known)
    except ValueError:
        raise ConfigError(f"{address}, which Ray has for a node, is no IP address: set its --node-ip-address") from None
    if chosen is None:
        raise ConfigError(
            f"{address}, which Ray has for this node, is on none of its interfaces ({_listed(known)}): start its Ray "
            f"with --node-ip-address of one that the other nodes reach, or name the interface in {GLOO} there"
        )
    if missing := [name for name in chosen.split(",") if name not in known]:
        raise ConfigError(
            f"{GLOO}={chosen}: the node with the address {address} has no interface {missing[0]}, only "
            f"{_listed(known)}: set it to one of them before its Ray starts, or not at all"
        )
    return {
        GLOO: chosen,
        NCCL: environment.get(NCCL) or f"={chosen}",  # "=": exactly this name, not every one that begins so
        VLLM: environment.get(VLLM) or address,
    }


def use_sockets_at(address: str) -> str:
    """The same for this process and those that it starts; returns the address that gloo listens on."""
    known = interfaces()
    chosen = sockets_at(address, known=known)
    os.environ.update(chosen)
    interface = chosen[GLOO].partition(",")[0]
    return address if interface == interface_of(address, known) else known[interface][0]


def is_loopback(address: str) -> bool:
    """Whether only this machine itself reaches it."""
    return _parsed(address).is_loopback


def listen(address: str, backlog: int = 128) -> socket.socket:
    """A listening socket on a free port of `address`, IPv4 or IPv6."""
    return socket.create_server((address, 0), family=family_of(address), backlog=backlog)


def family_of(host: str) -> socket.AddressFamily:
    """IPv6 of an address of it; IPv4 of any other, and of names."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def with_port(host: str, port: int) -> str:
    """As in URLs and for gRPC: "10.0.0.4:80", "[fd00::4]:80"."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def unreachable(
    places: Iterable[Place], timeout_s: float, given_up: Callable[[], bool] = lambda: False
) -> dict[Place, str]:
    """Which of these take no connection within `timeout_s`, asked all at once, and why not.

    One that refuses is asked again until then: a link may just be coming back. `given_up`: the answer is not wanted any
    more; asked many times a second.
    """
    deadline = time.monotonic() + timeout_s
    failed = _connect(places, deadline, given_up)
    while failed and time.monotonic() + AGAIN_S < deadline and not given_up():
        time.sleep(AGAIN_S)
        failed = _connect(failed, deadline, given_up)
    return failed


def _connect(places: Iterable[Place], deadline: float, given_up: Callable[[], bool]) -> dict[Place, str]:
    """Those that did not, and why; returns when all have answered, or at the deadline."""
    failed: dict[Place, str] = {}
    with contextlib.ExitStack() as opened, selectors.DefaultSelector() as selector:
        for place in places:
            family = family_of(place[0])
            connection = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
            connection.setblocking(False)
            code = connection.connect_ex(place)
            if code in (0, errno.EINPROGRESS):
                failed[place] = "no answer"
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
