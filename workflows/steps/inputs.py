"""Files that a recipe names, reduced to their content: passed to a step, so that a changed file is a changed input."""

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path

from infra.storage import sha256_file

WHOLE_BYTES = 1 << 26
"""A larger file (weights, mostly) is known by its size, its first and its last MiB."""
END_BYTES = 1 << 20


def content(sources: Sequence[str | None]) -> dict[str, str]:
    """Source -> digest of the files behind it (a file, a folder, a glob); `datasets:NAME` stands for itself."""
    return {source: _digest(source) for source in sources if source is not None}


def _digest(source: str) -> str:
    path = Path(source).expanduser()
    if path.is_file():
        return _file_digest(path)
    found = sorted(path.rglob("*")) if path.is_dir() else [Path(name) for name in sorted(glob.glob(str(path)))]
    digest = hashlib.sha256()
    for file in found:
        if file.is_file():
            digest.update(f"{file.relative_to(path) if path.is_dir() else file} {_file_digest(file)}\n".encode())
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    size = file.stat().st_size
    if size <= WHOLE_BYTES:
        return sha256_file(file)
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as data:
        digest.update(data.read(END_BYTES))
        data.seek(-END_BYTES, 2)
        digest.update(data.read())
    return digest.hexdigest()
