"""Object storage: one small protocol, a folder or `s3://bucket/prefix` behind it.

Keys are relative, `/`-separated paths. The rest of recua builds on `put_if_absent`: of any number of writers of one
key, in any number of processes on any number of nodes, exactly one succeeds, and a reader sees either nothing or the
whole object. A folder implements it by a complete temporary file and `link(2)`; S3 by a conditional PUT
(`If-None-Match: *`).
"""

import contextlib
import itertools
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from infra.errors import ConfigError, StoreError, UserError
from infra.files import (
    CHUNK,
    TEMPORARY_PREFIX,
    Moved,
    appear,
    checked_key,
    remembered_sha256,
    sha256_file,
    sync_file,
    sync_folder,
    unseen,
    write_text,
)

__all__ = [
    "LONGEST_NAME",
    "TEMPORARY_PREFIX",
    "FolderStore",
    "Moved",
    "Store",
    "appear",
    "default_store",
    "open_store",
    "parse_store",
    "remembered_sha256",
    "sha256_file",
    "sync_file",
    "sync_folder",
    "unseen",
    "write_text",
]

LONGEST_NAME = 255
"""Most bytes of one part of a path, on nearly every file system."""


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


def open_store(url: str | Path) -> Store:
    """A store from `s3://bucket[/prefix]`, `file:///path` or a plain path (made absolute).

    Raises:
        ConfigError: an empty text, another scheme, or a URL without its slashes or its bucket.
    """
    scheme, rest = parse_store(str(url))
    if scheme == "s3":
        from infra.s3 import S3Store

        return S3Store(f"s3://{rest}")
    return FolderStore(Path(rest))


def parse_store(text: str, setting: str = "--store") -> tuple[str, str]:
    """("s3", "bucket/prefix") or ("file", path) from `text`, the value of `setting`.

    A scheme without its two slashes is refused: `Path` turns a URL into that, and it would name a folder `s3:`.

    Raises:
        ConfigError: as `open_store`.
    """
    given = f"{setting} {text}".strip()
    scheme, separator, rest = text.partition(":")
    scheme = scheme.strip().lower()
    if not text.strip():
        raise ConfigError(f"{setting} is empty: name a folder or s3://bucket/prefix")
    if found := re.match(r"(s3|file)//+", text.strip(), re.IGNORECASE):
        raise ConfigError(f"{given}: a colon is missing; write it as {found[1].lower()}:{text.strip()[found.end(1) :]}")
    if not separator or not (rest.startswith("/") or scheme in ("s3", "file")) or "/" in scheme:
        return "file", text  # a folder, colons in its name or not
    if scheme == "file" and rest.startswith("/"):
        host, _, path = rest.removeprefix("//").partition("/") if rest.startswith("//") else ("", "", rest.lstrip("/"))
        if host in ("", "localhost"):
            return "file", f"/{unquote(path)}"
        raise ConfigError(f"{given}: {host} is read as a host; write file:///{host}/{path}, or leave file:// out")
    if scheme not in ("s3", "file"):
        raise ConfigError(f"{given}: unknown scheme {scheme}://; use a folder or s3://bucket/prefix")
    if scheme == "file" or not rest.startswith("//"):
        right = "s3://bucket/prefix" if scheme == "s3" else "file:///folder"
        raise ConfigError(f"{given}: this would create a folder of that name; write it as {right}")
    bucket = rest.removeprefix("//").partition("/")[0]
    if not bucket:
        raise ConfigError(f"{given}: no bucket; write it as s3://bucket/prefix")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,255}|arn:[\w:.-]+", bucket):
        raise ConfigError(f"{given}: {bucket!r} cannot be a bucket's name; write it as s3://bucket/prefix")
    return "s3", rest.removeprefix("//")


def default_store() -> str:
    """The default folder of runs. Absolute, because jobs run in a copy of the working folder."""
    return str(Path.home() / ".recua" / "store")


