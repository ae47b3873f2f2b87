"""What recua needs of a store: a folder and S3 both give it."""

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
    """What recua needs of a store. Every method raises StoreError, naming `--store`, when the store fails for good."""

    url: str

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write `key` unless it exists. True: this call wrote it (durably); False: it was there already."""
        ...

    def put(self, key: str, data: bytes, durable: bool = True) -> None:
        """Write or replace `key` atomically. `durable=False` may be lost in a power cut (heartbeats, indexes)."""
        ...

    def get(self, key: str) -> bytes | None:
        """The object, or None where there is none."""
        ...

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str) -> Iterator[str]:
        """All keys that start with the folder `prefix` (no partial names), sorted."""
        ...

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key, bytes) of everything that `list` gives."""
        ...

    def folders(self, prefix: str) -> Iterator[str]:
        """Names of the folders directly under the folder `prefix`, sorted, without walking into them."""
        ...

    def delete(self, key: str) -> None:
        """Remove `key`; no error where there is none."""
        ...

    def upload_file(self, key: str, source: Path) -> None:
        """Store a file's content. A reader never sees half of it."""
        ...

    def download_file(self, key: str, target: Path, sha256: str | None = None, moved: Moved = unseen) -> None:
        """Fetch into `target`, which appears whole or not at all; a wrong checksum is a StoreError.

        `moved` is called after every few MiB, from any thread.
        """
        ...

    def local_path(self, key: str) -> Path | None:
        """Where `key` lies (or would lie) as a local file or folder; None where the store is not a folder."""
        ...

    def check_key(self, key: str) -> None:
        """Tell before anything is written where `key` cannot be kept here.

        Raises:
            UserError: a name in it, or all of it, is too long.
        """
        ...

    def check(self) -> None:
        """Fail fast, with one line, where the store cannot be read and written."""
        ...

    def hurry(self, patience_s: float) -> None:
        """From now on retry for `patience_s` at most, in every thread: the program is leaving."""
        ...


def check_sha256(path: Path, expected: str | None, url: str, key: str, moved: Moved = unseen) -> None:
    """Raise StoreError where the content is not what its manifest says."""
    if expected is not None and (found := sha256_file(path, moved)) != expected:
        raise StoreError(f"--store {url}: {key} is damaged: sha256 {found[:12]}, its manifest says {expected[:12]}")
