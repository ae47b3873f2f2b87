"""A file that a recipe names counts by its content."""

import os
from pathlib import Path

import pytest

from data.formats import read_rows
from infra.errors import DataError
from infra.storage import files as stored
from workflows.recipes.inputs import content, require_unchanged

LARGE = (1 << 26) + (1 << 20)


def test_files_folders_and_globs_count_by_content(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text("one")
    sources = [str(folder), str(folder / "a.jsonl"), str(folder / "*.jsonl"), "datasets:name"]
    before = content(sources)
    assert content(sources) == before
    (folder / "a.jsonl").write_text("two")
    after = content(sources)
    assert [before[source] != after[source] for source in sources] == [True, True, True, False]
    assert content([None]) == {}


@pytest.mark.parametrize("source", ["{}/**/*.jsonl", "{}/**", "{}/a/*/c/*", "{}", "datasets:{}/a"])
def test_what_is_read_is_what_is_hashed(tmp_path: Path, source: str) -> None:
    file = tmp_path / "a" / "b" / "c" / "x.jsonl"
    file.parent.mkdir(parents=True)
    source = source.format(tmp_path)
    file.write_text('{"text": "one"}\n')
    before = content([source])
    file.write_text('{"text": "two"}\n')
    assert content([source]) != before
    if not source.startswith("datasets:"):
        assert [row["text"] for row in read_rows(source, "text")] == ["two"]


def test_hidden_files_are_neither_read_nor_hashed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    before = content([str(tmp_path), f"{tmp_path}/**/*.jsonl"])
    for hidden in (".ipynb_checkpoints/a-checkpoint.jsonl", ".b.jsonl", "sub/._a.jsonl"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_text('{"text": "old"}\n')
    assert content([str(tmp_path), f"{tmp_path}/**/*.jsonl"]) == before
    for source in (tmp_path, f"{tmp_path}/**", f"{tmp_path}/*"):
        assert [row["text"] for row in read_rows(source, "text")] == ["a"]
    assert [row["text"] for row in read_rows(tmp_path / ".b.jsonl", "text")] == ["old"]  # named, so wanted


def test_a_large_file_counts_whole(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    with file.open("wb") as out:
        out.truncate(LARGE)
    before = content([str(file)])
    with file.open("r+b") as out:
        out.seek(LARGE // 2)
        out.write(b"x")
    assert content([str(file)]) != before


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = stored.sha256_file
    monkeypatch.setattr(stored, "sha256_file", lambda file: read.append(file.name) or whole(file))
    file = tmp_path / "a.jsonl"
    file.write_text("one")
    content([str(file)])
    first = content([str(file)])
    assert len(read) == 2, "it was written a moment ago: its time may not tell of another writing"
    monkeypatch.setattr(stored, "SETTLED_NS", 0)
    assert [content([str(file)]) for _ in range(3)] == [first] * 3 and len(read) == 3
    os.utime(file, ns=(1, 1))
    assert content([str(file)]) == first and len(read) == 4
    file.unlink()
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    assert content([str(file)]) != first


def test_a_file_that_changes_under_a_run_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("one")
    files = content([str(file)])
    require_unchanged("corpus.files", [str(file)], files)
    file.write_text("two")
    with pytest.raises(DataError, match=r"corpus\.files: .*a\.jsonl changed after the run had started"):
        require_unchanged("corpus.files", [str(file)], files)


def test_the_home_folder_may_be_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for source in ("~", "~/a.jsonl", "~/*.jsonl", "~/**/a.jsonl"):
        assert [row["text"] for row in read_rows(source, "text")] == ["a"]
        assert content([source])[source]
    with pytest.raises(DataError, match=r"~nobody-of-this-name/a: no such file"):
        content(["~nobody-of-this-name/a"])
