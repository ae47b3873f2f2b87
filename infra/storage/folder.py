"""A store in a local or shared folder."""

import contextlib
import itertools
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from infra.errors import ConfigError, StoreError, UserError
from infra.storage.files import (
    CHUNK,
    LONGEST_NAME,
    TEMPORARY_PREFIX,
    Moved,
    appear,
    checked_key,
    sync_file,
    sync_folder,
    unseen,
)
from infra.storage.store import check_sha256


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
