"""Cleaning by hand-made documents, and the whole corpus of a recipe."""

import json
import random
from collections import Counter

import pytest

from data.config import CleaningSettings, CorpusSettings
from data.corpus import clean, write_corpus
from data.dedup import ExactDuplicates, LineDuplicates, NearDuplicates
from data.filters import why_rejected
from data.formats import write_jsonl
from infra.errors import ConfigError, DataError

PROSE = "A recua is a train of pack llamas that can lose an animal and keep walking over the high passes.\n"
OTHER = "Any process, node or driver may die at any moment, and no finished work is lost.\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE, None),
        ("def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # prints three\n", None),
        ("short", "too_short"),
        ("0x1f, 0x2e, 0x3d, 0x4c, 0x5b, 0x6a, 0x79, 0x88, 0x97\n" * 2, "few_letters"),
        ("QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWZnaGlqa2xtbm9wcXJzdHV2d3h5eg", "long_words"),
        ("Click here to read more.\n" * 9 + PROSE, "repeated_lines"),
    ],
)
def test_filters_by_hand(text, reason):
    assert why_rejected(text, CleaningSettings()) == reason


def _words(count: int, seed: int) -> list[str]:
    return [f"w{random.Random(seed * 1_000_003 + n).randrange(5000)}" for n in range(count)]


def test_exact_copies_ignore_white_space():
    exact = ExactDuplicates()
    assert [exact.seen(text) for text in ("a b", "a  b\n", "a c")] == [False, True, False]


def test_near_copies_are_found_and_different_texts_are_not():
    near = NearDuplicates(0.8)
    texts = [_words(400, seed) for seed in range(60)]
    assert not any(near.seen(" ".join(words)) for words in texts)
    changed = [[*words[:200], "other", *words[201:]] for words in texts]  # 5 of 396 shingles differ
    assert all(near.seen(" ".join(words)) for words in changed)
    half = [[*words[:200], *_words(200, 1000 + n)] for n, words in enumerate(texts)]  # Jaccard about 1/3
    assert not any(near.seen(" ".join(words)) for words in half)


def test_shared_lines_stay_in_the_first_documents():
    lines = LineDuplicates(documents=2)
    notice = "All rights reserved by the owners.\n"
    kept = [lines.without_seen_lines(f"{notice}short\nonly in document number {n}\n{notice}") for n in range(3)]
    assert [text.count(notice) for text in kept] == [2, 2, 0]
    assert kept[2] == "short\nonly in document number 2\n"


def test_cleaning_counts_what_it_removes():
    rows = [{"text": text} for text in (PROSE, PROSE, "x", PROSE.replace("passes", "hills"), OTHER)]
    removed: Counter[str] = Counter()
    kept = list(clean(iter(rows), CleaningSettings(near_duplicate=0.6), removed))
    assert [row["text"] for row in kept] == [PROSE, OTHER]
    assert removed == {"exact_copy": 1, "too_short": 1, "near_copy": 1}
    assert len(list(clean(iter(rows), CleaningSettings(enabled=False), Counter()))) == 5


def test_corpus_of_library_and_files(tmp_path):
    own = [{"text": f"{PROSE}Day {n}: {' '.join(_words(30, n))}\n"} for n in range(200)]
    write_jsonl(tmp_path / "own.jsonl", own)
    settings = CorpusSettings(stdlib_bytes=100_000, files=(str(tmp_path / "own.jsonl"),), held_out_share=0.1)
    told: list[float] = []
    summary = write_corpus(settings, tmp_path / "a", 0, on_progress=lambda done, total: told.append(done))
    read = {name: (tmp_path / "a" / f"{name}.jsonl").read_text().splitlines() for name in ("text", "held_out")}
    assert (summary["documents"], summary["held_out"]) == (len(read["text"]), len(read["held_out"])) and told
    assert 5 < len(read["held_out"]) < 60 and not set(read["text"]) & set(read["held_out"])
    sources = Counter(json.loads(line)["source"] for line in read["text"] + read["held_out"])
    assert sources[str(tmp_path / "own.jsonl")] == 200
    assert {"stdlib/source", "stdlib/docstring", "stdlib/help"} < set(sources)
    write_corpus(settings, tmp_path / "b", 1)
    other = (tmp_path / "b" / "text.jsonl").read_text().splitlines()
    assert other != read["text"] and sorted(other) == sorted(read["text"])


def test_bad_corpora_are_named_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"set corpus\.stdlib_bytes or corpus\.files"):
        write_corpus(CorpusSettings(stdlib_bytes=0), tmp_path / "out", 0)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
        write_corpus(CorpusSettings(stdlib_bytes=0, files=(str(tmp_path / "bad.jsonl"),)), tmp_path / "out", 0)
    (tmp_path / "short.jsonl").write_text('{"text": "fine"}\n')
    with pytest.raises(DataError, match=r"cleaning left none of 1 documents; removed: .'too_short': 1"):
        write_corpus(CorpusSettings(stdlib_bytes=0, files=(str(tmp_path / "short.jsonl"),)), tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


def test_of_few_documents_one_is_held_out_and_of_one_none(tmp_path):
    def split(texts, **settings):
        write_jsonl(tmp_path / "own.jsonl", [{"text": text} for text in texts])
        corpus = CorpusSettings(stdlib_bytes=0, files=(str(tmp_path / "own.jsonl"),), **settings)
        write_corpus(corpus, tmp_path / "out", 0)
        return [
            sorted(json.loads(line)["text"] for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines())
            for name in ("text", "held_out")
        ]

    texts = [" ".join(_words(40, n)) for n in range(10)]
    train, held_out = split(texts, cleaning=CleaningSettings(min_letter_share=0.0))
    assert len(held_out) == 1 and sorted(train + held_out) == sorted(texts)
    loose = CleaningSettings(enabled=False)
    assert split([*texts[::-1], held_out[0]], cleaning=loose) == [train, held_out * 2], "copies stay together"
    assert split(texts, cleaning=loose, held_out_share=0) == [sorted(texts), []]
    assert split(texts[:1] * 2, cleaning=loose) == [texts[:1] * 2, []]
    assert split(["", texts[0]], cleaning=loose) == [["", texts[0]], []], "an empty text measures nothing"
    with pytest.raises(DataError, match=r"corpus\.held_out_share = 0\.99999 holds out all 10 documents"):
        split(texts, cleaning=loose, held_out_share=0.99999)
    with pytest.raises(DataError, match=r"removed: \{'too_short': 2\}: give more text .*corpus\.cleaning"):
        split(["a", "b"])
