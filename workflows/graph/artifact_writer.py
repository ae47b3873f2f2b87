"""Writing artifacts: a step's body fills a folder, and seals it.

A body writes into `runs/<run>/attempts/<uuid>/<name>/data/`. Sealing hashes every file and writes `manifest.json`
beside `data/` last. Attempts never share a folder, and only a call's commit record names the winning attempt, so that
no process reads a half-written upload.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.storage import Store
from infra.storage.files import sha256_file, sync_file
from workflows.graph.artifacts import (
    FORMAT,
    Artifact,
    ArtifactSource,
    FileEntry,
    is_executable,
    json_bytes,
    manifest_digest,
)
from workflows.graph.values import encode


class ArtifactWriter:
    """An artifact that is being written: put files under `path`, then call `seal()`."""

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
        """Hash and upload the content (a folder store copies nothing), and return the artifact. `meta`: values that a
        step could return. They are part of the artifact's identity: leave times, hosts and paths out if equal content
        must give equal artifacts.

        Raises:
            UserError: the artifact is already sealed, the metadata cannot be stored, or the folder has an entry that
                cannot be (a link to nothing or in a circle, a socket, a name too long for the store). Nothing was
                uploaded.
            StoreError: the upload failed.
        """
        name = self._location.rsplit("/", 1)[-1]
        if self._sealed:
            raise UserError(f"artifact {name} is already sealed")
        kept = encode(meta, f"artifact {name}: seal")
        contents = _contents(self.path, f"artifact {name}")
        for path, _ in contents:
            self._store.check_key(f"{self._location}/data/{path}")
        self._sealed = True
        if self._store.local_path(self._location) is not None:
            _materialise_links(self.path, contents)
            contents = [(path, source and self.path / path) for path, source in contents]
        entries = [self._keep(path, file) for path, file in contents if file is not None]
        empty = [path for path, file in contents if file is None]
        digest = manifest_digest(entries, empty)
        manifest = {"format": FORMAT, "digest": digest, "files": [entry.row() for entry in entries], "meta": kept}
        if empty:
            manifest["empty_folders"] = empty
        self._store.put(f"{self._location}/manifest.json", json_bytes(manifest))
        return Artifact(digest, meta, name, self._location, self._source)

    def _keep(self, path: str, file: Path) -> FileEntry:
        entry = FileEntry(path, file.stat().st_size, sha256_file(file), is_executable(file))
        if self._store.local_path(self._location) is None:
            self._store.upload_file(f"{self._location}/data/{path}", file)
        else:
            sync_file(file)
        self._on_file()
        return entry


def _contents(folder: Path, what: str) -> list[tuple[str, Path | None]]:
    """All entries of a folder, following links: (relative path, the file itself), and None for empty folders.

    Raises:
        UserError: a link to nothing or to a folder around it, or an entry that is neither a file nor a folder.
    """
    found: list[tuple[str, Path | None]] = []

    def walk(inside: Path, above: tuple[Path, ...]) -> None:
        names = sorted(os.listdir(inside))
        for name in names:
            path = inside / name
            shown = f"{what}: {path.relative_to(folder).as_posix()!r}"
            try:
                real = path.resolve(strict=True) if path.is_symlink() else above[-1] / name
            except (OSError, RuntimeError):
                raise UserError(f"{shown} is a link to nothing: remove it before seal()") from None
            if real.is_file():
                found.append((path.relative_to(folder).as_posix(), real))
            elif not real.is_dir():
                raise UserError(f"{shown} is neither a file nor a folder: remove it before seal()")
            elif real in above:
                raise UserError(f"{shown} is a link to a folder around it: remove it before seal()")
            else:
                walk(path, (*above, real))
        if not names and inside != folder:
            found.append((inside.relative_to(folder).as_posix(), None))

    walk(folder, (folder.resolve(),))
    return sorted(found, key=lambda each: each[0])


def _materialise_links(folder: Path, contents: list[tuple[str, Path | None]]) -> None:
    """Replace symbolic links by their targets, so that the artifact is complete."""
    for inside, folders, files in os.walk(folder):
        for link in (Path(inside, name) for name in (*folders, *files)):
            if link.is_symlink():
                link.unlink()
    for path, file in contents:
        target = folder / path
        if file is None:
            target.mkdir(parents=True, exist_ok=True)
        elif not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            if is_executable(file):
                target.chmod(0o755)
