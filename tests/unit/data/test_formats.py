"""Files in: every malformed line is named by file and line. Files out: atomic and equal bytes."""

import bz2
import gzip
import json
import logging
import lzma
import os
import re

import pyarrow
import pyarrow.parquet
import pytest

from data.files import once, resolve_files
from data.formats import read_rows, validate, write_jsonl
from infra.errors import DataError

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"
CHAT = {"messages": [USER, FOUR], "task_type": "reasoning/addition"}


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return len(rows)


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
        *(
            (
                "messages",
                json.dumps({"messages": [USER, {**FOUR, "weight": weight}]}).encode(),
                f"weight {weight!r}; known",
            )
            for weight in (0.5, 2, -1, True, "0", float("nan"))
        ),
        (
            "messages",
            json.dumps({"messages": [USER, {**FOUR, "weight": 0}]}).encode(),
            "weight 0 only: nothing to train",
        ),
        (
            "preference",
            json.dumps({"prompt": "a", "chosen": "b", "rejected": [{**FIVE, "weight": 0}]}).encode(),
            '"rejected" has a turn of weight 0',
        ),
        ("text", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a number has thousands of digits"),
        ("text", json.dumps({f"column {n}": n for n in range(500)}).encode(), " ...)"),
        ("messages", json.dumps({"messages": [{"role": "x" * 10_000, "content": "a"}]}).encode(), "xxx...; known"),
        *(
            ("messages", json.dumps({"messages": [USER, {**FOUR, key: value}]}).encode(), f'has "{key}"')
            for key, value in (("train", False), ("loss", 0), ("loss_weight", 0.0), ("tool_calls", [{"id": 1}]))
        ),
        ("text", b'{"text": null}', '"text" is missing (it is null)'),
        ("preference", b'{"prompt": "a", "chosen": "b"}', '"rejected" is missing'),
        ("preference", b'{"prompt": "a", "chosen": "b", "rejected": "b"}', "are equal"),
        ("preference", b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}', "finite number, found 'x'"),
        ("preference", b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}', "finite number, found nan"),
        (
            "preference",
            b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": ' + b"9" * 400 + b"}",
            "finite number, found 999",
        ),
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


