"""A store that is slow, fails, loses answers or returns half an object: never a wrong result, then a clear error."""

import hashlib
import os
import resource
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.errors import StoreError
from infra.storage import FolderStore
from infra.storage.files import sha256_file
from infra.storage.s3 import CONTENT, S3Store

Inject = Callable[..., dict[str, Any]]
LOST = ["error-500", "slow-down", "reset-before", "reset-after", "late-error"]
HALVES = ["truncated", "short"]


@pytest.fixture(scope="module")
def client(s3_endpoint: str, s3_proxy: str) -> Iterator[S3Store]:
    """One client for all tests: making one takes longer than most of them."""
    import boto3

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="chaos-store")
        environment.setenv("AWS_ENDPOINT_URL", s3_proxy)
        yield S3Store("s3://chaos-store", read_timeout_s=5.0)


@pytest.fixture
def store(client: S3Store, inject: Inject) -> S3Store:
    """An empty store: a folder of its own."""
    client.prefix, client.patience_s = uuid.uuid4().hex, 20.0
    return client


@pytest.mark.parametrize("kind", [*LOST, "zombie"])
def test_writes_survive(store: S3Store, inject: Inject, kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"file" * 1000)
    inject(script=[kind], match="PUT")
    store.put("put", b"1")
    inject(script=[kind], match="PUT")
    assert store.put_if_absent("slot", b"2"), "the object is ours whatever became of the answer"
    inject(script=[kind, kind], match="PUT")
    assert not store.put_if_absent("slot", b"3") and store.get("slot") == b"2"
    inject(script=[kind], match="PUT")
    store.upload_file("file", tmp_path / "file")
    inject(script=[kind], match="DELETE")
    store.delete("put")
    assert inject()["counts"] == {kind: 1}
    assert store.get("slot") == b"2" and store.get("file") == b"file" * 1000
    if kind != "zombie":  # a late write of our own may come after our own delete
        assert list(store.list("")) == ["file", "slot"]


@pytest.mark.parametrize("kind", [*LOST, *HALVES])
def test_reads_survive(store: S3Store, inject: Inject, kind: str, tmp_path: Path) -> None:
    data = os.urandom(1000)
    store.put("a/x", data)
    store.put("a/y/z", b"")
    (tmp_path / "file").write_bytes(data)
    store.upload_file("a/file", tmp_path / "file")
    inject(script=[kind], match="GET")
    assert store.get("a/x") == data
    assert inject()["counts"] == {kind: 1}
    inject(script=[kind], match="GET")
    assert store.get("a/file") == data
    inject(script=[kind], match="GET")
    assert store.get("none") is None
    inject(script=[kind], match="list-type")
    assert list(store.list("a")) == ["a/file", "a/x", "a/y/z"]
    inject(script=[kind], match="list-type")
    assert list(store.folders("a")) == ["y"]
    inject(script=[kind], match="GET")
    store.download_file("a/file", tmp_path / "copy", sha256_file(tmp_path / "file"))
    assert (tmp_path / "copy").read_bytes() == data
    if kind not in HALVES:
        inject(script=[kind], match="HEAD")
        assert store.exists("a/x") and not store.exists("none")
        inject(script=[kind], match="HEAD")
        store.check()


def test_many_lost_answers_and_writers_leave_one_winner(store: S3Store, inject: Inject) -> None:
    inject(seed=5, rates={"reset-after": 0.15, "late-error": 0.1, "zombie": 0.05, "reset-before": 0.05}, match="PUT")
    wins: list[list[int]] = [[] for _ in range(12)]

    def write(writer: int) -> None:
        for number in range(12):
            if store.put_if_absent(f"slots/{number}", f"writer {writer}".encode()):
                wins[number].append(writer)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(winners) == 1 for winners in wins), wins
    assert [store.get(f"slots/{n}") for n in range(12)] == [f"writer {w[0]}".encode() for w in wins]


def test_equal_content_of_two_writers_has_one_winner(store: S3Store, inject: Inject) -> None:
    assert store.put_if_absent("same", b"x")
    inject(script=["reset-before"], match="PUT")
    assert not store.put_if_absent("same", b"x"), "somebody else's object, equal to ours"


