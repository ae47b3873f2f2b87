"""The protocol that a folder and S3 both implement."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from infra.errors import StoreError
from infra.storage.files import (
    Moved,
    sha256_file,
    unseen,
)


class Store(Protocol):
    """The store protocol. Every method raises StoreError, naming `--store`, if the store keeps failing."""

    url: str

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write `key` unless it exists. True: this call wrote it (durably); False: it existed."""
        ...

    def put(self, key: str, data: bytes, durable: bool = True) -> None:
        """Write or replace `key` atomically. With `durable=False` a power cut may lose it (heartbeats, indexes)."""
        ...

    def get(self, key: str) -> bytes | None:
        """The object, or None if it does not exist."""
        ...

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str) -> Iterator[str]:
        """All keys under the folder `prefix` (whole names only), sorted."""
        ...

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key, size in bytes) of every key that `list` gives."""
        ...

    def folders(self, prefix: str) -> Iterator[str]:
        """Names of the folders directly under the folder `prefix`, sorted, without listing their contents."""
        ...

    def delete(self, key: str) -> None:
        """Remove `key`; no error if it does not exist."""
        ...

    def upload_file(self, key: str, source: Path) -> None:
        """Store a file's content. A reader sees all of it or nothing."""
        ...

    def download_file(self, key: str, target: Path, sha256: str | None = None, moved: Moved = unseen) -> None:
        """Fetch into `target`, which appears whole or not at all; a wrong checksum is a StoreError.

        `moved` is called after every few MiB, from any thread.
        """
        ...

    def local_path(self, key: str) -> Path | None:
        """The local path of `key`, which need not exist; None if the store is not a folder."""
        ...

    def check_key(self, key: str) -> None:
        """Check that this store can keep `key`, before anything is written.

        Raises:
            UserError: the key, or a name in it, is too long.
        """
        ...

    def check(self) -> None:
        """Raise a one-line error if the store cannot be read and written."""
        ...

    def hurry(self, patience_s: float) -> None:
        """From now on retry for `patience_s` at most, in every thread: the program is ending."""
        ...


def check_sha256(path: Path, expected: str | None, url: str, key: str, moved: Moved = unseen) -> None:
    """Raise StoreError if the content differs from its manifest's checksum."""
    if expected is not None and (found := sha256_file(path, moved)) != expected:
        raise StoreError(f"--store {url}: {key} is damaged: sha256 {found[:12]}, its manifest says {expected[:12]}")
