"""Files that appear whole, are flushed to the disk, and are identified by their checksum."""

import contextlib
import functools
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

CHUNK = 1 << 20
SETTLED_NS = 2 * 10**9
TEMPORARY_PREFIX = ".tmp-"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The first bytes of the pointer that Git LFS keeps in place of a large file."""
Moved = Callable[[], None]
"""Called when a large transfer makes progress."""


def unseen() -> None:
    """Ignores progress."""


def sha256_file(path: Path, moved: Moved = unseen) -> str:
    """Hex digest of a file's content; `moved` is called after every few MiB."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            moved()
    return digest.hexdigest()


def remembered_sha256(path: Path) -> str:
    """`sha256_file`, without reading if this process has read the file and its inode, size and times are the same.

    A file that was written in the last two seconds is read again: a file system's clock may be too coarse to show a
    change.
    """
    status = path.stat()
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < SETTLED_NS:
        return sha256_file(path)
    times = status.st_mtime_ns, status.st_ctime_ns
    return _sha256_as_it_was(path.resolve(), status.st_dev, status.st_ino, status.st_size, *times)


@functools.lru_cache(1 << 16)
def _sha256_as_it_was(path: Path, device: int, inode: int, size: int, mtime_ns: int, ctime_ns: int) -> str:
    return sha256_file(path)


def sync_file(path: Path | str) -> None:
    """Flush a finished file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path | str) -> None:
    """Flush a folder's list of names to the disk."""
    with contextlib.suppress(OSError):  # some network file systems refuse fsync on a folder
        sync_file(folder)


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all, and flush it to the disk."""
    with appear(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        sync_file(temporary)


@contextlib.contextmanager
def appear(target: Path) -> Iterator[Path]:
    """A temporary file beside `target` that is renamed to `target` when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def checked_key(key: str) -> list[str]:
    """The parts of a key. An assert, because keys are made by recua, never by users."""
    parts = [part for part in key.split("/") if part]
    assert ".." not in parts and not key.startswith("/"), f"not a store key: {key!r}"
    return parts


LONGEST_NAME = 255
"""Bytes of one part of a path, on nearly every file system."""
