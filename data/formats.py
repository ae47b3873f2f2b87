"""Reading and writing training files: JSONL, parquet, and any source of the `datasets` library.

A source is a file, a folder (all .jsonl and .parquet files below it), a glob, or
`datasets:NAME[?name=CONFIG&split=SPLIT]` where NAME is a hub repository or a folder that `save_to_disk` wrote. Several
sources are read one after the other.
Everything malformed is a DataError that starts with `file:line:`.
"""

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from data.shapes import Row, Shape, check_row
from infra.errors import DataError
from infra.storage import appear

_SUFFIXES = (".jsonl", ".parquet")
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Summary:
    """What a validation pass saw, e.g. Summary(rows=3, task_types={"reasoning/addition": 2, "": 1})."""

    rows: int
    task_types: dict[str, int] = field(default_factory=dict)


def read_rows(sources: str | Path | Sequence[str | Path], shape: Shape) -> Iterator[Row]:
    """Every row of the sources in order, checked and brought to the one form of `shape` (see data.shapes).

    Raises:
        DataError: `file:line: what is wrong` at the first malformed row; a missing file before any row.
    """
    for place, row in _raw_rows(_resolve(sources)):
        try:
            yield check_row(_parsed(row), shape)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None


def validate(sources: str | Path | Sequence[str | Path], shape: Shape) -> Summary:
    """Read everything once before expensive work.

    Raises:
        DataError: the first five malformed rows, one line each, and how many more there are; or no row at all.
    """
    problems: list[str] = []
    count, bad = 0, 0
    task_types: Counter[str] = Counter()
    for place, row in _raw_rows(_resolve(sources)):
        try:
            task_types[check_row(_parsed(row), shape).get("task_type", "")] += 1
            count += 1
        except ValueError as error:
            bad += 1
            if len(problems) < _SHOWN_PROBLEMS:
                problems.append(f"{place}: {error}")
    if bad > len(problems):
        problems.append(f"... and {bad - len(problems)} more malformed rows")
    if problems:
        raise DataError("\n".join(problems))
    if not count:
        raise DataError(f"{_shown(sources)}: no rows")
    return Summary(count, dict(task_types))


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> int:
    """Write one JSON object per line, atomically; returns how many. Equal rows give equal bytes."""
    count = 0
    with appear(Path(path)) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    return count


def write_parquet(path: str | Path, rows: Iterable[Row]) -> int:
    """Write rows as one parquet file, atomically; returns how many."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(rows))
    with appear(Path(path)) as temporary:
        pyarrow.parquet.write_table(table, temporary)
    return int(table.num_rows)


def resolve_files(source: str | Path) -> list[Path]:
    """The .jsonl and .parquet files that a file name, folder or glob means, sorted.

    Raises:
        DataError: nothing there, or a file of another kind.
    """
    text = str(source)
    path = Path(text)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"{text}: no .jsonl or .parquet file in this folder")
        return files
    if path.is_file():
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(text, recursive=True) if os.path.isfile(name))
        if not files:
            raise DataError(f"{text}: no such file")
    for file in files:
        if file.suffix not in _SUFFIXES:
            raise DataError(f"{file}: expected a .jsonl or .parquet file")
    return files


def _resolve(sources: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Files and `datasets:` sources in order; everything missing is found before the first row is read."""
    listed = [sources] if isinstance(sources, str | Path) else list(sources)
    resolved: list[str | Path] = []
    for source in listed:
        resolved += [source] if str(source).startswith("datasets:") else resolve_files(source)
    return resolved


def _raw_rows(resolved: Iterable[str | Path]) -> Iterator[tuple[str, object]]:
    """(place, row); a JSONL row is still the line's bytes, so that one bad line does not end a validation pass."""
    for source in resolved:
        if str(source).startswith("datasets:"):
            yield from _datasets_rows(str(source))
        elif Path(source).suffix == ".parquet":
            yield from _parquet_rows(Path(source))
        else:
            yield from _jsonl_lines(Path(source))


def _jsonl_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", line


def _parsed(row: object) -> object:
    if not isinstance(row, bytes):
        return row
    try:
        return json.loads(row.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}:{number + 1}: not readable as parquet: {error}") from None


def _datasets_rows(source: str) -> Iterator[tuple[str, Row]]:
    import datasets

    name, _, query = source.removeprefix("datasets:").partition("?")
    options = dict(parse_qsl(query))
    unknown = sorted(set(options) - {"name", "split"})
    if unknown:
        raise DataError(f"{source}: unknown option {unknown[0]}; known: name, split")
    split = options.get("split", "train")
    try:
        if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            loaded: Any = datasets.load_from_disk(name)
            loaded = loaded[split] if isinstance(loaded, dict) else loaded
        else:
            loaded = datasets.load_dataset(name, options.get("name"), split=split)
    except Exception as error:  # the library raises many kinds, some of them private
        raise DataError(f"{source}: {type(error).__name__}: {error}") from error
    for number, row in enumerate(loaded, start=1):
        yield f"{source}:{number}", row


def _shown(sources: str | Path | Sequence[str | Path]) -> str:
    return str(sources) if isinstance(sources, str | Path) else ", ".join(map(str, sources))
