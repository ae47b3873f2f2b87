"""A file that a recipe names counts by its content."""

from pathlib import Path

from workflows.steps.inputs import END_BYTES, WHOLE_BYTES, content


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


def test_a_large_file_counts_by_size_and_both_ends(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    with file.open("wb") as out:
        out.truncate(WHOLE_BYTES + END_BYTES)
    before = content([str(file)])
    with file.open("r+b") as out:
        out.seek(-1, 2)
        out.write(b"x")
    assert content([str(file)]) != before
