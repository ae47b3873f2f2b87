"""Tokenizers of Hugging Face folders (tokenizer.json), and training a byte-level BPE one."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models

from infra.errors import CheckpointError, ConfigError
from models.files import read_object, refuse_pointer
from models.tokenizers.base import LLAMA3_SPLIT, Tokenizer, add_specials, byte_level, llama3_specials


class HFTokenizer(Tokenizer):
    """A tokenizer from any model's tokenizer.json."""

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        added = backend.get_added_tokens_decoder()
        specials = {token.content: index for index, token in added.items() if token.special}
        vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._config = dict(config)
        super().__init__(
            specials, vocab_size, _token_text(config.get("bos_token")), _token_text(config.get("eos_token"))
        )

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A copy that reads the names of special tokens as ordinary text. (Flipping the switch is not thread-safe.)"""
        twin = tokenizers.Tokenizer.from_str(self._backend.to_str())
        twin.encode_special_tokens = True
        return twin

    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        backend = self._backend if allow_special else self._plain
        if len(texts) == 1:
            return [backend.encode(texts[0], add_special_tokens=False).ids]
        return [encoding.ids for encoding in backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def to_backend(self) -> tokenizers.Tokenizer:
        return self._backend

    def config(self) -> dict[str, Any]:
        """The folder's config with the tokens that we use and another class: a class with a name of its own rebuilds
        the tokenizer from its vocabulary by its own rules, and gives other ids than tokenizer.json."""
        ours = ("tokenizer_class", "bos_token", "eos_token", "pad_token")
        kept = {key: value for key, value in self._config.items() if value is not None and key not in ours}
        return {**super().config(), **kept}


def own_template(folder: Path) -> tuple[Path, str] | None:
    """(file, Jinja source) of a folder's chat template; None if it has none.

    Raises:
        CheckpointError: the folder has several templates and none is the default.
    """
    refuse_pointer(file := folder / "chat_template.jinja")
    if file.is_file():
        return file, file.read_text(encoding="utf-8", errors="replace")
    for file in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        template = read_object(file).get("chat_template") if file.is_file() else None
        if isinstance(template, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
            named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
            if "default" not in named:
                raise CheckpointError(f"{file}: chat_template names no default, only {', '.join(named) or 'nothing'}")
            template = named["default"]
        if template:
            return file, str(template)
    return None


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE like Llama 3's, but with one token per digit, so that a small model can do arithmetic.

    The ids are 256 bytes, merges, then the first 16 of Llama 3.1's special tokens. `vocab_size` counts all of them; a
    small corpus may give fewer. Equal texts in equal order give an equal tokenizer.

    Raises:
        ConfigError: `vocab_size` leaves no room for the bytes and the specials.
    """
    specials = llama3_specials(16)
    if vocab_size < 256 + len(specials):
        raise ConfigError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(specials)} special tokens come first"
        )
    backend = tokenizers.Tokenizer(tokenizer_models.BPE())
    backend.pre_tokenizer = byte_level(LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"))
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    add_specials(backend, specials, bos=specials[0])
    return HFTokenizer(backend, {})


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json, with the folder's template from any of its places."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config.update(read_object(folder / name))
    if template := own_template(folder):
        config["chat_template"] = template[1]
    return config


def load_through_transformers(folder: Path) -> Tokenizer:
    """Older layouts (vocab.json with merges.txt, and others), which transformers converts."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"no tokenizer in {folder}: tokenizer_config.json, but no tokenizer.json, tokenizer.model or other "
            "vocabulary that transformers can read"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(f"tokenizer in {folder} ({type(loaded).__name__}) has no tokenizer.json form")
    return HFTokenizer(backend, {**read_config(folder), "bos_token": loaded.bos_token, "eos_token": loaded.eos_token})


def _token_text(value: Any) -> str | None:
    """A token's text from a config, which writes it as text or as {"content": text, ...}."""
    return value.get("content") if isinstance(value, dict) else value
