"""A Ray head that `recua up` starts on this machine if there is no cluster; it outlives the command.

`ray start --block` is its parent: it ends if one of its processes ends, and ends them all on a signal. Every process
of the head has a mark in its environment, so that `stop` ends all of them and no others.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from infra.errors import SystemFault
from infra.processes import process_start
from workflows.service.client.credentials import home, write_secret

MARK = "RECUA_HEAD"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
SECRETS = ("RECUA_TOKEN",)
Record = dict[str, Any]


def start() -> tuple[str, Record]:
    """(address, record for `stop`) of a new head on the loopback interface.

    Raises:
        SystemFault: it did not start; the message names its log.
    """
    mark = uuid.uuid4().hex
    folder = Path(tempfile.mkdtemp(prefix="recua-ray-", dir="/tmp"))  # short: paths of sockets are limited
    port, dashboard_agent, client = _free_ports(3)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address", "127.0.0.1", "--port", str(port), "--include-dashboard", "false"]
    command += ["--dashboard-agent-listen-port", str(dashboard_agent), "--ray-client-server-port", str(client)]
    command += ["--temp-dir", str(folder)]
    use_ray_token()
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    home().mkdir(parents=True, exist_ok=True)
    log = home() / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**environment, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    record = {"pid": process.pid, "start": process_start(process.pid), "mark": mark, "folder": str(folder)}
    deadline = time.monotonic() + START_TIMEOUT_S
    while "ray runtime started" not in log.read_text(errors="replace").lower():
        if process.poll() is not None or time.monotonic() > deadline:
            stop(record)
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            raise SystemFault(f"Ray's head did not start ({' '.join(said)}); see {log}, or give --address of a cluster")
        time.sleep(0.1)
    return f"127.0.0.1:{port}", record


def use_ray_token() -> None:
    """Make Ray ask for a token too: without one, anyone who reaches its ports can run code. Call this before Ray is
    imported; a choice that the environment already makes stays."""
    file = Path.home() / ".ray" / "auth_token"
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        return
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") or file.exists()):
        write_secret(file, secrets.token_hex(32))


def is_alive(record: Record) -> bool:
    return process_start(record["pid"]) == record["start"]


def stop(record: Record) -> None:
    """End the head and every process that it started, and no other Ray of this machine."""
    if is_alive(record):
        os.kill(record["pid"], signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while is_alive(record) and time.monotonic() < deadline:
            time.sleep(0.1)
    for _ in range(50):
        left = _marked(record["mark"])
        if not left:
            break
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    shutil.rmtree(record["folder"], ignore_errors=True)


def _marked(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
