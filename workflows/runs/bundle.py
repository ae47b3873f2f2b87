"""A run as one file: `recua export` writes it, `recua import` puts it into another store.

A bundle is a tar in a fixed order, gzipped if its name ends in "gz", so that equal runs give equal bytes:

    recua-bundle.json    {"format", "run", "workflow"}
    <key>, <key>, ...    objects of the store under their own keys, sorted: the run's metadata and recipe, journal (what
                         each call made from what), logs, report, history; every artifact that it refers to, also
                         those of other runs; parts of its code's fingerprints; its index entries; the code package
                         and submission of a run of the service
    checksums.json       {<key>: {"size", "sha256"}}

With `only_results` a finished run's bundle has only the artifacts of its result and its recipe: the run can be shown,
reported and served elsewhere, but a run that would reuse a step whose artifacts are missing runs that step again.

Bundles are streamed: at most one file of a remote store is on this disk at a time. Known forms of secrets are blanked
in logs. An import reads the whole file and compares every checksum before it writes anything; the run becomes visible
with its last object, run.json.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import json
import lzma
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from infra.errors import StoreError, UserError
from infra.storage import Store
from infra.storage.files import appear, sync_file
from infra.telemetry import redact
from workflows.graph.artifacts import Artifact, read_manifest
from workflows.graph.values import artifact_records
from workflows.identity.keys import code_key, index_key, parameters_key
from workflows.runs.catalog import RUN_ID
from workflows.runs.journal import removed_key
from workflows.runs.records import Json, index_entry
from workflows.runs.references import StoredRun, packages_of, read_run, references_of

FORMAT = 1
DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, lzma.LZMAError, zlib.error)
HEADER, CHECKSUMS = "recua-bundle.json", "checksums.json"
SHARED = r"runs/[^/]+/attempts/|code/|index/|packages/"
"""Folders of objects that several runs may share. An import leaves those that the store already has unchanged."""
OF_RUN = (
    "journal/",
    "history/",
    "signals/",
    "run.json",
    "submission.json",
    "report.html",
    "report.json",
    "status.json",
)
CHUNK = 1 << 20
LARGEST_TABLE = 1 << 30
"""Most bytes of the checksums' JSON: enough for millions of objects."""
GZIP_LEVEL = 1
"""The lowest level: weights hardly shrink, and texts and logs shrink at any level."""
Opened = contextlib.AbstractContextManager[IO[bytes]]


@dataclass(frozen=True)
class Member:
    """One object of a bundle: how to open its content, and the sha256 that it must have (None if unknown)."""

    open: Callable[[], Opened]
    sha256: str | None = None


def export_run(store: Store, run_id: str, output: Path, with_logs: bool = True, only_results: bool = False) -> int:
    """Write a run's bundle; returns its size in bytes.

    Raises:
        UserError: there is no such run, it is running, or with `only_results` it has not finished.
        StoreError: one of its artifacts is incomplete, or an object cannot be read. No file is left.
    """
    run = read_run(store, run_id)
    if not run.is_run:
        raise UserError(f"no run {run_id!r} in {store.url}")
    if run.status == "running":
        raise UserError(f"run {run_id} is running: wait for its end, or `recua cancel {run_id}` first")
    if only_results and run.status != "finished":
        raise UserError(f"--only-results: run {run_id} is {run.status}, and needs its other artifacts to go on")
    members = _members(store, run, with_logs, only_results)
    header = {"format": FORMAT, "run": run_id, "workflow": (run.metadata or {})["workflow"]}
    checksums: dict[str, Json] = {}
    with appear(output) as temporary:
        with _create(temporary, output.name.endswith("gz")) as tar:
            _add(tar, HEADER, io.BytesIO(_json(header)))
            for key in sorted(members):
                with members[key].open() as stream:
                    checksums[key] = _add(tar, key, stream)
                if members[key].sha256 not in (None, checksums[key]["sha256"]):
                    raise StoreError(f"--store {store.url}: {key} is damaged: it is not what its manifest says")
            _add(tar, CHECKSUMS, io.BytesIO(_json(checksums)))
        sync_file(temporary)
    return output.stat().st_size


