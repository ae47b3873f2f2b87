"""The files that a source names, for the code that reads them and the code that hashes them.

A source is a file, a folder (all files below it) or a glob (`**` crosses folders); `~` is the home folder. Hidden files
and folders (`.ipynb_checkpoints`, `.git`) are left out unless the source names them. Links are followed; each folder is
entered once, so that a circle of links ends.
"""

import glob
import logging
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import parse_qsl

from infra.errors import DataError

DATASETS = "datasets:"
"""The prefix of a source that the `datasets` library reads."""
FORMATS = (".jsonl", ".ndjson", ".json", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes that may follow those of text: `rows.jsonl.gz`."""
_EXPECTED = f"expected a .jsonl or .parquet file (or .ndjson, .json; text also with {' '.join(COMPRESSIONS)})"
_SHOWN = 5

log = logging.getLogger(__name__)


def kind_of(file: Path) -> tuple[str, str]:
    """(format, compression) by the file's name, in any case of letters; ("", "") if the file cannot be read as rows.

    Example: `a.JSONL.gz` is (".jsonl", ".gz").
    """
    stem, suffix = os.path.splitext(file.name.lower())
    inner = os.path.splitext(stem)[1]
    if suffix in COMPRESSIONS and inner in FORMATS and inner != ".parquet":
        return inner, suffix
    return (suffix, "") if suffix in FORMATS else ("", "")


def find_files(source: str | Path) -> list[Path]:
    """Every file that a source names, of any format, sorted.

    Raises:
        DataError: there is no such file, a folder cannot be listed, or a data file is a link to nothing.
    """
    if not str(source):
        raise DataError("'': an empty name; name a file, a folder or a glob")
    text = os.path.expanduser(source)
    try:
        if os.path.isfile(text):
            return [Path(text)]
        if any("**" in part and part != "**" for part in Path(text).parts):
            raise DataError(f"{source}: ** stands alone between slashes: write **/*.jsonl for files at any depth")
        found = _below(text) if os.path.isdir(text) else _matching(text)
        files = sorted(path for path in found if _is_regular(path))
    except OSError as error:
        raise DataError(f"{error.filename or source}: {error.strerror}") from None
    if not files and not os.path.isdir(text):
        if found:
            raise DataError(f"{source}: only folders match; add /**/*.jsonl to read what lies below them")
        raise DataError(f"{source}: no {_nothing_there(text)}")
    return files


def _nothing_there(text: str) -> str:
    """The end of "no ...", with a hint at what may be meant."""
    if text.startswith("file://"):
        return "such file; write the path alone, without file://"
    if "://" in text:
        return f"such file; a URL is not read: download it, or write {DATASETS}NAME for a dataset of the Hub"
    if "[" in text:
        return "file matches this pattern; [abc] matches one of these letters, write [[] for a bracket in a name"
    if "{" in text:
        return "such file; braces are not a pattern here: name the files one by one"
    if glob.has_magic(text):
        return "file matches this pattern"
    relative = not text.startswith((".", "/")) and not kind_of(Path(text))[0]
    return f"such file; write {DATASETS}{text} for a dataset of the Hub" if relative else "such file"


def resolve_files(source: str | Path) -> list[Path]:
    """The files of a source that can be read as rows, sorted; a file with two names counts once.

    A warning names the other files of a folder.

    Raises:
        DataError: as `find_files`; or a folder holds no such file; or a file that is named directly has another format.
    """
    files = find_files(source)
    if is_saved_dataset(os.path.expanduser(source)):
        raise DataError(f"{source}: this folder was written by save_to_disk; write {DATASETS}{source}")
    readable = [file for file in files if kind_of(file)[0]]
    others = [file for file in files if not kind_of(file)[0]]
    if not os.path.isdir(os.path.expanduser(source)):
        if others:
            raise DataError(f"{others[0]}: {_EXPECTED}")
    elif not readable:
        raise DataError(f"{source}: no .jsonl or .parquet file in this folder{_listed('; it holds', others)}")
    elif others:
        log.warning(
            "%s: some of its files are skipped, their names end neither in a JSON nor in a parquet suffix%s",
            source,
            _listed(":", others),
        )
    return once(readable)


def is_saved_dataset(folder: str | Path) -> bool:
    """Whether `save_to_disk` of the `datasets` library wrote the folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_info.json", "dataset_dict.json"))


def parse_dataset(source: str) -> tuple[str, dict[str, str]]:
    """(name or folder, options) of a source `datasets:NAME[?name=CONFIG&split=SPLIT]`.

    Raises:
        DataError: no name, or an unknown option.
    """
    name, _, query = source.removeprefix(DATASETS).partition("?")
    options = dict(parse_qsl(query))
    if unknown := sorted(set(options) - {"name", "split"}):
        raise DataError(f"{source}: unknown option {unknown[0]}; known: name, split")
    if not name:
        raise DataError(f"{source}: name a dataset or a folder: {DATASETS}NAME")
    return os.path.expanduser(name), options


def once(files: Sequence[Path]) -> list[Path]:
    """The files in order, each once even if it has several names."""
    named: dict[str, Path] = {}
    for file in files:
        named.setdefault(os.path.realpath(file), file)
    return list(named.values())


def _listed(before: str, files: Sequence[Path]) -> str:
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    return f"{before} {', '.join(map(str, files[:_SHOWN]))}{more}" if files else ""


def _below(folder: str) -> list[Path]:
    """Every file below a folder, without hidden ones."""
    waiting, entered, found = [folder], set(), []
    while waiting:  # linked folders come last, so that real folders keep their own names
        for root, folders, names in os.walk(waiting.pop(0), onerror=_raise):
            if (place := os.path.realpath(root)) in entered:
                folders.clear()
                continue
            entered.add(place)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [path for name in folders if os.path.islink(path := os.path.join(root, name))]
            found += [Path(root, name) for name in names if not name.startswith(".")]
    return found


def _matching(pattern: str) -> list[Path]:
    """The files and folders that a glob matches. The standard library's `**` would not end in a circle of links."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return [Path(name) for name in glob.glob(pattern)]
    first = parts.index("**")
    roots = [name for name in glob.glob(os.path.join(*parts[:first])) if os.path.isdir(name)] if first else ["."]
    return [path for root in roots for path in _below(root) if _fits(path.relative_to(root).parts, parts[first:])]


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _is_regular(path: Path) -> bool:
    if path.is_file():
        return True
    if kind_of(path)[0] and not path.is_dir():  # skipping it would silently train on less data
        raise DataError(f"{path}: {'a link that leads nowhere' if path.is_symlink() else 'not a regular file'}")
    return False


def _raise(error: OSError) -> None:
    raise error
