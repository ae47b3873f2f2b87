"""The standard library as text: capped, ordered, whole documents, split sides."""

import ast
import sysconfig
from pathlib import Path

import pytest

from data import stdlib_text
from data.config import CorpusSettings
from data.stdlib_text import is_held_out, stdlib_documents, stdlib_instructions
from infra.errors import DataError


def test_cap_is_kept_and_nearly_used_and_kinds_are_balanced():
    documents = stdlib_documents(CorpusSettings(stdlib_bytes=600_000))
    sizes = dict.fromkeys(("help", "docstring", "source"), 0)
    for document in documents:
        sizes[document.kind] += len(document.text.encode())
    assert 590_000 < sum(sizes.values()) <= 600_000
    assert all(size > 150_000 for size in sizes.values()), sizes
    assert stdlib_documents(CorpusSettings(stdlib_bytes=600_000)) == documents


def test_source_documents_are_whole_files():
    root = Path(sysconfig.get_path("stdlib"))
    documents = stdlib_documents(CorpusSettings(stdlib_bytes=200_000, stdlib_parts=("source",)))
    for document in documents:
        assert document.kind == "source"
        assert document.text.splitlines() == (root / document.name).read_text(encoding="utf-8-sig").splitlines()


def test_docstring_documents_start_with_their_signature():
    tree = ast.parse((Path(sysconfig.get_path("stdlib")) / "posixpath.py").read_text())
    by_name = {document.name: document.text for document in stdlib_text._docstrings_of("posixpath.py", tree)}
    assert by_name["posixpath.basename"] == "posixpath.basename(p)\nReturns the final component of a pathname\n"
    documents = stdlib_documents(CorpusSettings(stdlib_bytes=50_000, stdlib_parts=("docstring",)))
    assert len(documents) > 50
    assert all(document.text.splitlines()[0].startswith(document.name) for document in documents)


def test_no_bytes_no_documents_and_missing_library_is_named(tmp_path, monkeypatch):
    assert stdlib_documents(CorpusSettings(stdlib_bytes=0)) == []
    monkeypatch.setattr(stdlib_text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"corpus\.stdlib_bytes"):
        stdlib_documents(CorpusSettings())


def test_instructions_are_disjoint_short_and_known():
    train, held_out = stdlib_instructions("train"), stdlib_instructions("held_out")
    questions = [{row["messages"][0]["content"] for row in rows} for rows in (train, held_out)]
    assert not questions[0] & questions[1]
    assert len(train) > 300 and len(held_out) > 30
    rows = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in train + held_out}
    assert rows["What does os.path.basename do?"] == "Returns the final component of a pathname"
    assert max(map(len, rows.values())) <= 60
    assert {row["task_type"] for row in train} == {"stdlib/docstring"}


def test_validation_share_follows_the_text():
    texts = [f"document {n}" for n in range(4000)]
    share = sum(is_held_out(text, 0.05) for text in texts) / len(texts)
    assert 0.03 < share < 0.07
    assert not any(is_held_out(text, 0.0) for text in texts)
