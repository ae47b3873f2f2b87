"""Code packages: a working folder as one zip file, named by its sha256.

Files that `.gitignore` excludes are left out, as is everything that never belongs to code: hidden folders (version
control, caches, credentials), virtual environments, reports, the store, and files that look like secrets. Equal folders
give equal bytes.
"""

import codecs
import contextlib
import errno
import fnmatch
import hashlib
import os
import stat
import tempfile
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.errors import ConfigError, UserError
from infra.machine import show_size
from infra.storage import Store
from infra.storage.files import appear, sha256_file

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

LIMIT = 256 << 20
"""Most bytes of a working folder (Ray ships at most 512 MiB to other nodes)."""
MOST_FILES = 50_000
NEVER_FOLDERS = {"venv", "__pycache__", "node_modules"}
NEVER_FILES = (
    ".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", "id_ecdsa*", ".netrc",
    ".git-credentials", ".pypirc", ".npmrc", "*.pyc", ".DS_Store",
)  # fmt: skip
MADE_AT = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Package:
    """A zip file. `left_out`, relative to the working folder: links to folders, links to nothing, and names that no
    package can hold (not UTF-8, or with a backslash)."""

    sha256: str
    file: Path
    files: int
    size: int
    left_out: tuple[str, ...]


def package_key(sha256: str) -> str:
    return f"packages/{sha256}.zip"


def working_folder(workflow_file: Path) -> Path:
    """The folder that is packaged for a workflow file: the current folder, or, if the file is outside it, the root of
    the file's packages."""
    from workflows.identity.names import module_of_file

    file, here = workflow_file.resolve(), Path.cwd().resolve()
    return here if file.is_relative_to(here) else module_of_file(file)[1]


def build(root: Path, target: Path, limit: int = LIMIT, without: Collection[Path] = ()) -> Package:
    """Write the package of `root` to `target`. `without`: folders that are left out (the store).

    Raises:
        ConfigError: the folder is larger than `limit` bytes (the message names its largest folders), has too many
            files, or has a file that cannot be read.
    """
    try:
        return _build(root, target, limit, without)
    except OSError as error:
        raise ConfigError(
            f"working folder {root}: cannot package {error.filename or target}: {error.strerror or error}; fix that, "
            "or exclude it in .gitignore"
        ) from None


