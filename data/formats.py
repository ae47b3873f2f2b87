"""Reading and writing training files: JSONL, parquet, and any source of the `datasets` library.

A source is a file, a folder or a glob (see `data.files`), or `datasets:NAME[?name=CONFIG&split=SPLIT]`, where NAME is a
repository of the Hub or a folder that `save_to_disk` wrote. Several sources are read in order; a file that several of
them name is read once.

    .jsonl .ndjson    one object per line
    .json             the same, or a list of objects
    .parquet          one object per row

Text may be compressed (.gz .bz2 .xz .zst). Everything malformed is a DataError that starts with `file:line:`.
"""

import bz2
import gzip
import io
import json
import logging
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

from data.files import DATASETS, is_saved_dataset, kind_of, parse_dataset, resolve_files
from data.shapes import Row, Shape, check_row
from infra.errors import DataError
from infra.storage.files import LFS_POINTER, appear

_BOM = b"\xef\xbb\xbf"
_BEGINNINGS = {
    LFS_POINTER: "a Git LFS pointer, not the file itself: run `git lfs pull` there",
    b"\xff\xfe": "not UTF-8 but UTF-16: save it as UTF-8",
    b"\xfe\xff": "not UTF-8 but UTF-16: save it as UTF-8",
    b"\x1f\x8b": "compressed with gzip: its name must end in .gz",
    b"BZh": "compressed with bzip2: its name must end in .bz2",
    b"\xfd7zXZ": "compressed with xz: its name must end in .xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: its name must end in .zst",
    b"PAR1": "parquet: its name must end in .parquet",
    b"PK\x03\x04": "a zip archive: unpack it",
}
"""First bytes of files that are not rows, and the cause to report instead of a syntax error per line."""
_SHOWN_PROBLEMS = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """Counts of a validation pass. `text_bytes`: UTF-8 bytes of all "text", an upper bound of its tokens."""

    rows: int
    text_bytes: int = 0


def read_rows(sources: str | Path | Sequence[str | Path], shape: Shape) -> Iterator[Row]:
    """Every row of the sources in order, checked and converted to the form of `shape` (see data.shapes).

    Raises:
        DataError: `file:line: what is wrong` at the first malformed row; a missing file before any row.
    """
    return (row for _, row in rows_by_source(sources, shape))


def rows_by_source(sources: str | Path | Sequence[str | Path], shape: Shape) -> Iterator[tuple[str, Row]]:
    """(source, row) pairs: the rows of `read_rows` with the source of each."""
    for source, place, row in _raw_rows(sources):
        try:
            yield source, check_row(_parsed(row), shape)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None


def validate(
    sources: str | Path | Sequence[str | Path], shape: Shape, also: Callable[[Row], None] | None = None
) -> Summary:
    """Read everything once before expensive work. `also` may raise ValueError for a row of the right shape.

    Raises:
        DataError: names the first five malformed rows, one per line, and the number of others; or there is no row.
    """
    problems: list[str] = []
    count, bad, size = 0, 0, 0
    for _, place, row in _raw_rows(sources):
        try:
            checked = check_row(_parsed(row), shape)
            if also is not None:
                also(checked)
        except ValueError as error:
            bad += 1
            if len(problems) < _SHOWN_PROBLEMS:
                problems.append(f"{place}: {error}")
            continue
        count += 1
        size += len(checked.get("text", "").encode())
    if bad > len(problems):
        problems.append(f"... and {bad - len(problems)} more malformed rows")
    if problems:
        raise DataError("\n".join(problems))
    if not count:
        raise DataError(f"{_shown(sources)}: no rows")
    return Summary(count, size)


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> int:
    """Write one JSON object per line, atomically; returns their number. Equal rows give equal bytes."""
    count = 0
    with appear(Path(path)) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    return count


def _raw_rows(sources: str | Path | Sequence[str | Path]) -> Iterator[tuple[str, str, object]]:
    """(source, place, row) triples. A row of a text file is still bytes, so that a bad line does not end validation."""
    for source, file in _resolve(sources):
        rows = _datasets_rows(source) if file is None else _file_rows(file)
        for place, row in rows:
            yield source, place, row


