"""What every test shares: nothing is fetched or reported; GPU tests need a GPU, page tests a browser."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.addresses import GLOO, NCCL, VLLM
from tests.helpers.ports import free_ports

STATUS = pytest.StashKey[int]()
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def pytest_configure(config: pytest.Config) -> None:
    """Before any import of Ray or transformers, and inherited by every process that a test starts."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two that spin for each other take forty times as long under load
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")  # how long a silent name server keeps a rank waiting
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell starts what it puts in the background like that
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave without taking the interpreter down. Every result is printed and every fixture is torn down by now, but
    native threads of Ray and gRPC in this process may still run, and one of them once crashed in freed memory (a
    segmentation fault after "827 passed")."""
    if STATUS in config.stash:
        config.get_terminal_writer().flush()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[STATUS])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = (
        shutil.which("nvidia-smi") is not None
        and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    )
    browser = any(map(shutil.which, BROWSERS))
    for item in items:
        if "tests/gpu/" in item.nodeid and not gpu:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))
        if item.get_closest_marker("page") and not browser:
            item.add_marker(pytest.mark.skip(reason="no headless Chromium here; make page-test installs it"))


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    """A test that failed between forming a process group and leaving it takes none of the following ones with it."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def no_interface_left() -> Iterator[None]:
    """A test that forms a group in this process chooses the interface of nothing that later tests start."""
    before = {name: os.environ[name] for name in (GLOO, NCCL, VLLM) if name in os.environ}
    yield
    for name in (GLOO, NCCL, VLLM):
        os.environ.pop(name, None)
    os.environ.update(before)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a headless Chromium; tests marked `page` are skipped where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A throw-away HOME, so that the default store and the artifact cache are empty."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    yield folder


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Address of a moto server: S3 over HTTP on loopback, conditional writes included."""
    with moto_server() as address:
        yield address


MOTO = """
import threading
from moto.s3.responses import S3Response
from moto.server import main

lock, put_object = threading.Lock(), S3Response.put_object


def one_by_one(*args, **kwargs):
    with lock:
        return put_object(*args, **kwargs)


S3Response.put_object = one_by_one
main()
"""
"""It looks whether a key is there and writes it later (moto 5.2): of two conditional writes at once both would win."""


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    (port,) = free_ports(1)
    command = [sys.executable, "-c", MOTO, "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def s3_environment(s3_endpoint: str) -> dict[str, str]:
    """What boto3 needs to find it."""
    return {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture
def s3_url(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://` URL of a new bucket there; the environment has what boto3 needs, for child processes too."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    import boto3

    bucket = f"recua-{os.urandom(4).hex()}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/some/prefix"


@pytest.fixture(scope="session")
def s3_proxy(s3_endpoint: str) -> Iterator[str]:
    """Address of tests/chaos/s3_proxy.py before that server; `inject` says what it does."""
    command = [sys.executable, str(Path(__file__).parent / "chaos" / "s3_proxy.py"), s3_endpoint.rpartition(":")[2]]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    server.kill()
    server.communicate()


@pytest.fixture
def inject(s3_proxy: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """`inject(script=[...], match=...)`: what happens next; without arguments, the counts so far."""

    def control(**settings: Any) -> dict[str, Any]:
        data = json.dumps(settings).encode() if settings else None
        with urllib.request.urlopen(f"{s3_proxy}/__faults__", data, timeout=10) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found

    control(script=[])
    yield control
    control(script=[])