def test_a_dataset_without_the_split_names_those_that_it_has(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    import datasets

    one = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"test": one, "dev": one}).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        DataError, match=r"saved: no split 'train'; it has test, dev: write datasets:.*saved\?split=test"
    ):
        validate(f"datasets:{tmp_path / 'saved'}", "text")
    assert validate("datasets:~/saved?split=dev", "text").rows == 1
    with pytest.raises(DataError, match=r"~/saved: this folder was written by save_to_disk; write datasets:~/saved"):
        validate("~/saved", "text")
    with pytest.raises(DataError, match="no configurations; leave name= out"):
        validate("datasets:~/saved?split=dev&name=x", "text")
    (tmp_path / "loose").mkdir()
    write_jsonl(tmp_path / "loose" / "test.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"loose: .*Should be one of \['test'\].*; write datasets:NAME\?split=SPLIT"):
        validate("datasets:~/loose", "text")
    with pytest.raises(DataError, match="name a dataset or a folder"):
        validate("datasets:", "text")


def zst(content):
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


LINES = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n'
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.json", *(f"a.jsonl{suffix}" for suffix in COMPRESS)])
def test_text_in_every_spelling_is_read(tmp_path, name):
    compress = COMPRESS.get(os.path.splitext(name)[1], bytes)
    half = LINES.index(b"\r\n{") + 2
    (tmp_path / name).write_bytes(compress(LINES[:half]) + compress(LINES[half:]))  # streams may be joined
    for source in (tmp_path, tmp_path / name, f"{tmp_path}/*"):
        assert [row["text"] for row in read_rows(source, "text")] == ["a", "b"]
    (tmp_path / name).write_bytes(compress(b'{"text": "a"}\n{"text": 1}\n'))
    with pytest.raises(DataError, match=rf'{name}:2: "text" must be a string'):
        validate(tmp_path, "text")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_damaged_or_shortened_compressed_file_is_named(tmp_path, suffix):
    whole = COMPRESS[suffix](b"".join(b'{"text": "%s"}\n' % os.urandom(20).hex().encode() for _ in range(5000)))
    for content in (whole[: len(whole) // 2], b"no such format at all"):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.jsonl\{suffix}: damaged or cut off"):
            validate(tmp_path, "text")


def test_a_list_of_objects_is_read_and_its_mistakes_are_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    assert [row["text"] for row in read_rows(tmp_path, "text")] == ["a", "b"]
    for text, problem in [
        ('[{"text": "a"},\n {"text": }]', "a.json:2: not valid JSON"),
        ('[{"text": "a"}, 3]', "a.json:2: expected an object, found a number"),
        ("[" * 100_000, "a.json:1: not usable JSON"),
        ("[]", f"{tmp_path}: no rows"),
        ('{"data": [\n', "a.json:1: expected a list of objects, or one object a line"),
        ('"text"', "a.json:1: expected a list of objects, or one object a line"),
        ('{"text": a}\n', "a.json:1: not valid JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=re.escape(problem)):
            validate(tmp_path, "text")
    path.write_bytes(b'[{"text": "\xe9"}]')
    with pytest.raises(DataError, match=r"a\.json:1: not usable JSON: .*utf-8"):
        validate(tmp_path, "text")


FOREIGN = {
    "LFS's pointer": (".jsonl", POINTER, "a Git LFS pointer, not the file itself"),
    "LFS's pointer, a list": (".json", POINTER, "a Git LFS pointer"),
    "LFS's pointer, compressed": (".jsonl.zst", POINTER, "a Git LFS pointer"),
    "LFS's pointer, parquet": (".parquet", POINTER, "a Git LFS pointer"),
    "UTF-16": (".jsonl", '{"text": "a"}\n'.encode("utf-16"), "not UTF-8 but UTF-16"),
    "UTF-16, a list": (".json.gz", gzip.compress('[{"text": "a"}]'.encode("utf-16")), "not UTF-8 but UTF-16"),
    "gzip": (".jsonl", gzip.compress(b'{"text": "a"}'), "compressed with gzip: its name must end in .gz"),
    "parquet": (".json", b"PAR1", "parquet: its name must end in .parquet"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_something_else_is_named_as_that_in_one_line(tmp_path, name):
    suffix, content, problem = FOREIGN[name]
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(DataError) as caught:
        validate(tmp_path, "text")
    assert str(caught.value).startswith(f"{tmp_path}/a{suffix} is {problem}")
    assert len(str(caught.value).splitlines()) == 1


def test_values_that_parquet_holds_and_python_does_not_are_named(tmp_path):
    moment = pyarrow.array([2**62], pyarrow.timestamp("us"))
    bad_text = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
    for columns in ({"text": ["a"], "at": moment}, {"text": bad_text}):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"a\.parquet:1: not readable as parquet: "):
            validate(tmp_path, "text")


def test_what_a_folder_holds_beside_training_files_is_named(tmp_path, caplog):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "sub.jsonl").mkdir()  # a folder named like a file
    write_jsonl(tmp_path / "sub.jsonl" / "b.jsonl", [{"text": "b"}])
    for name in ("b.csv", "c.jsonl.7z", "d.parquet.gz", "README.md"):
        (tmp_path / name).write_text("x")
    with caplog.at_level(logging.WARNING):
        assert [row["text"] for row in read_rows(tmp_path, "text")] == ["a", "b"]
    (said,) = caplog.messages
    assert "are skipped" in said and all(
        f"{tmp_path}/{name}" in said for name in ("b.csv", "c.jsonl.7z", "d.parquet.gz")
    )
    with pytest.raises(DataError, match=r"README\.md: expected a"):
        validate(f"{tmp_path}/*.*", "text")
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "sub.jsonl" / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"in this folder; it holds .*README\.md"):
        validate(tmp_path, "text")


def test_a_file_of_several_names_is_read_once(tmp_path, caplog):
    (tmp_path / "d").mkdir()
    write_jsonl(tmp_path / "d" / "a.jsonl", [{"text": "a"}])
    (tmp_path / "d" / "b.jsonl").symlink_to("a.jsonl")
    assert [path.name for path in resolve_files(tmp_path / "d")] == ["a.jsonl"]
    assert [path.name for path in once([tmp_path / name for name in ("a", "d/b.jsonl", "c", "d/a.jsonl")])] == [
        "a", "b.jsonl", "c"
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        sources = [tmp_path / "d", f"{tmp_path}/d/*.jsonl", f"{tmp_path}/d/../d/a.jsonl"]
        assert [row["text"] for row in read_rows(sources, "text")] == ["a"]
    assert "a.jsonl is named more than once; reading it once" in caplog.text


def test_links_are_followed_and_end(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", [{"text": name}])
    for place in ("here", "there"):
        for number in range(3):  # every way round would be an endless one
            (tmp_path / place / f"link{number}").symlink_to(tmp_path / ("there" if place == "here" else "here"))
            (tmp_path / place / f"self{number}").symlink_to(tmp_path / place)
    for source in (tmp_path / "here", f"{tmp_path}/here/**/*.jsonl", f"{tmp_path}/here/**"):
        assert [row["text"] for row in read_rows(source, "text")] == ["here", "there"]


def test_sources_that_mean_nothing_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "d" / "a.jsonl", [{"text": "a"}])
    for source, problem in [
        ("", "an empty name"),
        (f"{tmp_path}/*.jsonl", "no file matches this pattern"),
        (f"{tmp_path}/*", "only folders match"),
        (f"{tmp_path}/none/**/*.jsonl", "no file matches this pattern"),
        ("s3://bucket/a.jsonl", "s3://bucket/a.jsonl: no such file; a URL is not read"),
        (f"file://{tmp_path}/d/a.jsonl", "without file://"),
        ("tatsu-lab/alpaca", "tatsu-lab/alpaca: no such file; write datasets:tatsu-lab/alpaca"),
        ("d/{a,b}.jsonl", "braces are not a pattern here"),
        ("run[1]/*.jsonl", "write [[] for a bracket in a name"),
        ("d/**.jsonl", "** stands alone between slashes: write **/*.jsonl"),
    ]:
        with pytest.raises(DataError, match=re.escape(problem)):
            validate(source, "text")
    (tmp_path / "d" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.jsonl: a link that leads nowhere"):
        validate(tmp_path / "d", "text")
    (tmp_path / "d" / "gone.jsonl").unlink()
    os.mkfifo(tmp_path / "d" / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl: not a regular file"):
        validate(tmp_path / "d", "text")


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_file_of_nothing_has_no_rows(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="no rows"):
        validate(tmp_path, "text")


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data.formats.open", refuse, raising=False)
    with pytest.raises(DataError, match=r"a\.jsonl: Permission denied"):
        validate(tmp_path, "text")


def test_only_a_weight_of_0_is_kept(tmp_path):
    turns = [{**USER, "weight": 1}, {**FOUR, "weight": 0}, {**USER, "weight": 0}, {**FIVE, "weight": 1.0}]
    turns += [USER, {**FOUR, "weight": None}]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    (row,) = read_rows(tmp_path / "a.jsonl", "messages")
    assert row["messages"] == [USER, {**FOUR, "weight": 0}, USER, FIVE, USER, FOUR]
    asked = {"prompt": [USER, {**FOUR, "weight": 0}, USER], "chosen": [USER, FOUR, USER, FIVE], "rejected": "4"}
    write_jsonl(tmp_path / "p.jsonl", [asked])
    assert list(read_rows(tmp_path / "p.jsonl", "preference")) == [
        {"prompt": [USER, FOUR, USER], "chosen": [FIVE], "rejected": [FOUR]}
    ]


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
