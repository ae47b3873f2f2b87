"""One `Tokenizer` class for every tokenizer format of a Llama, and the training of a small one.

    load_tokenizer(folder)      tokenizer.json (any Hugging Face folder), else tokenizer.model: Llama 3's tiktoken ranks
                                or Llama 1/2's SentencePiece
    train_bpe(texts, size)      a byte-level BPE with Llama 3's special names and one token per digit

`encode` never adds a begin-of-text id, and turns text into special tokens only with `allow_special`. `save(folder)`
always writes tokenizer.json and tokenizer_config.json (with the chat template), which transformers and vLLM load.
"""

import re
from pathlib import Path

import tokenizers

from infra.errors import CheckpointError
from models.files import refuse_pointer
from models.tokenizers.base import Tokenizer
from models.tokenizers.hugging_face import HFTokenizer, load_through_transformers, read_config


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
        CheckpointError: the folder has no tokenizer, or its file is damaged.
    """
    folder = Path(folder)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        refuse_pointer(folder / name)
    try:
        if (folder / "tokenizer.json").is_file():
            return HFTokenizer(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), read_config(folder))
        if (folder / "tokenizer.model").is_file():
            return _load_model_file(folder / "tokenizer.model")
        if (folder / "tokenizer_config.json").is_file():
            return load_through_transformers(folder)
    except CheckpointError as error:
        raise error if str(folder) in str(error) else CheckpointError(f"{folder}: {error}") from None
    except Exception as error:  # each backend has its own exception types for a damaged file
        raise CheckpointError(f"tokenizer in {folder} cannot be read: {error}") from error
    raise CheckpointError(f"no tokenizer in {folder}: expected tokenizer.json or tokenizer.model")


def _load_model_file(file: Path) -> Tokenizer:
    """tokenizer.model is tiktoken's text (base64, space, rank) for Llama 3, SentencePiece's protobuf for older
    models."""
    with file.open("rb") as stream:
        first_line = stream.readline(4096)
    if re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", first_line):
        from models.tokenizers.tiktoken import TiktokenTokenizer

        return TiktokenTokenizer.from_file(file)
    from models.tokenizers.sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(file)
