"""Ports for a test's servers that listen later."""

import contextlib
import random
import socket


def free_ports(count: int) -> list[int]:
    """Different unused ports, from a range in which neither the kernel nor Ray hands out free ports."""
    ports: set[int] = set()
    while len(ports) < count:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(20_000, 32_000)))
            ports.add(int(probe.getsockname()[1]))
    return list(ports)
