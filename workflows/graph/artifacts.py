"""Artifacts: folders of files that a step produced, passed by reference and immutable.

`manifest.json` beside an artifact's `data/` lists its files. The digest is the sha256 of the canonical list, so that
equal content always has an equal digest. workflows.graph.artifact_writer writes artifacts.

A folder and S3 give back the same: files with their names and execute bits, and empty folders. A link comes back as its
target.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import StoreError
from infra.storage import Store, open_store
from infra.storage.files import sha256_file

FORMAT = 1
THREADS = 8


def default_cache() -> str:
    """The local folder for downloaded artifacts of a remote store."""
    return str(Path.home() / ".recua" / "cache")


@dataclass(frozen=True)
class ArtifactSource:
    """A source of artifacts: a store, and a local folder for downloads from a remote store."""

    store_url: str
    cache: str


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: path relative to the artifact with `/`, size in bytes, hex sha256, execute bit."""

    path: str
    size: int
    sha256: str
    executable: bool = False

    def row(self) -> dict[str, Any]:
        """The file's entry in a manifest."""
        row = {"path": self.path, "size": self.size, "sha256": self.sha256}
        return {**row, "executable": True} if self.executable else row


@dataclass(frozen=True)
class Artifact:
    """A sealed folder. Artifacts of equal content are equal; `digest` also serves as a model's version."""

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
        entries, empty = _manifest(store, self)
        local = store.local_path(f"{self.location}/data")
        what = f"--store {store.url}: artifact {self.name}"
        if local is not None:
            verify_folder(local, entries, what)
        else:
            local = _cached(store, self, entries, Path(self.source.cache))
        _complete(local, entries, empty, what)
        return local

    def record(self) -> dict[str, Any]:
        """The artifact's record in the journal."""
        return {"digest": self.digest, "name": self.name, "location": self.location, "meta": self.meta}

    @classmethod
    def from_record(cls, record: dict[str, Any], source: ArtifactSource | None) -> "Artifact":
        return cls(record["digest"], record["meta"], record["name"], record["location"], source)


def manifest_digest(entries: Sequence[FileEntry], empty: Iterable[str] = ()) -> str:
    """sha256 of the canonical file list: content only, no names of runs, no times. `empty`: folders."""
    rows: list[tuple[Any, ...]] = [(entry.path, entry.size, entry.sha256) for entry in entries if not entry.executable]
    rows += [(entry.path, entry.size, entry.sha256, "executable") for entry in entries if entry.executable]
    rows += [(f"{path}/", 0, "") for path in empty]
    return hashlib.sha256(json_bytes(sorted(rows))).hexdigest()


def read_manifest(store: Store, artifact: Artifact) -> list[FileEntry]:
    """The files of a sealed artifact.

    Raises:
        StoreError: there is no manifest, or not the committed one.
    """
    return _manifest(store, artifact)[0]


def _manifest(store: Store, artifact: Artifact) -> tuple[list[FileEntry], list[str]]:
    """The files, and the empty folders."""
    what = f"--store {store.url}: artifact {artifact.name or artifact.digest[:12]} ({artifact.location})"
    raw = store.get(f"{artifact.location}/manifest.json")
    if raw is None:
        raise StoreError(f"{what} is not in the store (any more)")
    try:
        manifest = json.loads(raw)
        entries = [FileEntry(**item) for item in manifest["files"]]
        empty: list[str] = manifest.get("empty_folders", [])
        inside = all(not {"", ".", ".."} & set(path.split("/")) for path in [*empty, *(each.path for each in entries)])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StoreError(f"{what}: its manifest is damaged") from None
    if not inside:
        raise StoreError(f"{what}: its manifest names files outside of it")
    if manifest_digest(entries, empty) != artifact.digest:
        raise StoreError(f"{what}: its manifest is not the one that was committed")
    return entries, empty


def verify_folder(folder: Path, entries: list[FileEntry], what: str) -> None:
    """Compare every file's size, then its checksum.

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


def _complete(folder: Path, entries: list[FileEntry], empty: list[str], what: str) -> None:
    """Restore what a store's objects cannot hold: empty folders and execute bits."""
    try:
        for path in empty:
            (folder / path).mkdir(parents=True, exist_ok=True)
        for entry in entries:
            if entry.executable and not is_executable(file := folder / entry.path):
                file.chmod(0o755)
    except OSError as error:
        raise StoreError(f"{what}: cannot complete {error.filename}: {error.strerror}") from error


def is_executable(file: Path) -> bool:
    return bool(file.stat().st_mode & stat.S_IXUSR)


def _for_each(work: Callable[[FileEntry], None], entries: list[FileEntry]) -> None:
    if len(entries) < 2:
        for entry in entries:
            work(entry)
        return
    with ThreadPoolExecutor(min(THREADS, len(entries))) as pool:
        for _ in pool.map(work, entries):
            pass


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
