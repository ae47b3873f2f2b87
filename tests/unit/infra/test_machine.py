"""Memory, disk and ports are refused before work, and the message names the setting."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from infra.errors import ConfigError, ResourceError
from infra.machine import (
    available_memory,
    parse_size,
    require_memory,
    require_port,
    require_ray,
    show_size,
)


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 2**30), ("512 MiB", 2**29), ("1.5GB", 1_500_000_000), ("100", 100), (7, 7)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["1 apple", "GiB", "-1GiB", ""])
def test_a_bad_size_names_the_setting(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^serving\.memory="):
        parse_size(text, "serving.memory")


def test_sizes_are_shown_readably() -> None:
    assert [show_size(size) for size in (12, 1536, 1.5 * 2**30, 3 * 2**40)] == ["12 B", "1.5 KiB", "1.5 GiB", "3.0 TiB"]


def _machine(root: Path, available_kib: int, files: dict[str, str]) -> Path:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available_kib} kB\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_available_memory_without_a_limit(tmp_path: Path) -> None:
    assert available_memory(_machine(tmp_path, 1000, {"memory.max": "max\n"})) == 1000 * 1024


def test_a_container_limit_counts_its_droppable_cache_as_free(tmp_path: Path) -> None:
    files = {"memory.max": "500000\n", "memory.current": "400000\n", "memory.stat": "anon 1\ninactive_file 100000\n"}
    assert available_memory(_machine(tmp_path, 10**9, files)) == 500_000 - 400_000 + 100_000


def test_a_container_limit_of_the_older_kind(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": "500000\n",
        "memory/memory.usage_in_bytes": "400000\n",
        "memory/memory.stat": "total_inactive_file 0\n",
    }
    assert available_memory(_machine(tmp_path, 10**9, files)) == 100_000


def test_too_little_memory_names_the_setting_and_both_sizes() -> None:
    with pytest.raises(ResourceError, match=r"^pools\.engine\.kv_cache: needs 4\.0 GiB .* has 1\.0 GiB free$"):
        require_memory(4 * 2**30, "pools.engine.kv_cache", available=2**30)
    require_memory(2**20, "pools.engine.kv_cache")


def test_a_port_in_use_is_refused_and_a_free_one_is_not() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"^serving\.grpc_port: cannot listen on 127\.0\.0\.1:{port}: "):
            require_port(port, "serving.grpc_port")
    require_port(port, "serving.grpc_port")
    require_port(0, "serving.grpc_port")
    with pytest.raises(ConfigError, match="is not a port"):
        require_port(70_000, "serving.grpc_port")


class Guarded(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Ray's head service where it wants a token, as far as it is asked here."""

    def service(self, call: Any) -> Any:
        given = dict(call.invocation_metadata).get("authorization")

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if given != "Bearer right":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


def test_a_ray_that_wants_a_token_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = grpc.server(ThreadPoolExecutor(2), [Guarded()])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    how = "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN"
    try:
        with pytest.raises(ConfigError, match=rf"^--address: the Ray cluster at {address} wants a token: {how}"):
            require_ray(address, "--address")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
        with pytest.raises(ConfigError, match="wants a token"):  # Ray sends it in that mode only
            require_ray(address, "--address")
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        require_ray(f"ray://{address}", "--address")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        with pytest.raises(ConfigError, match="refuses the token that RAY_AUTH_MODE=token sends"):
            require_ray(address, "--address")
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("right\n")
        require_ray(address, "--address")
    finally:
        server.stop(None)
