"""`s3://bucket/prefix` behind the Store protocol, for S3 and every server that speaks it with conditional writes.

Credentials, region and endpoint are those that boto3 finds (`AWS_ENDPOINT_URL` for another server); they are never
logged or stored. boto3 is imported when the first store is opened.

Every object carries two stamps in its metadata. `recua-sha256` is the hash of its content and reveals a damaged object
of the right length. `recua-writer` is new for every conditional write: if the server says "exists", it tells our own
write, whose answer was lost, from another driver's.

File names may contain line breaks and bytes that are not text, keys may not: they are written as `%%0A`, `%%FF`.
"""

import contextlib
import functools
import hashlib
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from infra.errors import ConfigError, RecuaError, StoreError, UserError
from infra.storage.files import Moved, appear, checked_key, sha256_file, unseen

T = TypeVar("T")

MISSING = {"404", "NoSuchKey", "NotFound"}
LOST = {"412", "PreconditionFailed"}
PASSING = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "RequestTimeTooSkewed", "409"}
PASSING |= {"ConditionalRequestConflict", "ThrottlingException", "Throttling", "500", "502", "503", "504"}
PASSING |= {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}  # the request was damaged on its way
CONTENT, WRITER = "recua-sha256", "recua-writer"
STAMPED = 8 << 20  # bytes; larger files belong to artifacts, whose manifests have their checksums
ODD = re.compile("[\n\udc80-\udcff]|%(?=%(?:0A|25|[89A-F][0-9A-F]))")
ESCAPED = re.compile("%%(0A|25|[89A-F][0-9A-F])")
LONGEST_KEY = 1024
"""Bytes."""
DAMAGED_READS = 4
TRANSFERS = 3
PROBE = "probes/conditional-write"
"""The key that every check of a store tries to write twice."""