def _build(root: Path, target: Path, limit: int, without: Collection[Path]) -> Package:
    left_out: list[str] = []
    chosen: list[tuple[str, Path]] = []
    sizes: Counter[str] = Counter()
    for name in _walk(root, "", [], left_out, without):
        size = (root / name).stat().st_size
        chosen.append((name, root / name))
        parts = name.split("/")
        sizes.update({"/".join(parts[:depth]): size for depth in range(1, min(len(parts), 4))})
        if len(parts) == 1:
            sizes[name] += size
        if len(chosen) > MOST_FILES:
            raise ConfigError(f"working folder {root}: more than {MOST_FILES} files; exclude some in .gitignore")
    total = sum(file.stat().st_size for _, file in chosen)
    if total > limit:
        largest = ", ".join(f"{name} {show_size(size)}" for name, size in sizes.most_common(4))
        raise ConfigError(
            f"working folder {root}: {show_size(total)} of code, at most {show_size(limit)} can be submitted; the "
            f"largest: {largest}; exclude data in .gitignore and keep it on storage that all nodes see"
        )
    with appear(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as out:
        for name, file in sorted(chosen):
            entry = zipfile.ZipInfo(name, MADE_AT)
            entry.compress_type = zipfile.ZIP_DEFLATED
            executable = file.stat().st_mode & stat.S_IXUSR
            entry.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
            out.writestr(entry, file.read_bytes())
    return Package(sha256_file(target), target, len(chosen), total, tuple(left_out))


def unpack(file: Path, folder: Path, limit: int = LIMIT) -> None:
    """Unpack a package into a new folder.

    Raises:
        UserError: not a zip file, a name that leads out of the folder, or more than `limit` bytes.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            _check(archive, limit)
            archive.extractall(folder)
            for entry in archive.infolist():
                if (entry.external_attr >> 16) & stat.S_IXUSR:
                    (folder / entry.filename).chmod(0o755)
    except zipfile.BadZipFile as error:
        raise UserError(f"the package is no zip file: {error}") from None


async def receive(store: Store, sha256: str, content: AsyncIterator[bytes], limit: int = LIMIT) -> None:
    """Check a client's package, and store it.

    Raises:
        UserError: it is too large, damaged, or does not match its name.
    """
    import asyncio

    digest = hashlib.sha256()
    size = 0
    with tempfile.TemporaryDirectory(prefix="recua-") as folder:
        file = Path(folder) / "package.zip"
        with file.open("wb") as stream:
            async for chunk in content:
                size += len(chunk)
                if size > limit:
                    raise UserError(f"the package has more than {show_size(limit)}")
                digest.update(chunk)
                stream.write(chunk)
        if digest.hexdigest() != sha256:
            raise UserError(f"the package arrived damaged: sha256 {digest.hexdigest()[:12]}, expected {sha256[:12]}")
        await asyncio.to_thread(_keep, store, sha256, file, limit)


def _keep(store: Store, sha256: str, file: Path, limit: int) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            _check(archive, limit)
    except zipfile.BadZipFile as error:
        raise UserError(f"the package is no zip file: {error}") from None
    store.upload_file(package_key(sha256), file)


def _check(archive: zipfile.ZipFile, limit: int) -> None:
    size = 0
    for entry in archive.infolist():
        size += entry.file_size
        name = entry.filename
        if name.startswith("/") or ".." in name.split("/") or "\\" in name or stat.S_ISLNK(entry.external_attr >> 16):
            raise UserError(f"the package has a file that leads out of it: {name!r}")
    if size > limit or len(archive.infolist()) > 2 * MOST_FILES:
        raise UserError(f"the package has {show_size(size)} unpacked, at most {show_size(limit)} are allowed")


def _walk(
    root: Path,
    folder: str,
    ignores: list[tuple[str, "GitIgnoreSpec"]],
    left_out: list[str],
    without: Collection[Path],
) -> Iterator[str]:
    """Names of the files to package, relative to `root`."""
    from pathspec import GitIgnoreSpec

    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        text = os.fsdecode((root / folder / ".gitignore").read_bytes().removeprefix(codecs.BOM_UTF8))
        ignores = [*ignores, (folder, GitIgnoreSpec.from_lines(text.splitlines()))]
    for entry in sorted(os.scandir(root / folder), key=lambda entry: entry.name):
        name = f"{folder}/{entry.name}".lstrip("/")
        if entry.is_dir(follow_symlinks=False):
            path = Path(entry.path)
            if not (_never_folder(path, folder) or path in without or _ignored(f"{name}/", ignores)):
                yield from _walk(root, name, ignores, left_out, without)
        elif any(fnmatch.fnmatch(entry.name, pattern) for pattern in NEVER_FILES) or _ignored(name, ignores):
            continue
        elif _is_file(entry):
            if fits(name):
                yield name
            else:
                left_out.append(name)
        elif entry.is_symlink():
            left_out.append(name)


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def fits(name: str) -> bool:
    """Whether a zip file can hold a name, and unpacking gives the same name."""
    return "\\" not in name and name.encode(errors="ignore").decode() == name


def _never_folder(path: Path, parent: str) -> bool:
    if path.name.startswith(".") or path.name in NEVER_FOLDERS or (path / "pyvenv.cfg").exists():
        return True
    reports = path.name == "runs" and not parent
    return (reports or path.name == "secrets") and not (path / "__init__.py").exists()


def _ignored(name: str, ignores: list[tuple[str, "GitIgnoreSpec"]]) -> bool:
    """The last matching pattern decides, as in git; patterns of deeper files come later."""
    verdict = False
    for folder, spec in ignores:
        found = spec.check_file(name[len(folder) :].lstrip("/")).include
        verdict = verdict if found is None else found
    return verdict