def import_run(store: Store, bundle: Path) -> str:
    """Put a bundle's run into `store`; returns the run's id.

    Raises:
        UserError: the file is no bundle, has another format, is damaged, has names that the store cannot keep, or the
            store has a run of that id. Nothing was written.
        StoreError: the store failed; the run is not visible.
    """
    run_id, checksums = verify(bundle)
    for key in checksums:
        store.check_key(key)
    try:
        if store.exists(f"runs/{run_id}/run.json"):
            raise UserError(f"{bundle}: {store.url} has a run {run_id} already")
        last = f"runs/{run_id}/run.json"
        with _open_tar(bundle) as tar:
            visible = b""
            for member in tar:
                if member.name not in checksums:
                    continue
                stream = tar.extractfile(member)
                assert stream is not None, "verified to be a file"
                if member.name == last:
                    visible = stream.read()
                elif member.name.startswith(f"runs/{run_id}/") or not store.exists(member.name):
                    _place(store, member.name, stream)
    except DAMAGE as error:
        raise UserError(f"{bundle} changed while it was read: {_line(error)}") from None
    store.delete(removed_key(run_id))
    if not store.put_if_absent(last, visible):
        raise UserError(f"{bundle}: {store.url} has a run {run_id} already")
    return run_id


def verify(bundle: Path) -> tuple[str, dict[str, Json]]:
    """(run id, checksums) of an intact bundle.

    Raises:
        UserError: it is no bundle, has another format, or is damaged; the message names the problem.
    """
    _require_file(bundle)
    found: dict[str, Json] = {}
    small: dict[str, bytes] = {}
    try:
        with _open_tar(bundle) as tar:
            for member in tar:
                if not small and member.name != HEADER:
                    raise UserError(
                        f"{bundle} is no bundle of recua: a tar of something else, {member.name!r} is in it"
                    )
                stream = tar.extractfile(member) if member.isfile() else None
                if stream is None or member.name in found or member.name in small:
                    raise UserError(f"{bundle} is damaged: unexpected entry {member.name!r}")
                if member.name in (HEADER, CHECKSUMS):
                    small[member.name] = stream.read(LARGEST_TABLE)
                else:
                    found[member.name] = _checksum(stream)
    except DAMAGE as error:
        raise UserError(f"{bundle} is no whole bundle of recua: it is damaged or cut off ({_line(error)})") from None
    try:
        header, checksums = json.loads(small[HEADER]), json.loads(small[CHECKSUMS])
        run_id, version = str(header["run"]), header["format"]
        assert isinstance(checksums, dict) and re.fullmatch(RUN_ID, run_id)
    except (KeyError, ValueError, TypeError, AssertionError, RecursionError):
        raise UserError(f"{bundle} is no whole bundle of recua: it is damaged or cut off") from None
    if version != FORMAT:
        raise UserError(f"{bundle} has format {version}, this recua reads {FORMAT}")
    for key in sorted(found.keys() | checksums.keys()):
        if found.get(key) != checksums.get(key):
            raise UserError(f"{bundle} is damaged: {key!r} is not what its checksum says")
        *folders, _ = parts = key.split("/")
        inside_a_file = not found.keys().isdisjoint(itertools.accumulate(folders, "{}/{}".format))
        placed = re.match(rf"runs/{re.escape(run_id)}/|{SHARED}", key)
        if not placed or inside_a_file or {"..", ".", ""} & set(parts):
            raise UserError(f"{bundle} is damaged: {key!r} has no place in a store")
    if f"runs/{run_id}/run.json" not in checksums:
        raise UserError(f"{bundle} is damaged: it lacks the run's metadata")
    return run_id, checksums


# --- the contents ---


def _members(store: Store, run: StoredRun, with_logs: bool, only_results: bool) -> dict[str, Member]:
    """The members by key."""
    found = _of_run(store, run, with_logs)
    located = set()
    for record, reference in references_of(run):
        artifact = Artifact.from_record(record, None)
        if artifact.location in located or (only_results and reference.call_id):
            continue
        located.add(artifact.location)
        manifest = f"{artifact.location}/manifest.json"
        found[manifest] = _stored(store, manifest)
        if not only_results and run.status == "finished" and not store.exists(manifest):
            raise StoreError(
                f"--store {store.url}: artifact {artifact.name or artifact.digest[:12]} ({artifact.location}) is not "
                "in the store; was the run imported from a bundle of its results? Export it with --only-results"
            )
        for entry in read_manifest(store, artifact):
            key = f"{artifact.location}/data/{entry.path}"
            found[key] = _stored(store, key, entry.sha256)
    commits = run.state.commits.values()
    keys = {code_key(name) for commit in commits for name in (commit.code, commit.libraries) if name}
    keys |= {parameters_key(commit.code, commit.step) for commit in commits if commit.code}
    keys |= {f"packages/{sha256}.zip" for sha256 in packages_of(run)}
    found |= {key: _stored(store, key) for key in keys if store.exists(key)}
    for commit in run.state.commits.values():
        whole = located.issuperset(record["location"] for record in artifact_records(commit.result))
        if whole and commit.key and store.exists(index_key(commit.key)):
            found[index_key(commit.key)] = _made(_json(index_entry(run.run_id, commit)))
    return found