class S3Store:
    """A store in an S3 bucket.

    `patience_s`: how long a failing request is retried before it becomes a StoreError. `read_timeout_s`: how long a
    server may be silent before the connection counts as dead; shorter than a driver's lease, so that one lost answer
    does not cost the lease.
    """

    def __init__(
        self, url: str, patience_s: float = 60.0, connect_timeout_s: float = 5.0, read_timeout_s: float = 10.0
    ) -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket:
            raise ConfigError(f"--store {url}: no bucket; write it as s3://bucket/prefix")
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self.patience_s = patience_s
        self._timeouts = (connect_timeout_s, read_timeout_s)
        self._client = _client(1, *self._timeouts)  # no retries: boto3 would repeat a conditional write blindly

    def put_if_absent(self, key: str, data: bytes) -> bool:
        writer = uuid.uuid4().hex
        stamps = {CONTENT: hashlib.sha256(data).hexdigest(), WRITER: writer}
        where = {"Bucket": self.bucket, "Key": self._key(key)}

        def attempt() -> bool:
            try:
                self._client.put_object(**where, Body=data, Metadata=stamps, IfNoneMatch="*")
            except Exception as error:
                if _code(error) not in LOST:
                    raise
                return self._writer(key) == writer  # an earlier try may have succeeded although its answer was lost
            return True

        return self._retry(key, attempt)

    def put(self, key: str, data: bytes, durable: bool = True) -> None:
        stamps = {CONTENT: hashlib.sha256(data).hexdigest()}
        where = {"Bucket": self.bucket, "Key": self._key(key)}
        self._retry(key, lambda: self._client.put_object(**where, Body=data, Metadata=stamps))

    def get(self, key: str) -> bytes | None:
        return self._retry(key, lambda: self._read(key))

    def exists(self, key: str) -> bool:
        def attempt() -> bool:
            try:
                self._client.head_object(Bucket=self.bucket, Key=self._key(key))
            except Exception as error:
                if _code(error) in MISSING:
                    return False
                raise
            return True

        return self._retry(key, attempt)

    def list(self, prefix: str) -> Iterator[str]:
        for key, _ in self.sizes(prefix):
            yield key

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        start = self._folder(prefix)
        cut = len(self.prefix) + 1 if self.prefix else 0
        for page in self._pages(prefix, Prefix=start):
            for entry in page.get("Contents", []):
                yield _unescaped(entry["Key"][cut:]), entry["Size"]

    def folders(self, prefix: str) -> Iterator[str]:
        start = self._folder(prefix)
        for page in self._pages(prefix, Prefix=start, Delimiter="/"):
            for entry in page.get("CommonPrefixes", []):
                yield _unescaped(entry["Prefix"][len(start) :].rstrip("/"))

    def delete(self, key: str) -> None:
        self._retry(key, lambda: self._client.delete_object(Bucket=self.bucket, Key=self._key(key)))

    def upload_file(self, key: str, source: Path) -> None:
        stamps = {CONTENT: sha256_file(source)} if source.stat().st_size <= STAMPED else {}
        place = self.bucket, self._key(key)

        def attempt() -> None:
            self._transfers.upload_file(str(source), *place, ExtraArgs={"Metadata": stamps})

        self._retry(key, attempt, tries=TRANSFERS)

    def download_file(self, key: str, target: Path, sha256: str | None = None, moved: Moved = unseen) -> None:
        def attempt() -> None:
            with appear(target) as temporary:
                try:
                    place = self.bucket, self._key(key), str(temporary)
                    self._transfers.download_file(*place, Callback=lambda count: moved())
                except Exception as error:
                    if _code(error) in MISSING:
                        raise StoreError(f"--store {self.url}: no object {key}") from None
                    raise
                if sha256 is not None and (found := sha256_file(temporary, moved)) != sha256:
                    raise _Damaged(f"sha256 {found[:12]}, its manifest says {sha256[:12]}")

        self._retry(key, attempt, tries=TRANSFERS)

    def local_path(self, key: str) -> Path | None:
        return None

    def check(self) -> None:
        self._retry("", lambda: self._client.head_bucket(Bucket=self.bucket), patience_s=min(self.patience_s, 3.0))
        if self.put_if_absent(PROBE, b"recua") and self.put_if_absent(PROBE, b"recua"):
            raise self._unconditional()

    def hurry(self, patience_s: float) -> None:
        self.patience_s = min(self.patience_s, patience_s)

    @functools.cached_property
    def _transfers(self) -> Any:
        """A client for files, in parts: boto3 retries a part, so that a lost part does not cost the whole file."""
        return _client(5, *self._timeouts)

    def check_key(self, key: str) -> None:
        self._key(key)

    def _key(self, key: str) -> str:
        whole = ODD.sub(_escape, "/".join(([self.prefix] if self.prefix else []) + checked_key(key)))
        if (size := len(whole.encode())) > LONGEST_KEY:
            raise UserError(
                f"--store {self.url}: {key!r} would be a key of {size} bytes, S3 allows {LONGEST_KEY}: use shorter "
                "names, or a shorter prefix in --store"
            )
        return whole

    def _folder(self, prefix: str) -> str:
        key = self._key(prefix)
        return f"{key}/" if key else ""

    def _read(self, key: str) -> bytes | None:
        try:
            answer = self._client.get_object(Bucket=self.bucket, Key=self._key(key))
        except Exception as error:
            if _code(error) in MISSING:
                return None
            raise
        data: bytes = answer["Body"].read()
        expected = answer["Metadata"].get(CONTENT)
        if expected is not None and hashlib.sha256(data).hexdigest() != expected:
            raise _Damaged(f"{len(data)} bytes, not those that were written")
        return data

    def _writer(self, key: str) -> str | None:
        """The writer's stamp of the existing object."""
        try:
            stamps: dict[str, str] = self._client.head_object(Bucket=self.bucket, Key=self._key(key))["Metadata"]
        except Exception as error:
            if _code(error) in MISSING:
                return None
            raise
        return stamps.get(WRITER)

    def _pages(self, prefix: str, **query: str) -> Iterator[dict[str, Any]]:
        token: dict[str, str] = {}
        while True:
            page = self._retry(prefix, functools.partial(self._page, {"Bucket": self.bucket, **query, **token}))
            yield page
            if not page["IsTruncated"]:
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, query: dict[str, str]) -> dict[str, Any]:
        page: dict[str, Any] = self._client.list_objects_v2(**query)
        if "IsTruncated" not in page:  # boto3 reads an empty answer as an empty listing
            raise _Damaged("an incomplete listing")
        return page

    def _retry(self, key: str, attempt: Callable[[], T], tries: int = 1, patience_s: float | None = None) -> T:
        """Run `attempt` until it succeeds, fails for good, or has failed for `patience_s` (and `tries` times), with
        backoff and jitter. An object that arrives damaged `DAMAGED_READS` times counts as damaged in the store."""
        failed_since: float | None = None
        failures = damaged = 0
        while True:
            try:
                return attempt()
            except RecuaError:
                raise
            except Exception as error:
                failed_since = failed_since or time.monotonic()
                failures += 1
                damaged += _is_damaged(error)
                pause = min(0.05 * 2 ** min(failures - 1, 10), 5.0) * random.uniform(0.5, 1.0)
                patience = self.patience_s if patience_s is None else min(patience_s, self.patience_s)
                over = time.monotonic() + pause > failed_since + patience and failures >= tries
                if over or damaged >= DAMAGED_READS or not _may_pass(error):
                    raise self._explain(key, error) from error
            time.sleep(pause)

    def _unconditional(self) -> StoreError:
        return StoreError(
            f"--store {self.url}: this server ignores conditional writes (If-None-Match), so two drivers could commit "
            "the same step; use a server that honours them, or a folder"
        )

    def _explain(self, key: str, error: Exception) -> StoreError:
        what = f"--store {self.url}" + (f": {key}" if key else "")
        code = _code(error)
        if code == "NotImplemented":
            return self._unconditional()
        if code in MISSING and not key:
            return StoreError(f"{what}: the bucket does not exist")
        if code in {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}:
            return StoreError(f"{what}: access denied; check the credentials that boto3 finds and the bucket's policy")
        if type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError"}:
            return StoreError(f"{what}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile")
        if _is_damaged(error):
            return StoreError(f"{what} is damaged: {error}")
        reason = code or type(error).__name__
        return StoreError(f"{what}: unreachable or failing ({reason}); check --store and AWS_ENDPOINT_URL")


