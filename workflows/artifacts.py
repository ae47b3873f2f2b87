"""Artifacts: folders of files that a step produced, kept by reference and never changed again.

A body writes into `runs/<run>/attempts/<uuid>/<name>/data/`. Sealing hashes every file and writes `manifest.json`
beside `data/` last; the digest is the sha256 of the canonical file list, so equal content has an equal digest wherever
it was made. Attempts never share a folder, and only the commit record of a call says which attempt won: a half-written
upload is never read by anybody.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import StoreError, UserError
from infra.storage import Store, open_store, sha256_file, sync_file

FORMAT = 1
THREADS = 8


def default_cache() -> str:
    """Where artifacts of a remote store are kept after their download."""
    return str(Path.home() / ".recua" / "cache")


@dataclass(frozen=True)
class ArtifactSource:
    """Where artifacts are read from: a store, and a local folder for what comes from a remote one."""

    store_url: str
    cache: str


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: path relative to the artifact with `/`, size in bytes, hex sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """A sealed folder. Two artifacts are equal when their content is; `digest` also serves as a model's version."""

    digest: str
    meta: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)
    name: str = field(default="", compare=False)
    location: str = field(default="", compare=False, repr=False)
    """Key of the artifact's folder in the store, e.g. `runs/r/attempts/5f.../corpus`."""
    source: ArtifactSource | None = field(default=None, compare=False, repr=False)

    def path(self) -> Path:
        """A local folder with this artifact's files, checked against the manifest. Read it, never write to it.

        A folder store is read in place; from S3 the files come into a cache first.

        Raises:
            StoreError: a file is missing, damaged or cannot be fetched.
        """
        assert self.source is not None, "this artifact is not bound to a store"
        store = open_store(self.source.store_url)
        entries = read_manifest(store, self)
        local = store.local_path(f"{self.location}/data")
        if local is not None:
            verify_folder(local, entries, f"--store {store.url}: artifact {self.name}")
            return local
        return _cached(store, self, entries, Path(self.source.cache))

    def record(self) -> dict[str, Any]:
        """What the journal keeps."""
        return {"digest": self.digest, "name": self.name, "location": self.location, "meta": self.meta}

    @classmethod
    def from_record(cls, record: dict[str, Any], source: ArtifactSource | None) -> "Artifact":
        return cls(record["digest"], record["meta"], record["name"], record["location"], source)


class ArtifactWriter:
    """An artifact while it is being written: put files under `path`, then `seal()`."""

    def __init__(
        self, store: Store, source: ArtifactSource, location: str, scratch: Path, on_file: Callable[[], None]
    ) -> None:
        self._store = store
        self._source = source
        self._location = location
        self._on_file = on_file
        self._sealed = False
        self.path = store.local_path(f"{location}/data") or scratch / location.rsplit("/", 1)[-1]
        self.path.mkdir(parents=True)

    def seal(self, **meta: Any) -> Artifact:
        """Hash, upload (on a folder store nothing is copied), and name the content. `meta`: values that a step could
        return; they are part of what the artifact is, so keep times, hosts and paths out of them where equal content is
        to be equal.

        Raises:
            UserError: sealed before, metadata that cannot be kept, or something in the folder is neither a file nor a
                folder.
            StoreError: the upload failed.
        """
        from workflows.values import encode  # which knows artifacts

        if self._sealed:
            raise UserError(f"artifact {self._location.rsplit('/', 1)[-1]} is sealed already")
        self._sealed = True
        kept = encode(meta, f"artifact {self._location.rsplit('/', 1)[-1]}: seal")
        _materialise_links(self.path)
        remote = self._store.local_path(self._location) is None
        entries = []
        for entry, file in _entries(self.path):
            if remote:
                self._store.upload_file(f"{self._location}/data/{entry.path}", file)
            else:
                sync_file(file)
            entries.append(entry)
            self._on_file()
        digest = manifest_digest(entries)
        manifest = {"format": FORMAT, "digest": digest, "files": [vars(entry) for entry in entries], "meta": kept}
        self._store.put(f"{self._location}/manifest.json", _json(manifest))
        return Artifact(digest, meta, self._location.rsplit("/", 1)[-1], self._location, self._source)


