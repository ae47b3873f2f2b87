"""The base class of Llama tokenizers: text to ids and back, and the special tokens."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, pre_tokenizers, processors

from infra.errors import CheckpointError
from infra.storage.files import write_text
from models.chat import TEMPLATES, chat_format

LLAMA3_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""Llama 3's pre-tokens: contractions, words with one leading mark, up to three digits, marks, line ends, spaces."""


def llama3_specials(count: int = 256) -> list[str]:
    """The first `count` of Llama 3.1's special tokens in id order; those without a name are numbered reserved
    tokens."""
    named = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(count))
    return [named[index] if index in named else next(reserved) for index in range(count)]


class Tokenizer(ABC):
    """Text <-> ids.

    `specials` maps every special token's text to its id. `bos_id` starts a document, `eos_id` ends one, `eot_id` ends a
    chat turn (Llama 2: the same as `eos_id`), `pad_id` pads (`eos_id` if the vocabulary has no padding token), and each
    of `stop_ids` ends an answer. `vocab_size` is the highest id + 1: the rows of an embedding.
    """

    def __init__(self, specials: Mapping[str, int], vocab_size: int, bos: str | None, eos: str | None) -> None:
        self.specials = dict(specials)
        self.vocab_size = vocab_size
        self.chat_format = chat_format(self.specials)
        names = self.specials
        bos = next((name for name in ("<|begin_of_text|>", "<s>", bos, eos) if name in names), None)
        eos = next((name for name in ("<|end_of_text|>", "</s>", eos) if name in names), None)
        if bos is None or eos is None:
            raise CheckpointError("the tokenizer names no end-of-text token (eos_token in tokenizer_config.json)")
        self.bos, self.eos = bos, eos
        self.bos_id, self.eos_id = names[bos], names[eos]
        self.eot_id = names.get("<|eot_id|>", self.eos_id)
        pads = (name for name in ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]") if name in names)
        self.pad = next(pads, eos)
        self.pad_id = names[self.pad]
        stops = {self.eos_id, self.eot_id, names.get("<|eom_id|>", self.eos_id)}
        self.stop_ids = tuple(sorted(stops))

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`. `allow_special` reads the names of special tokens as these tokens: only for trusted text."""
        return self.encode_batch([text], allow_special)[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        """`encode` of each text; faster if the backend has threads."""

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def to_backend(self) -> tokenizers.Tokenizer:
        """The same mapping as a `tokenizers.Tokenizer`, which starts with `bos_id` if it adds special tokens."""

    def config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json, without the chat template."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos,
            "eos_token": self.eos,
            "pad_token": self.pad,
            "clean_up_tokenization_spaces": False,
        }

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, and tokenizer_config.json with the chat template of this tokenizer's format."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config()
        if self.chat_format:
            config["chat_template"] = TEMPLATES[self.chat_format]
        write_text(folder / "tokenizer.json", self.to_backend().to_str(pretty=False))
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True))


def add_specials(backend: tokenizers.Tokenizer, names: Sequence[str], bos: str) -> None:
    """Append special tokens, and let `bos` start every text that is encoded with special tokens."""
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def split_on_specials(text: str, specials: Mapping[str, int]) -> Iterator[str | int]:
    """`text` cut at the names of special tokens: pieces of text (never empty) and ids, in order."""
    pattern = "|".join(re.escape(name) for name in sorted(specials, key=len, reverse=True))
    for piece in re.split(f"({pattern})", text):
        if piece:
            yield specials.get(piece, piece)


def byte_level(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
