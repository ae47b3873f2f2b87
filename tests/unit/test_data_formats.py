"""Files in: every malformed line is named by file and line. Files out: atomic and equal bytes."""

import json
import re

import pytest

from data.formats import read_rows, resolve_files, validate, write_jsonl, write_parquet
from infra.errors import DataError

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}
CHAT = {"messages": [USER, FOUR], "task_type": "reasoning/addition"}


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ("messages", [CHAT, {"messages": [USER, FIVE]}]),
        ("text", [{"text": "a\nb é"}, {"text": "c"}]),
        ("preference", [{"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE], "margin": 0.5}]),
        ("prompt", [{"prompt": [USER], "answer": "4"}]),
    ],
)
def test_written_rows_are_read_back(tmp_path, write, shape, rows):
    path = tmp_path / ("rows.jsonl" if write is write_jsonl else "rows.parquet")
    assert write(path, rows) == len(rows)
    assert list(read_rows(path, shape)) == rows
    assert validate(path, shape).rows == len(rows)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]},
        {"prompt": [USER], "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
        {"chosen": [USER, FOUR], "rejected": [USER, FIVE]},
    ],
)
def test_all_preference_spellings_mean_the_same(tmp_path, row):
    write_jsonl(tmp_path / "p.jsonl", [row])
    assert list(read_rows(tmp_path / "p.jsonl", "preference")) == [
        {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}
    ]


@pytest.mark.parametrize(
    ("shape", "line", "problem"),
    [
        ("text", b'{"text": "a"', "not valid JSON"),
        ("text", b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        ("text", b"[1]", "expected an object, found a list"),
        ("text", b'{"txt": "a"}', '"text" is missing (found: txt)'),
        ("text", b'{"text": 3}', '"text" must be a string, found a number'),
        ("text", b'{"text": "a\\ud800"}', '"text" holds half a surrogate pair at character 1'),
        ("messages", b'{"messages": []}', "non-empty list of messages, found an empty list"),
        ("messages", b'{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        ("messages", b'{"messages": [{"role": "bot", "content": "a"}]}', "messages[0] has role 'bot'"),
        ("messages", b'{"messages": [{"role": "user", "content": null}]}', '"content" must be a string, found null'),
        (
            "messages",
            json.dumps({"messages": [USER, {"role": "assistant", "content": " "}]}).encode(),
            "empty assistant",
        ),
        ("messages", json.dumps({**CHAT, "task_type": 1}).encode(), '"task_type" must be a string'),
        ("preference", b'{"prompt": "a", "chosen": "b"}', '"rejected" is missing'),
        ("preference", b'{"prompt": "a", "chosen": "b", "rejected": "b"}', "are equal"),
        ("preference", b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}', "finite number, found 'x'"),
        ("preference", b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}', "finite number, found nan"),
        ("preference", b'{"chosen": "b", "rejected": "c"}', "share no first messages"),
        ("prompt", json.dumps({"prompt": [USER, FOUR]}).encode(), "nothing to answer"),
    ],
)
def test_malformed_line_is_named(tmp_path, shape, line, problem):
    good = {
        "text": {"text": "a"},
        "messages": CHAT,
        "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "prompt": {"prompt": "a"},
    }[shape]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(good).encode() + b"\n\n" + line + b"\n")
    expected = re.escape(f"{path}:3: ") + ".*" + re.escape(problem)
    with pytest.raises(DataError, match=expected):
        list(read_rows(path, shape))
    with pytest.raises(DataError, match=expected):
        validate(path, shape)


def test_validation_lists_the_first_five_and_counts_the_rest(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n' + "{}\n" * 8)
    with pytest.raises(DataError) as caught:
        validate(path, "text")
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:5]] == [f"{path}:{n}" for n in range(2, 7)]
    assert lines[5] == "... and 3 more malformed rows"


def test_summary_counts_task_types(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [CHAT, CHAT, {"messages": [USER, FOUR]}])
    assert validate(tmp_path / "a.jsonl", "messages").task_types == {"reasoning/addition": 2, "": 1}


def test_folders_globs_and_lists(tmp_path):
    write_jsonl(tmp_path / "b" / "2.jsonl", [{"text": "2"}])
    write_parquet(tmp_path / "b" / "1.parquet", [{"text": "1"}])
    write_jsonl(tmp_path / "a.jsonl", [{"text": "0"}])
    (tmp_path / "b" / "notes.txt").write_text("not data")
    assert [row["text"] for row in read_rows(tmp_path / "b", "text")] == ["1", "2"]
    assert [row["text"] for row in read_rows([f"{tmp_path}/*.jsonl", tmp_path / "b"], "text")] == ["0", "1", "2"]
    assert [path.name for path in resolve_files(f"{tmp_path}/**/*.jsonl")] == ["a.jsonl", "2.jsonl"]


def test_missing_empty_and_foreign_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        validate(tmp_path / "none.jsonl", "text")
    with pytest.raises(DataError, match=r"no \.jsonl or \.parquet file in this folder"):
        validate(tmp_path, "text")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a\.csv: expected a \.jsonl or \.parquet file"):
        validate(tmp_path / "a.csv", "text")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no rows"):
        validate(tmp_path / "empty.jsonl", "text")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"broken\.parquet:1: not readable as parquet"):
        validate(tmp_path / "broken.parquet", "text")


def test_parquet_row_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"text": "x"}, {"text": None}])
    with pytest.raises(DataError, match=r'a\.parquet:2: "text" is missing'):
        validate(tmp_path / "a.parquet", "text")


def test_datasets_source(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.Dataset.from_list([{"text": "a"}, {"text": ""}, {"text": "c"}]).save_to_disk(tmp_path / "saved")
    source = f"datasets:{tmp_path / 'saved'}"
    assert [row["text"] for row in read_rows(source, "text")] == ["a", "", "c"]
    with pytest.raises(DataError, match=r'saved:1: "messages" is missing'):
        validate(source, "messages")
    with pytest.raises(DataError, match="unknown option splitt; known: name, split"):
        validate(source + "?splitt=x", "text")
    with pytest.raises(DataError, match=r"^datasets:"):
        validate(f"datasets:{tmp_path / 'none'}", "text")


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": "old"}])

    def broken():
        yield {"text": "new"}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_jsonl(path, broken())
    assert path.read_text() == '{"text": "old"}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