def manifest_digest(entries: list[FileEntry]) -> str:
    """sha256 of the canonical file list: content only, no names of runs, no times."""
    rows = sorted((entry.path, entry.size, entry.sha256) for entry in entries)
    return hashlib.sha256(_json(rows)).hexdigest()


def read_manifest(store: Store, artifact: Artifact) -> list[FileEntry]:
    """The files of a sealed artifact.

    Raises:
        StoreError: there is no manifest, or it is not the one that was committed.
    """
    what = f"--store {store.url}: artifact {artifact.name or artifact.digest[:12]} ({artifact.location})"
    raw = store.get(f"{artifact.location}/manifest.json")
    if raw is None:
        raise StoreError(f"{what} is not in the store (any more)")
    try:
        entries = [FileEntry(**item) for item in json.loads(raw)["files"]]
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{what}: its manifest is damaged") from None
    if manifest_digest(entries) != artifact.digest:
        raise StoreError(f"{what}: its manifest is not the one that was committed")
    return entries


def verify_folder(folder: Path, entries: list[FileEntry], what: str) -> None:
    """Compare every file's size, then checksum.

    Raises:
        StoreError: a missing, resized or damaged file.
    """
    for entry in entries:
        file = folder / entry.path
        if not file.is_file():
            raise StoreError(f"{what}: {entry.path} is missing")
        if (size := file.stat().st_size) != entry.size:
            raise StoreError(f"{what}: {entry.path} has {size} bytes, its manifest says {entry.size}")

    def check(entry: FileEntry) -> None:
        if sha256_file(folder / entry.path) != entry.sha256:
            raise StoreError(f"{what}: {entry.path} is damaged (checksum)")

    _for_each(check, entries)


def _cached(store: Store, artifact: Artifact, entries: list[FileEntry], cache: Path) -> Path:
    """Download once per machine: a lock per digest, and a rename when everything is there and verified."""
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / artifact.digest
    with _lock(cache / f".{artifact.digest}.lock"):
        if target.is_dir():
            with contextlib.suppress(StoreError):
                verify_folder(target, entries, "cache")
                return target
            shutil.rmtree(target)
        partial = cache / f".{artifact.digest}-{uuid.uuid4().hex[:8]}"
        try:
            partial.mkdir()

            def fetch(entry: FileEntry) -> None:
                key = f"{artifact.location}/data/{entry.path}"
                store.download_file(key, partial / entry.path, entry.sha256)

            _for_each(fetch, entries)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _for_each(work: Callable[[FileEntry], None], entries: list[FileEntry]) -> None:
    if len(entries) < 2:
        for entry in entries:
            work(entry)
        return
    with ThreadPoolExecutor(min(THREADS, len(entries))) as pool:
        for _ in pool.map(work, entries):
            pass


def _entries(folder: Path) -> Iterator[tuple[FileEntry, Path]]:
    for file in sorted(folder.rglob("*")):
        if file.is_dir():
            continue
        if not file.is_file():
            raise UserError(f"{file}: an artifact holds files only")
        relative = file.relative_to(folder).as_posix()
        yield FileEntry(relative, file.stat().st_size, sha256_file(file)), file


def _materialise_links(folder: Path) -> None:
    """Replace symbolic links by what they point to: an artifact stands alone."""
    for link in [path for path in folder.rglob("*") if path.is_symlink()]:
        target = link.resolve()
        if not target.exists():
            raise UserError(f"{link}: an artifact cannot hold a dangling link")
        link.unlink()
        if target.is_dir():
            shutil.copytree(target, link)
        else:
            shutil.copyfile(target, link)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
