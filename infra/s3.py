"""`s3://bucket/prefix` behind the Store protocol, for S3 and everything that speaks it with conditional writes.

Credentials, region and endpoint come from where boto3 looks (`AWS_ENDPOINT_URL` for another server); none of them is
ever logged or stored. boto3 is imported when the first store is opened.
"""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from infra.errors import ConfigError, StoreError
from infra.storage import appear, check_sha256, checked_key

T = TypeVar("T")

MISSING = {"404", "NoSuchKey", "NotFound"}
LOST = {"412", "PreconditionFailed"}
PASSING = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "RequestTimeTooSkewed", "409"}
PASSING |= {"ConditionalRequestConflict", "ThrottlingException", "Throttling", "500", "502", "503", "504"}


class S3Store:
    """A store in an S3 bucket. `patience_s`: how long a failing request is retried before it is a StoreError."""

    def __init__(self, url: str, patience_s: float = 60.0, connect_timeout_s: float = 5.0) -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket:
            raise ConfigError(f"--store {url}: no bucket; write it as s3://bucket/prefix")
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self.patience_s = patience_s
        self._client = _client(connect_timeout_s)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        first = True

        def attempt() -> bool:
            nonlocal first
            repeated, first = not first, False
            try:
                self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*")
            except Exception as error:
                if _code(error) not in LOST:
                    raise
                # An earlier attempt may have been written although its answer was lost: then the object is ours.
                return repeated and self._read(key) == data
            return True

        return self._retry(key, attempt)

    def put(self, key: str, data: bytes, durable: bool = True) -> None:
        self._retry(key, lambda: self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data))

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
        start = self._folder(prefix)
        cut = len(self.prefix) + 1 if self.prefix else 0
        for page in self._pages(prefix, Prefix=start):
            for entry in page.get("Contents", []):
                yield entry["Key"][cut:]

    def folders(self, prefix: str) -> Iterator[str]:
        start = self._folder(prefix)
        for page in self._pages(prefix, Prefix=start, Delimiter="/"):
            for entry in page.get("CommonPrefixes", []):
                yield entry["Prefix"][len(start) :].rstrip("/")

    def delete(self, key: str) -> None:
        self._retry(key, lambda: self._client.delete_object(Bucket=self.bucket, Key=self._key(key)))

    def upload_file(self, key: str, source: Path) -> None:
        self._retry(key, lambda: self._client.upload_file(str(source), self.bucket, self._key(key)))

    def download_file(self, key: str, target: Path, sha256: str | None = None) -> None:
        def attempt() -> None:
            with appear(target) as temporary:
                try:
                    self._client.download_file(self.bucket, self._key(key), str(temporary))
                except Exception as error:
                    if _code(error) in MISSING:
                        raise StoreError(f"--store {self.url}: no object {key}") from None
                    raise
                check_sha256(temporary, sha256, self.url, key)

        self._retry(key, attempt)

    def local_path(self, key: str) -> Path | None:
        return None

    def check(self) -> None:
        patience, self.patience_s = self.patience_s, min(self.patience_s, 3.0)
        try:
            self._retry("", lambda: self._client.head_bucket(Bucket=self.bucket))
        finally:
            self.patience_s = patience

    def _key(self, key: str) -> str:
        return "/".join(([self.prefix] if self.prefix else []) + checked_key(key))

    def _folder(self, prefix: str) -> str:
        key = self._key(prefix)
        return f"{key}/" if key else ""

    def _read(self, key: str) -> bytes | None:
        try:
            return self._client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
        except Exception as error:
            if _code(error) in MISSING:
                return None
            raise

    def _pages(self, prefix: str, **query: str) -> Iterator[dict[str, Any]]:
        token: dict[str, str] = {}
        while True:
            ask = {"Bucket": self.bucket, **query, **token}
            page = self._retry(prefix, lambda ask=ask: self._client.list_objects_v2(**ask))  # type: ignore[misc]
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _retry(self, key: str, attempt: Callable[[], T]) -> T:
        """Run `attempt` until it succeeds, fails for good, or `patience_s` is over (backoff with jitter)."""
        deadline = time.monotonic() + self.patience_s
        pause = 0.1
        while True:
            try:
                return attempt()
            except StoreError:
                raise
            except Exception as error:
                if not _may_pass(error) or time.monotonic() + pause > deadline:
                    raise self._explain(key, error) from error
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, 5.0)

    def _explain(self, key: str, error: Exception) -> StoreError:
        what = f"--store {self.url}" + (f": {key}" if key else "")
        code = _code(error)
        if code in MISSING and not key:
            return StoreError(f"{what}: the bucket does not exist")
        if code in {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}:
            return StoreError(f"{what}: access denied; check the credentials that boto3 finds and the bucket's policy")
        if type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError"}:
            return StoreError(f"{what}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile")
        reason = f"{code}" if code else type(error).__name__
        return StoreError(f"{what}: unreachable or failing ({reason}); check --store and AWS_ENDPOINT_URL")


def _client(connect_timeout_s: float) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=connect_timeout_s,
        read_timeout=60,
        retries={"total_max_attempts": 1},  # _retry does it: boto3 would repeat a conditional write blindly
        max_pool_connections=32,
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"--store s3://: cannot set up S3: {error}") from None


def _code(error: Exception) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: throttling, 5xx, and everything below HTTP."""
    code = _code(error)
    if code:
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]  # type: ignore[attr-defined]
            if int(status) >= 500 or int(status) == 429:
                return True
        return code in PASSING
    return type(error).__name__ not in {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError"}