class FolderStore:
    """A store in a local or shared folder."""

    def __init__(self, root: Path) -> None:
        try:
            self.root = root.expanduser().absolute()
        except RuntimeError:
            raise ConfigError(f"--store {root}: this user has no home folder") from None
        self.url = str(self.root)
        self._made: set[str] = set()
        self._mine = f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        self._numbers = itertools.count()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        target = self._where(key)
        folder = os.path.dirname(target)
        with self._errors(key):
            temporary = self._write_temporary(folder, data, durable=True)
            try:
                os.link(temporary, target)
            except FileExistsError:
                if os.stat(temporary).st_nlink < 2:
                    return False  # else our own link succeeded: a network file system lost the answer and retried
            finally:
                os.unlink(temporary)
            sync_folder(folder)
            return True

    def put(self, key: str, data: bytes, durable: bool = True) -> None:
        target = self._where(key)
        folder = os.path.dirname(target)
        with self._errors(key):
            os.replace(self._write_temporary(folder, data, durable), target)
            if durable:
                sync_folder(folder)

    def get(self, key: str) -> bytes | None:
        with self._errors(key):
            try:
                with open(self._where(key), "rb", buffering=0) as stream:
                    return stream.readall()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def exists(self, key: str) -> bool:
        with self._errors(key):
            return os.path.isfile(self._where(key))

    def list(self, prefix: str) -> Iterator[str]:
        base = self._path(prefix)
        with self._errors(prefix):
            for folder, folders, files in os.walk(base):
                folders.sort()
                start = os.path.relpath(folder, self.root)
                for name in sorted(files):
                    if not name.startswith(TEMPORARY_PREFIX):
                        yield name if start == "." else f"{start}/{name}"

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        for key in self.list(prefix):
            with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                yield key, os.stat(self._path(key)).st_size

    def folders(self, prefix: str) -> Iterator[str]:
        with self._errors(prefix):
            try:
                entries = sorted(entry.name for entry in os.scandir(self._path(prefix)) if entry.is_dir())
            except FileNotFoundError:
                entries = []
        yield from entries

    def delete(self, key: str) -> None:
        with self._errors(key):
            self._path(key).unlink(missing_ok=True)

    def upload_file(self, key: str, source: Path) -> None:
        target = self._path(key)
        with self._errors(key):
            self._make(str(target.parent))
            temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
            try:
                shutil.copyfile(source, temporary)
                sync_file(temporary)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(target.parent)

    def download_file(self, key: str, target: Path, sha256: str | None = None, moved: Moved = unseen) -> None:
        source = self._path(key)
        with self._errors(key), appear(target) as temporary:
            try:
                stream = source.open("rb")
            except FileNotFoundError:
                raise StoreError(f"--store {self.url}: no object {key}") from None
            with stream, temporary.open("wb") as copy:
                while piece := stream.read(8 * CHUNK):
                    copy.write(piece)
                    moved()
            check_sha256(temporary, sha256, self.url, key, moved)

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def check_key(self, key: str) -> None:
        for part in checked_key(key):
            if (size := len(os.fsencode(part))) > LONGEST_NAME:
                raise UserError(f"--store {self.url}: {part!r} has {size} bytes, a file name at most {LONGEST_NAME}")

    def check(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"--store {self.url}: is not a folder; name one, or s3://bucket/prefix")
        probe = f"{TEMPORARY_PREFIX}check-{uuid.uuid4().hex}"
        self.put(probe, b"recua", durable=False)
        self.delete(probe)

    def hurry(self, patience_s: float) -> None:
        pass  # a folder is not retried

    def _path(self, key: str) -> Path:
        return self.root.joinpath(*checked_key(key))

    def _where(self, key: str) -> str:
        """`_path` as text, which is faster for thousands of small objects."""
        checked_key(key)
        return f"{self.url}/{key}"

    def _make(self, folder: str) -> None:
        if folder not in self._made:
            os.makedirs(folder, exist_ok=True)
            self._made.add(folder)

    def _write_temporary(self, folder: str, data: bytes, durable: bool) -> str:
        self._make(folder)
        temporary = f"{folder}/{self._mine}-{os.getpid()}-{next(self._numbers)}"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileNotFoundError:  # the folder was removed since `_make` created it
            os.makedirs(folder, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            if durable:
                os.fsync(descriptor)
        except BaseException:  # do not leave half a file on a full disk
            os.unlink(temporary)
            raise
        finally:
            os.close(descriptor)
        return temporary

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise StoreError(f"--store {self.url}: cannot use {key}: {reason}") from error


def check_sha256(path: Path, expected: str | None, url: str, key: str, moved: Moved = unseen) -> None:
    """Raise StoreError if the content differs from its manifest's checksum."""
    if expected is not None and (found := sha256_file(path, moved)) != expected:
        raise StoreError(f"--store {url}: {key} is damaged: sha256 {found[:12]}, its manifest says {expected[:12]}")
