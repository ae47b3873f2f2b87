"""Files that a recipe names, reduced to their content: passed to a step, so that a changed file is a changed input."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from data.files import DATASETS, find_files, parse_dataset
from infra.errors import DataError
from infra.storage.files import remembered_sha256


def content(sources: Sequence[str | None]) -> dict[str, str]:
    """Source -> digest of the files behind it (a file, a folder, a glob); a `datasets:` name that is no folder stands
    for itself.

    Raises:
        DataError: nothing there, or a file that cannot be read.
    """
    return {source: _digest(source) for source in sources if source is not None}


def require_unchanged(setting: str, sources: Sequence[str], files: dict[str, str]) -> None:
    """Refuse what was read from `sources` unless they still hold what `files` says (`content` at the run's start).

    Raises:
        DataError: the setting, and the sources that have changed.
    """
    now = content(sources)
    if changed := [source for source in now if source in files and now[source] != files[source]]:
        raise DataError(
            f"{setting}: {', '.join(changed)} changed after the run had started: run again once it is whole"
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
