"""Checks before expensive work: this machine's memory and ports, and a Ray cluster's address.

Each `require_*` names the setting to change. Sizes are bytes; `parse_size("2GiB")` reads the sizes in recipes and
steps.
"""

import math
import os
import re
import socket
from pathlib import Path

from infra.addresses import family_of
from infra.errors import ConfigError, ResourceError

RAY_ANSWER_S = 2.0
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str | int, setting: str = "size") -> int:
    """Bytes in "1GiB", "512 MiB", "1.5GB" or a plain number.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"\s*(\d*\.?\d+(?:e\d+)?|\d+\.)\s*([a-z]*)\s*", str(text), re.IGNORECASE)
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None or not math.isfinite(size := float(match[1]) * unit):
        raise ConfigError(f'{setting}={text!r} is not a size; write it as "512MiB" or "2GiB"')
    return int(size)


def show_size(size: float) -> str:
    """1610612736 -> "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that new processes can take without swapping: the smaller of the kernel's MemAvailable and the rest of this
    process's cgroup limit (a container's). File cache that the cgroup can drop counts as free."""
    free = _meminfo(root / "proc/meminfo")["MemAvailable"]
    cgroup = root / "sys/fs/cgroup"
    for limit, used, stat, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            most = (cgroup / limit).read_text().strip()
            if most == "max":
                return free
            rows = (line.split() for line in (cgroup / stat).read_text().splitlines())
            droppable = next((int(row[1]) for row in rows if row[0] == cache), 0)
            return min(free, int(most) - int((cgroup / used).read_text()) + droppable)
        except FileNotFoundError:
            continue
    return free


def local_resources(root: Path = Path("/")) -> dict[str, float]:
    """An upper bound of the resources of a Ray that starts on this machine: {"CPU": cores, "GPU": devices}. GPUs are
    infinite if there are accelerators other than NVIDIA's, which are not counted here."""
    devices = root / "dev"
    nvidia = sum(1 for device in devices.glob("nvidia[0-9]*"))
    other = any((devices / name).exists() for name in ("kfd", "accel", "davinci_manager", "dxg"))
    return {"CPU": float(os.cpu_count() or 1), "GPU": float("inf") if other else float(nvidia)}


def require_memory(needed: int, setting: str, available: int | None = None) -> None:
    """Raises ResourceError if `needed` bytes are not available; `setting` names what to make smaller."""
    free = available_memory() if available is None else available
    if needed > free:
        raise ResourceError(f"{setting}: needs {show_size(needed)} of memory, this machine has {show_size(free)} free")


def hold_port(port: int, setting: str, host: str = "127.0.0.1") -> socket.socket:
    """A socket bound to `port` of `host` (0: a free port), IPv4 or IPv6. Close it to free the port.

    Raises:
        ConfigError: not a port number.
        ResourceError: the port is taken, or this process may not bind it.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"{setting}: {port} is not a port (0 to 65535)")
    held = socket.socket(family_of(host), socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except OSError as error:
        held.close()
        raise ResourceError(
            f"{setting}: cannot listen on {host}:{port}: {error}; choose another port, or 0 for any free one"
        ) from None
    return held


def require_port(port: int, setting: str, host: str = "127.0.0.1") -> None:
    """Check that `port` can be bound. Raises as `hold_port`."""
    hold_port(port, setting, host).close()


def answers(address: str, timeout_s: float = 5.0) -> bool:
    """Whether a process listens at "host:port"."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


def require_ray(address: str | None, setting: str) -> None:
    """Raises ConfigError if nothing answers at a Ray's address. Ray itself would retry for many minutes.

    `address` is "host:port" or "ray://host:port[/...]"; anything else ("auto", "local", None) passes.
    """
    place = _place(address)
    if place and not answers(place):
        raise ConfigError(f"{setting}: no Ray cluster at {address}: nothing answers there")
    require_ray_token(address, setting)


def require_ray_token(address: str | None, setting: str) -> None:
    """Raises ConfigError if the Ray at `address` refuses the token that Ray would send. Ray itself would retry for a
    long time, log many lines, and end with "Failed to connect". Passes if nothing answers."""
    if not (place := _place(address)) or not _is_refused(place, token := _ray_token()):
        return
    how = (
        "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or in a file that RAY_AUTH_TOKEN_PATH names"
    )
    what = "wants a token" if token is None else "refuses the token that RAY_AUTH_MODE=token sends"
    raise ConfigError(f"{setting}: the Ray cluster at {address} {what}: {how}")


def _place(address: str | None) -> str:
    """host:port, or "" if the address is a word."""
    place = re.fullmatch(r"(?:ray://)?([^/]+:\d+)(?:/.*)?", address or "")
    return place[1] if place is not None else ""


def _ray_token() -> str | None:
    """The token that Ray would send, looked up as Ray does."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")
    try:
        return file.expanduser().read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _is_refused(place: str, token: str | None) -> bool:
    """Whether Ray's head service refuses the token (None: a call without one)."""
    import grpc

    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(place, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=RAY_ANSWER_S, metadata=metadata)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def _meminfo(path: Path) -> dict[str, int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}
