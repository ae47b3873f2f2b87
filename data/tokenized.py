"""Token files for pretraining: memory-mapped shards that any number of readers share.

A folder holds index.json and shard-00000.npy, ...: one flat array each, readable with plain numpy (uint16 if the
vocabulary fits, else uint32). Documents follow each other, each closed by the end token. Windows may cross documents
and shards.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from infra.errors import DataError
from infra.storage.files import appear, sync_file, write_text

FORMAT = 1
_INDEX = "index.json"
_ENCODED_TOGETHER = 256  # documents


class TextEncoder(Protocol):
    """The part of `models.tokenizers.Tokenizer` that writing shards uses."""

    vocab_size: int
    bos_id: int
    eos_id: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


def write_shards(
    texts: Iterable[str],
    tokenizer: TextEncoder,
    folder: str | Path,
    on_progress: Callable[[float], None] | None = None,
    shard_tokens: int = 1 << 26,
) -> dict[str, Any]:
    """Encode documents into shards of at most `shard_tokens` tokens; returns {"documents", "tokens", "shards"} counts.

    Each document becomes [bos_id] + ids + [eos_id] (without bos_id if both are the same). index.json is written last:
    {"format", "dtype", "vocab_size", "end_id", "documents", "tokens", "shards": [{"file", "tokens"}]}. `on_progress`
    gets the number of documents done so far.

    Raises:
        DataError: no text, or a token id outside the vocabulary.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    writer = _ShardWriter(folder, shard_tokens)
    documents = 0
    for group in _groups(iter(texts)):
        for ids in tokenizer.encode_batch(group):
            documents += 1
            start = [] if tokenizer.bos_id == tokenizer.eos_id else [tokenizer.bos_id]
            tokens = np.array([*start, *ids, tokenizer.eos_id], dtype=np.int64)
            if tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size:
                raise DataError(
                    f"document {documents}: token id {tokens.max()} is outside the vocabulary of {tokenizer.vocab_size}"
                )
            writer.add(tokens.astype(dtype))
        if on_progress is not None:
            on_progress(documents)
    if not documents:
        raise DataError("nothing to tokenise: no document in the corpus")
    shards = writer.close()
    counts = {"documents": documents, "tokens": sum(shard["tokens"] for shard in shards)}
    index = {"format": FORMAT, "dtype": dtype.name, "vocab_size": tokenizer.vocab_size, "end_id": tokenizer.eos_id}
    write_text(folder / _INDEX, json.dumps({**index, **counts, "shards": shards}, indent=1) + "\n")
    return {**counts, "shards": len(shards)}


def token_count(folder: str | Path) -> int:
    """Tokens in a folder that `write_shards` wrote. Raises DataError for any other folder."""
    return int(_read_index(Path(folder))["tokens"])


class _ShardWriter:
    def __init__(self, folder: Path, shard_tokens: int) -> None:
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens={shard_tokens}: must be positive")
        self._folder, self._limit = folder, shard_tokens
        self._waiting: list[NDArray[Any]] = []
        self._held = 0
        self._shards: list[dict[str, Any]] = []

    def add(self, tokens: NDArray[Any]) -> None:
        self._waiting.append(tokens)
        self._held += len(tokens)
        while self._held >= self._limit:
            joined = np.concatenate(self._waiting)
            self._shards.append(_write_shard(self._folder, len(self._shards), joined[: self._limit]))
            self._waiting, self._held = [joined[self._limit :]], self._held - self._limit

    def close(self) -> list[dict[str, Any]]:
        if self._held:
            self._shards.append(_write_shard(self._folder, len(self._shards), np.concatenate(self._waiting)))
        return self._shards


def _groups(texts: Iterator[str]) -> Iterator[list[str]]:
    while group := list(islice(texts, _ENCODED_TOGETHER)):
        yield group


class TokenWindows:
    """Windows of `length` + 1 tokens from a token folder: window i is tokens [i * length, (i + 1) * length].

    Inputs are window[:-1], targets window[1:]. Neighbouring windows share one token, so that every token but the first
    is a target once. Tokens after the last full window are not used. Items are int64 [length + 1].

    Raises:
        DataError: no index, another format, a missing or shortened shard, or fewer tokens than one window.
    """

    def __init__(self, folder: str | Path, length: int) -> None:
        self.folder, self.length = Path(folder), length
        self.index = _read_index(self.folder)
        self._shards = [self._open(shard) for shard in self.index["shards"]]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        if len(self) < 1:
            tokens = self.index["tokens"]
            raise DataError(f"{folder}: {tokens} tokens, fewer than one window of {length} + 1; lower sequence_length")

    def __len__(self) -> int:
        return max(0, (int(self._starts[-1]) - 1) // self.length)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return self.tokens(index * self.length, self.length + 1)

    def tokens(self, start: int, count: int) -> NDArray[np.int64]:
        """`count` tokens of the whole stream from position `start`, across shards."""
        parts = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while count > 0:
            offset = start - int(self._starts[shard])
            part = self._shards[shard][offset : offset + count].astype(np.int64)
            parts.append(part)
            start, count, shard = start + len(part), count - len(part), shard + 1
        return np.concatenate(parts)

    def _open(self, shard: dict[str, Any]) -> NDArray[Any]:
        path = self.folder / shard["file"]
        try:
            tokens: NDArray[Any] = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable token shard: {error}") from None
        if tokens.shape != (shard["tokens"],) or tokens.dtype.name != self.index["dtype"]:
            raise DataError(f"{path}: holds {tokens.shape} {tokens.dtype}, the index says {shard['tokens']} tokens")
        return tokens


def document_segments(inputs: NDArray[np.int64], end_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """inputs [B, T] -> (segment_ids, position_ids), both [B, T]: a new segment begins after every end token.

    They keep attention within a document (Llama 3, section 3.2). Segments count from 1 in each row.
    """
    ended = inputs == end_id
    segments = 1 + np.cumsum(ended, axis=1) - ended
    places = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape)
    begins = np.zeros_like(inputs)
    begins[:, 1:] = np.where(ended[:, :-1], places[:, 1:], 0)
    return segments, places - np.maximum.accumulate(begins, axis=1)


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / _INDEX
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; is this a folder of tokens?") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{path}: expected format {FORMAT}")
    return index


def _write_shard(folder: Path, number: int, tokens: NDArray[Any]) -> dict[str, Any]:
    name = f"shard-{number:05d}.npy"
    with appear(folder / name) as temporary:
        with open(temporary, "wb") as file:  # given a path, numpy would add its suffix
            np.save(file, tokens)
        sync_file(temporary)
    return {"file": name, "tokens": len(tokens)}
