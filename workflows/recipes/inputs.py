"""Digests of the files that a recipe names, passed to steps, so that a changed file is a changed input."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from data.files import DATASETS, find_files, parse_dataset
from infra.errors import DataError
from infra.storage.files import remembered_sha256


def content(sources: Sequence[str | None]) -> dict[str, str]:
    """Source -> digest of its files (a file, a folder, a glob); a `datasets:` name that is not a folder is its own
    digest.

    Raises:
        DataError: there is no file, or one cannot be read.
    """
    return {source: _digest(source) for source in sources if source is not None}


def require_unchanged(setting: str, sources: Sequence[str], files: dict[str, str]) -> None:
    """Check that `sources` still have the digests `files` (`content` at the run's start).

    Raises:
        DataError: the message names the setting and the changed sources.
    """
    now = content(sources)
    if changed := [source for source in now if source in files and now[source] != files[source]]:
        raise DataError(
            f"{setting}: {', '.join(changed)} changed after the run had started: run again once it is complete"
        )


def _digest(source: str) -> str:
    path = source
    if source.startswith(DATASETS):
        path, _ = parse_dataset(source)
        if not os.path.isdir(path):
            return hashlib.sha256().hexdigest()
    folder = Path(os.path.expanduser(path))
    files = find_files(path)
    if files == [folder]:
        return _file_digest(folder)
    digest = hashlib.sha256()
    for file in files if folder.is_dir() else sorted(files, key=str):
        name = file.relative_to(folder) if folder.is_dir() else file
        digest.update(f"{name} {_file_digest(file)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    try:
        return remembered_sha256(file)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