def _escape(odd: re.Match[str]) -> str:
    return f"%%{os.fsencode(odd[0]).hex().upper()}"


def _unescaped(key: str) -> str:
    return ESCAPED.sub(lambda odd: os.fsdecode(bytes.fromhex(odd[1])), key)


class _Damaged(Exception):
    """The answer differs from what was stored: damaged on its way (a retry succeeds), or in the store."""


def _is_damaged(error: Exception) -> bool:
    """Whether our own stamps, or the checksums that boto3 requests, reveal damage."""
    return isinstance(error, _Damaged) or type(error).__name__ == "FlexibleChecksumError"


@functools.cache
def _descriptions(folders: str | None) -> Any:
    """Reads boto3's descriptions of S3, megabytes of JSON, once and not for every client."""
    from botocore.loaders import create_loader

    return create_loader(folders)


def _client(tries: int, connect_timeout_s: float, read_timeout_s: float) -> Any:
    import boto3
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=connect_timeout_s,
        read_timeout=read_timeout_s,
        retries={"total_max_attempts": tries, "mode": "standard"},
        max_pool_connections=32,
    )
    try:
        session = botocore.session.get_session()
        session.register_component("data_loader", _descriptions(session.get_config_variable("data_path")))
        return boto3.session.Session(botocore_session=session).client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"--store s3://: cannot set up S3: {error}") from None


def _code(error: Exception) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: after throttling, 5xx, and every failure below HTTP."""
    code = _code(error)
    if code:
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]  # type: ignore[attr-defined]
            if (int(status) >= 500 and int(status) != 501) or int(status) == 429:
                return True
        return code in PASSING
    return type(error).__name__ not in {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError"}
