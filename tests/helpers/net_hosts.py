"""Several hosts on one machine: each has its own network, host name, process ids, shared memory and /tmp/ray.

A host is the set of namespaces of one process, its init. When that ends, the kernel ends all its processes and removes
the network, so no test leaves anything behind. The hosts are on a switch (a bridge in namespaces of its own);
their /etc/hosts maps their name to 127.0.1.1, as Debian's does, and no other address is on the outside.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.addresses import GLOO, NCCL, VLLM

REPOSITORY = Path(__file__).resolve().parents[2]
INIT = "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('up', flush=True); sys.stdin.read()"
"""Reaps orphans, and ends when the other end of its standard input closes."""
NAMESPACES = ("--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
ENTERED = ("--net", "--mount", "--uts", "--pid")
NOBODY = "02:00:00:00:00:fe"
"""An unused hardware address."""
RAY_PORT = 6379


class Machine:
    """The namespaces of one process."""

    def __init__(self, name: str, *namespaces: str) -> None:
        self.name, own_processes = name, "--pid" in namespaces
        command = ["unshare", *namespaces, sys.executable, "-c", INIT]
        self._init = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._init.stdout is not None and self._init.stdout.readline() == "up\n"
        self.pid = self._init.pid
        if own_processes:
            self.pid = int(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text())
        entered = [word for word in namespaces if word in ENTERED]
        self._enter = ["nsenter", "--target", str(self.pid), *entered]

    def start(self, *words: str, **options: Any) -> "subprocess.Popen[str]":
        """Start a command in the namespaces."""
        return subprocess.Popen([*self._enter, *words], text=True, **options)

    def run(self, *words: str, **options: Any) -> str:
        """Run a command to its end; returns its standard output. An error shows all its output."""
        done = subprocess.run([*self._enter, *words], capture_output=True, text=True, **options)
        assert done.returncode == 0, f"{self.name}: {' '.join(words)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def end(self) -> None:
        """Power off: end all its processes."""
        self._init.kill()
        self._init.communicate()


class Host(Machine):
    """A machine with an address on the switch."""

    def __init__(self, number: int, switch: Machine, folder: Path) -> None:
        super().__init__(f"host-{number}", *NAMESPACES)
        self.address, self._switch, self._port = f"10.213.0.{number}", switch, f"port-{number}"
        hosts, own_ray = folder / f"hosts-{number}", folder / f"ray-{number}"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        own_ray.mkdir()
        Path("/tmp/ray").mkdir(exist_ok=True)
        self.run("hostname", self.name)
        self.run("mount", "--bind", str(hosts), "/etc/hosts")
        self.run("mount", "--bind", str(own_ray), "/tmp/ray")
        self.run("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
        other_end = ["peer", "name", "eth0", "netns", f"/proc/{self.pid}/ns/net"]
        switch.run("ip", "link", "add", self._port, "type", "veth", *other_end)
        switch.run("ip", "link", "set", self._port, "master", "switch", "up")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")

    def cut(self) -> None:
        """Drop all packets between this host and the others, silently."""
        self._switch.run("ip", "link", "set", self._port, "nomaster")

    def heal(self) -> None:
        self._switch.run("ip", "link", "set", self._port, "master", "switch")

    def lose_way_to(self, other: "Host") -> None:
        """Drop packets from this host to `other`, and no others."""
        self.run("ip", "neighbour", "replace", other.address, "lladdr", NOBODY, "nud", "permanent", "dev", "eth0")

    def find_way_to(self, other: "Host") -> None:
        self.run("ip", "neighbour", "del", other.address, "dev", "eth0")

    def start_ray(self, head: "Host | None" = None, cpus: int = 1, **environment: str) -> None:
        """Start a raylet on this host, or a new cluster without a `head`. It ends with the host."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={self.address}"]
        ray += ["--disable-usage-stats", "--object-store-memory=80000000", f"--num-cpus={cpus}", "--num-gpus=0"]
        ray += [f"--address={head.ray}"] if head else ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
        self.run(*ray, env={**self.environment, **environment})

    def processes(self, words: str) -> list[int]:
        """Ids of this host's processes with `words` in their command line."""
        found = []
        for line in self.run("ps", "-eww", "-o", "pid=,args=").splitlines():
            pid, _, command = line.strip().partition(" ")
            if words in command and "ps -eww" not in command:
                found.append(int(pid))
        return found

    @property
    def environment(self) -> dict[str, str]:
        """The environment of other processes there; the working directory is /. The host has its own interfaces."""
        ours = {name: value for name, value in os.environ.items() if name not in (GLOO, NCCL, VLLM)}
        return {**ours, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY)}

    @property
    def ray(self) -> str:
        """The address of the cluster whose head this host is."""
        return f"{self.address}:{RAY_PORT}"


@contextlib.contextmanager
def hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """`count` hosts that reach each other; they share `folder` and the whole disk except /tmp/ray."""
    with contextlib.ExitStack() as made:
        switch = Machine("switch", "--net")
        made.callback(switch.end)
        switch.run("ip", "link", "add", "switch", "type", "bridge")
        switch.run("ip", "link", "set", "switch", "up")
        found = []
        for number in range(1, count + 1):
            found.append(Host(number, switch, folder))
            made.callback(found[-1].end)
        yield found


@functools.cache
def no_hosts() -> str | None:
    """Why this machine cannot have such hosts; None if two of them reach each other."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "unshare", "nsenter", "mount", "ps") if shutil.which(tool) is None]:
        return f"hosts in network namespaces need {missing[0]}"
    ask = "import socket, sys; socket.create_server((sys.argv[1], 0)); socket.create_connection((sys.argv[2], 1), 10)"
    try:
        with tempfile.TemporaryDirectory() as folder, hosts(2, Path(folder)) as (one, other):
            done = one.start(sys.executable, "-c", ask, one.address, other.address, stderr=subprocess.PIPE)
            said = done.communicate(timeout=60)[1]
            return None if "ConnectionRefused" in said else f"hosts in network namespaces fail here: {said[-200:]}"
    except (AssertionError, OSError, ValueError, subprocess.TimeoutExpired) as error:
        return f"no network namespaces here: {str(error)[-200:]}"