def _resolve(sources: str | Path | Sequence[str | Path]) -> list[tuple[str, Path | None]]:
    """(source, file) pairs in order; file is None for `datasets:`. Finds missing files before any row is read."""
    listed = [sources] if isinstance(sources, str | Path) else list(sources)
    resolved: list[tuple[str, Path | None]] = []
    seen: set[str] = set()
    for source in map(str, listed):
        files = [None] if source.startswith(DATASETS) else resolve_files(source)
        for file in files:
            if (place := source if file is None else os.path.realpath(file)) in seen:
                log.warning("%s is named more than once; reading it once", file or source)
                continue
            seen.add(place)
            resolved.append((source, file))
    return resolved


def _file_rows(path: Path) -> Iterator[tuple[str, object]]:
    layout, compression = kind_of(path)
    if layout == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        if compression:
            with open(path, "rb") as stored:
                _refuse_beginning(path, stored.read(len(LFS_POINTER)), (LFS_POINTER,))
        with _opened(path, compression) as file:
            _refuse_beginning(path, file.peek(len(LFS_POINTER)), _BEGINNINGS)
            yield from _json_rows(path, file) if layout == ".json" else _lines(path, file)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        why = getattr(error, "strerror", None) or f"damaged or cut off: {error}"
        raise DataError(f"{path}: {why}") from None


def _refuse_beginning(path: Path, start: bytes, beginnings: Iterable[bytes]) -> None:
    if found := next((beginning for beginning in beginnings if start.startswith(beginning)), None):
        raise DataError(f"{path} is {_BEGINNINGS[found]}")


def _opened(path: Path, compression: str) -> io.BufferedReader:
    """A file's content, decompressed."""
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    opens: dict[str, Any] = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast(io.BufferedReader, opens[compression](path, "rb"))


def _lines(path: Path, file: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(file, start=1):
        if line.removeprefix(_BOM).strip():
            yield f"{path}:{number}", line


def _json_rows(path: Path, file: Iterable[bytes]) -> Iterator[tuple[str, object]]:
    """The items of a list, or, if the file does not begin with `[`, one object per line."""
    lines, head = iter(file), b""
    while not head.removeprefix(_BOM).strip() and (line := next(lines, b"")):
        head += line
    start = head.removeprefix(_BOM).strip()
    if not start.startswith(b"["):
        if start and not start.endswith(b"}"):
            raise DataError(f"{path}:1: expected a list of objects, or one object a line")
        yield from _lines(path, chain(head.splitlines(keepends=True), lines))
        return
    try:
        items = json.loads(head + b"".join(lines))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: {_invalid(error)}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, or nested too deeply
        raise DataError(f"{path}:1: not usable JSON: {error}") from None
    for number, item in enumerate(items, start=1):
        yield f"{path}:{number}", item


def _invalid(error: json.JSONDecodeError) -> str:
    return f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"


def _parsed(row: object) -> object:
    if not isinstance(row, bytes):
        return row
    try:
        return json.loads(row.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(_invalid(error)) from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None
    except ValueError:
        raise ValueError("not usable JSON: a number has thousands of digits") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with open(path, "rb") as stored:
            _refuse_beginning(path, stored.read(len(LFS_POINTER)), (LFS_POINTER,))
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:  # also text that is not UTF-8
        raise DataError(f"{path}:{number + 1}: not readable as parquet: {error}") from None


def _datasets_rows(source: str) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        for row in _dataset(source):
            number += 1
            yield f"{source}:{number}", row
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds, some of them private
        hint = f"; write {DATASETS}NAME?split=SPLIT" if "Unknown split" in str(error) else ""
        raise DataError(f"{source}: {type(error).__name__}: {error}{hint}") from error


def _dataset(source: str) -> Iterable[Row]:
    import datasets

    name, options = parse_dataset(source)
    if not is_saved_dataset(name):
        split = options.get("split", "train")
        return cast(Iterable[Row], datasets.load_dataset(name, options.get("name"), split=split))
    if "name" in options:
        raise DataError(f"{source}: a folder that save_to_disk wrote has no configurations; leave name= out")
    loaded: Any = datasets.load_from_disk(name)
    split = options.get("split", "train")
    if not isinstance(loaded, dict):  # one split, which may have no name
        loaded = {str(loaded.split) if loaded.split and "split" in options else split: loaded}
    if split not in loaded:
        there = f"it has {', '.join(loaded)}: write {DATASETS}{name}?split={next(iter(loaded))}"
        raise DataError(f"{source}: no split {split!r}; {there}")
    return cast(Iterable[Row], loaded[split])


def _shown(sources: str | Path | Sequence[str | Path]) -> str:
    return str(sources) if isinstance(sources, str | Path) else ", ".join(map(str, sources))
