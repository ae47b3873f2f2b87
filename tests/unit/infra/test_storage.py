"""The store's promises, on a folder and on an S3 server."""

import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.errors import ConfigError, StoreError
from infra.storage import FolderStore, Store, open_store
from infra.storage.files import sha256_file
from tests.helpers.ports import free_ports


@pytest.fixture
def s3(s3_url: str) -> Store:
    return open_store(s3_url)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return FolderStore(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3")


def test_round_trip_listing_and_deletion(store: Store) -> None:
    assert store.get("a/b") is None and not store.exists("a/b")
    store.put("a/b", b"1")
    store.put("a/c/d", b"2")
    store.put("ab/x", b"3")
    store.put("a/b", b"4")
    assert store.get("a/b") == b"4" and store.exists("a/b")
    assert list(store.list("a")) == ["a/b", "a/c/d"], "a prefix is a folder, not the start of a name"
    assert list(store.folders("a")) == ["c"]
    assert list(store.list("nothing")) == [] and list(store.folders("nothing")) == []
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b")


def test_exactly_one_of_many_writers_wins(store: Store) -> None:
    barrier = threading.Barrier(8)

    def write(number: int) -> bool:
        barrier.wait()
        return store.put_if_absent("slot", f"writer {number}".encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    assert store.get("slot") == f"writer {won.index(True)}".encode()
    assert not store.put_if_absent("slot", b"late")


def test_listing_pages(s3: Store) -> None:
    s3._client.meta.events.register(  # type: ignore[attr-defined]
        "before-parameter-build.s3.ListObjectsV2", lambda params, **_: params.update(MaxKeys=2)
    )
    for number in range(5):
        s3.put(f"many/{number}", b"")
    assert list(s3.list("many")) == [f"many/{number}" for number in range(5)]


def test_files_are_whole_and_checked(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(100_000))
    store.upload_file("files/x.bin", source)
    target = tmp_path / "out" / "x.bin"
    store.download_file("files/x.bin", target, sha256_file(source))
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(StoreError, match="damaged"):
        store.download_file("files/x.bin", tmp_path / "wrong.bin", "0" * 64)
    with pytest.raises(StoreError, match="no object"):
        store.download_file("files/none.bin", tmp_path / "none.bin")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["source.bin"]


def test_whoever_waits_for_a_large_file_is_told_that_it_comes(store: Store, tmp_path: Path) -> None:
    source, moves = tmp_path / "source.bin", []
    source.write_bytes(os.urandom(20 << 20))
    store.upload_file("files/x.bin", source)
    store.download_file("files/x.bin", tmp_path / "x.bin", moved=lambda: moves.append("fetched"))
    fetched = len(moves)
    store.download_file(
        "files/x.bin", tmp_path / "x.bin", sha256_file(source), moved=lambda: moves.append("and checked")
    )
    assert fetched >= 3 and len(moves) >= 2 * fetched + 20


def test_a_lost_answer_of_a_conditional_write_still_counts_as_ours(s3: Store) -> None:
    """The server has written, the connection breaks, the retry is told "exists": it is our own object."""
    from botocore.exceptions import EndpointConnectionError

    client = s3._client  # type: ignore[attr-defined]
    put, calls = client.put_object, []

    def flaky(**request: object) -> object:
        answer = put(**request) if not calls else None
        calls.append(request)
        if answer is not None:
            raise EndpointConnectionError(endpoint_url="http://cut")
        return put(**request)

    client.put_object = flaky
    assert s3.put_if_absent("slot", b"mine") and len(calls) == 2
    client.put_object = put
    assert not s3.put_if_absent("slot", b"other's")


def test_a_failing_server_is_retried_then_named(s3: Store) -> None:
    from botocore.exceptions import ClientError

    tries: list[int] = []
    failing = 2

    def fail(**_: object) -> None:
        tries.append(1)
        if len(tries) <= failing:
            error = {"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}
            raise ClientError(error, "PutObject")  # type: ignore[arg-type]

    s3._client.meta.events.register("before-call.s3.PutObject", fail)  # type: ignore[attr-defined]
    s3.put("x", b"1")
    assert len(tries) == 3 and s3.get("x") == b"1"
    failing = 10**6
    s3.patience_s = 0.3  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=r"--store s3://.*SlowDown"):
        s3.put("x", b"2")
    assert s3.get("x") == b"1"


def test_an_unreachable_store_fails_fast_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"--store s3://some-bucket") as caught:
        open_store("s3://some-bucket").check()
    assert time.monotonic() - began < 50
    assert "\n" not in str(caught.value) and "test-secret" not in str(caught.value)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="--store"):
        open_store(tmp_path / "file").check()


def test_a_missing_bucket_and_bad_urls_are_named(s3: Store) -> None:
    with pytest.raises(StoreError, match="bucket does not exist"):
        open_store("s3://no-such-bucket-here").check()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "--store is empty: name a folder or s3://bucket/prefix"),
        ("  ", "--store is empty"),
        ("s3:///prefix", "no bucket; write it as s3://bucket/prefix"),
        ("s3://", "no bucket"),
        (
            Path("s3://bucket/runs"),
            "--store s3:/bucket/runs: this would create a folder of that name; write it as s3://",
        ),
        ("s3:bucket/runs", "write it as s3://bucket/prefix"),
        ("S3:/bucket", "write it as s3://bucket/prefix"),
        ("s3//bucket/runs", "--store s3//bucket/runs: a colon is missing; write it as s3://bucket/runs"),
        ("FILE///a", "a colon is missing; write it as file:///a"),
        ("s3://two words/x", "'two words' cannot be a bucket's name"),
        ("s3a://bucket", "unknown scheme s3a://"),
        ("gs://bucket", "unknown scheme gs://"),
        ("gs:/bucket", "unknown scheme gs://"),
        (" http://host/x", "unknown scheme http://"),
        ("C:/runs", "unknown scheme c://"),
        ("file:runs", "write it as file:///folder"),
        ("file://runs/here", "runs is read as a host; write file:///runs/here"),
        ("~no-such-user-here/runs", "this user has no home folder"),
    ],
)
def test_a_url_that_would_become_a_folder_or_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str | Path, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_store(url)
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(StoreError, match=r"--store .*/runs: is not a folder; name one, or s3://bucket/prefix"):
        open_store(tmp_path / "runs").check()


def test_folders_and_buckets_in_every_spelling(tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("file:///a/b%20c", "file:/a/b c", "file://localhost/a/b c", "FILE:///a/b c", "/a/b c"):
        assert open_store(text).url == "/a/b c"
    for name in ("runs:2", "a/s3:/b", "./s3:b", "x y"):
        assert open_store(name).url == str(tmp_path / name)
    bucket = s3_url.removeprefix("s3://")
    assert open_store(f"S3://{bucket}/").url == s3_url