def _of_run(store: Store, run: StoredRun, with_logs: bool) -> dict[str, Member]:
    """The objects in the run's own folder, without artifacts."""
    found, base = {}, f"runs/{run.run_id}/"
    for key in store.list(base.rstrip("/")):
        name = key.removeprefix(base)
        if name.startswith(OF_RUN):
            found[key] = _stored(store, key)
        elif with_logs and re.fullmatch(r"attempts/[^/]+/log\.txt|driver/[^/]+\.log", name):
            found[key] = Member(functools.partial(_open_log, store, key))
    return found


def _stored(store: Store, key: str, sha256: str | None = None) -> Member:
    return Member(functools.partial(_open, store, key), sha256)


def _made(content: bytes) -> Member:
    return Member(functools.partial(io.BytesIO, content))


@contextlib.contextmanager
def _open(store: Store, key: str) -> Iterator[IO[bytes]]:
    local = store.local_path(key)
    if local is not None:
        try:
            with local.open("rb") as stream:
                yield stream
        except OSError as error:
            raise StoreError(f"--store {store.url}: cannot read {key}: {error.strerror}") from error
        return
    with tempfile.TemporaryDirectory(prefix="recua-") as folder:
        file = Path(folder) / "object"
        store.download_file(key, file)
        with file.open("rb") as stream:
            yield stream


def _open_log(store: Store, key: str) -> Opened:
    return io.BytesIO(redact((store.get(key) or b"").decode(errors="replace")).encode())


# --- writing and reading ---


@contextlib.contextmanager
def _create(path: Path, compressed: bool) -> Iterator[tarfile.TarFile]:
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(path.open("wb"))
        if compressed:
            file = stack.enter_context(gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0))
        yield stack.enter_context(tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT))


def _require_file(bundle: Path) -> None:
    """A bundle is read twice, first to check it and then to import it, so a pipe will not do."""
    if bundle.is_dir():
        raise UserError(f"{bundle} is a folder: give the file that `recua export` wrote")
    if not bundle.exists():
        raise UserError(f"{bundle}: no such file")
    if not bundle.is_file():
        raise UserError(f"{bundle} is no regular file: save what `recua export` wrote to one, and give that")


def _open_tar(bundle: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(bundle)
    except tarfile.ReadError:  # its message has a line for every compression that was tried
        raise UserError(f"{bundle} is no bundle of recua: it is no tar file; `recua export RUN` writes one") from None
    except OSError as error:
        raise UserError(f"{bundle} cannot be read: {error.strerror or _line(error)}") from None


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _add(tar: tarfile.TarFile, name: str, stream: IO[bytes]) -> Json:
    """Append a member without this machine's names and times; returns its checksum."""
    info = tarfile.TarInfo(name)
    info.size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    checked = _Hashing(stream)
    tar.addfile(info, checked)  # type: ignore[arg-type]
    return {"size": info.size, "sha256": checked.sha256.hexdigest()}


class _Hashing:
    """A stream whose content is hashed while it is read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.sha256.update(data)
        return data


def _checksum(stream: IO[bytes]) -> Json:
    checked, size = _Hashing(stream), 0
    while data := checked.read(CHUNK):
        size += len(data)
    return {"size": size, "sha256": checked.sha256.hexdigest()}


def _place(store: Store, key: str, stream: IO[bytes]) -> None:
    local = store.local_path(key)
    if local is not None:
        try:
            with appear(local) as temporary:
                with temporary.open("wb") as target:
                    shutil.copyfileobj(stream, target, CHUNK)
                sync_file(temporary)
        except OSError as error:
            raise StoreError(f"--store {store.url}: cannot write {key}: {error.strerror or error}") from error
        return
    with tempfile.TemporaryDirectory(prefix="recua-") as folder:
        file = Path(folder) / "object"
        with file.open("wb") as target:
            shutil.copyfileobj(stream, target, CHUNK)
        store.upload_file(key, file)


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