def test_a_store_that_fails_for_good_is_named(store: S3Store, inject: Inject, tmp_path: Path) -> None:
    store.put("x", b"old")
    store.patience_s = 0.3
    (tmp_path / "file").write_bytes(b"new")
    inject(rates={"slow-down": 1.0})
    attempts: list[Callable[[], Any]] = [
        lambda: store.put("x", b"new"),
        lambda: store.put_if_absent("y", b"new"),
        lambda: store.get("x"),
        lambda: store.exists("x"),
        lambda: list(store.list("")),
        lambda: list(store.folders("")),
        lambda: store.delete("x"),
        store.check,
    ]
    for attempt in attempts:
        with pytest.raises(StoreError, match=r"--store s3://.*(SlowDown|503)"):
            attempt()
    inject(script=[])
    assert list(store.list("")) == ["x"] and store.get("x") == b"old"


def test_half_an_object_again_and_again_is_an_error(store: S3Store, inject: Inject, tmp_path: Path) -> None:
    store.put("x", b"0123456789")
    inject(rates={"short": 1.0}, match="GET")
    with pytest.raises(StoreError, match="x is damaged"):
        store.get("x")
    with pytest.raises(StoreError, match="damaged"):
        store.download_file("x", tmp_path / "x", hashlib.sha256(b"0123456789").hexdigest())
    assert list(tmp_path.iterdir()) == []


def test_an_object_that_lies_damaged_is_an_error(store: S3Store) -> None:
    """Half an object as the server itself would swear to it: its length and checksums fit."""
    stamp = {CONTENT: hashlib.sha256(b"0123456789").hexdigest()}
    store._client.put_object(Bucket=store.bucket, Key=store._key("x"), Body=b"01234", Metadata=stamp)
    with pytest.raises(StoreError, match="x is damaged: 5 bytes, not those that were written"):
        store.get("x")


def test_a_listing_without_its_end_is_asked_for_again(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 takes an empty answer for an empty listing; a driver would take that for a new run."""
    store.put("x", b"1")
    whole, answers = store._client.list_objects_v2, iter([{}])
    monkeypatch.setattr(store._client, "list_objects_v2", lambda **query: next(answers, None) or whole(**query))
    assert list(store.list("")) == ["x"] and list(answers) == []


def test_a_silent_server_is_asked_again(
    store: S3Store, inject: Inject, s3_proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy)
    hasty = S3Store(f"{store.url}/{store.prefix}", patience_s=20.0, read_timeout_s=0.3)
    inject(script=["stall"], match="PUT", stall_s=2.0)
    assert hasty.put_if_absent("slot", b"1")
    inject(script=["stall", "stall"], match="GET", stall_s=2.0)
    assert hasty.get("slot") == b"1"
    assert inject()["counts"] == {"stall": 2}


def test_hurry_ends_the_waiting_of_other_threads(store: S3Store, inject: Inject) -> None:
    """Ctrl-C while the store is down: whoever retries gives up after its current try."""
    inject(rates={"error-503": 1.0})
    errors: list[str] = []

    def read() -> None:
        try:
            store.get("x")
        except StoreError as error:
            errors.append(str(error))

    store.patience_s = 600.0
    thread = threading.Thread(target=read)
    thread.start()
    deadline = time.monotonic() + 30
    while not inject()["counts"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    store.hurry(0.0)
    thread.join(timeout=60)
    assert not thread.is_alive() and "unreachable or failing (ServiceUnavailable)" in errors[0]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse to write on, as a full disk does."""
    store = FolderStore(tmp_path / "store")
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        for write in (
            lambda: store.put_if_absent("slot", b"x" * 10_000),
            lambda: store.put("put", b"x" * 10_000),
            lambda: store.put("put", b"x" * 10_000, durable=False),
            lambda: store.upload_file("file", tmp_path / "file"),
        ):
            with pytest.raises(StoreError, match=r"--store .*: cannot use \w+: File too large"):
                write()
        assert store.put_if_absent("small", b"x"), "what fits goes on"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["small"]
    assert store.put_if_absent("slot", b"x" * 10_000)


def test_a_lost_answer_to_our_own_link_counts_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may ask again after a lost answer, and report that the name is there: it is ours."""
    link = os.link

    def linked_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    store = FolderStore(tmp_path)
    monkeypatch.setattr(os, "link", linked_twice)
    assert store.put_if_absent("slot", b"mine")
    monkeypatch.setattr(os, "link", link)
    assert not store.put_if_absent("slot", b"other") and store.get("slot") == b"mine"


def test_a_server_that_ignores_conditional_writes_is_refused(store: S3Store, inject: Inject) -> None:
    inject(script=["unconditional"] * 4, match="PUT")
    for _ in range(2):
        with pytest.raises(StoreError, match=r"--store s3://chaos-store: this server ignores conditional writes"):
            store.check()
    inject()
    store.check()
