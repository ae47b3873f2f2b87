"""Token files: every token in order, across shards, and damaged folders named."""

import json

import numpy as np
import pytest

from data.config import BatchSettings
from data.loader import DataLoader
from data.tokenized import TokenWindows, document_segments, token_count, write_shards
from infra.errors import DataError

TEXTS = ["ab", "", "cde", "f" * 20]


class Letters:
    """a -> 2, b -> 3, ...; 0 ends a document and `bos_id` begins it."""

    def __init__(self, vocab_size: int = 100, bos_id: int = 1, offset: int = 2) -> None:
        self.vocab_size, self.bos_id, self.eos_id, self._offset = vocab_size, bos_id, 0, offset

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[ord(letter) - ord("a") + self._offset for letter in text] for text in texts]


@pytest.mark.parametrize("shard_tokens", [1, 3, 7, 1000])
@pytest.mark.parametrize("begin", [False, True])
def test_tokens_and_windows_cross_shards(tmp_path, shard_tokens, begin):
    tokenizer = Letters(bos_id=1 if begin else 0)
    done: list[float] = []
    summary = write_shards(iter(TEXTS), tokenizer, tmp_path, done.append, shard_tokens)
    assert token_count(tmp_path) == summary["tokens"]
    expected = [token for ids in tokenizer.encode_batch(TEXTS) for token in ([1] * begin + ids + [0])]
    windows = TokenWindows(tmp_path, length=4)
    shards = windows.index["shards"]
    assert summary == {"documents": 4, "tokens": len(expected), "shards": len(shards)} and done == [4]
    assert all(shard["tokens"] <= shard_tokens for shard in shards)
    assert windows.tokens(0, len(expected)).tolist() == expected
    assert len(windows) == (len(expected) - 1) // 4
    for number in range(len(windows)):
        assert windows[number].tolist() == expected[number * 4 : number * 4 + 5]
    with pytest.raises(IndexError):
        windows[len(windows)]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_small_vocabularies_take_two_bytes(tmp_path, vocab_size, dtype):
    write_shards(["a"], Letters(vocab_size, bos_id=0, offset=vocab_size - 1), tmp_path)
    stored = np.load(tmp_path / "shard-00000.npy")
    assert stored.dtype.name == dtype and stored.tolist() == [vocab_size - 1, 0]


def test_windows_feed_the_loader(tmp_path):
    write_shards(["abcdefghijklm" * 7], Letters(), tmp_path)
    windows = TokenWindows(tmp_path, length=8)
    loader = DataLoader({"text": windows}, BatchSettings(size=5), seed=0)
    seen = {tuple(item.tolist()) for step in range(len(windows) // 5 + 1) for item in loader.batch(step)}
    assert seen == {tuple(windows[number].tolist()) for number in range(len(windows))}


def test_segments_by_hand():
    segments, positions = document_segments(np.array([[5, 6, 0, 7, 0, 0, 8], [0, 5, 5, 5, 5, 5, 5]]), end_id=0)
    assert segments.tolist() == [[1, 1, 1, 2, 2, 3, 4], [1, 2, 2, 2, 2, 2, 2]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4, 5]]


def test_bad_input_and_damaged_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="document 1: token id 300 is outside the vocabulary of 100"):
        write_shards(["a"], Letters(offset=300), tmp_path / "a")
    with pytest.raises(DataError, match="no document"):
        write_shards([], Letters(), tmp_path / "b")
    with pytest.raises(DataError, match=r"index\.json: no such file"):
        TokenWindows(tmp_path / "b", 4)
    folder = tmp_path / "c"
    write_shards(TEXTS, Letters(), folder, shard_tokens=20)
    with pytest.raises(DataError, match="fewer than one window of 500"):
        TokenWindows(folder, 500)
    np.save(folder / "shard-00001.npy", np.zeros(1, np.uint16))
    with pytest.raises(DataError, match=r"shard-00001\.npy: holds \(1,\) uint16"):
        TokenWindows(folder, 4)
    (folder / "shard-00001.npy").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"shard-00001\.npy: not a readable token shard"):
        TokenWindows(folder, 4)
    (folder / "index.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match="expected format 1"):
        TokenWindows(folder, 4)
