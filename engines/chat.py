"""Conversations as token ids, in and out: what loops above need of a model folder's tokenizer and chat format."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from models.chat import render, render_with_mask
from models.tokenizer import Tokenizer, load_tokenizer


class ChatTokenizer:
    """The tokenizer of a model folder, speaking its chat format. Errors as `models.tokenizer` and `models.chat`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stop_ids: tuple[int, ...] = tuple(tokenizer.stop_ids)

    @classmethod
    def load(cls, folder: str | Path) -> "ChatTokenizer":
        return cls(load_tokenizer(folder))

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The conversation up to where the assistant's answer starts."""
        return render(messages, self.tokenizer, add_generation_prompt=True)

    def example(
        self, messages: Sequence[Mapping[str, Any]], train_on: Literal["all", "last"]
    ) -> tuple[list[int], list[int]]:
        """(ids [T], mask [T]): mask 1 on what the assistant must produce."""
        return render_with_mask(messages, self.tokenizer, train_on)

    def answer(self, text: str) -> list[int]:
        """An assistant turn's ids, its end included: what would follow `prompt`."""
        return [*self.tokenizer.encode(text), self.tokenizer.eot_id]

    def text(self, ids: Sequence[int]) -> str:
        """Sampled ids as text, special tokens left out."""
        return self.tokenizer.decode(list(ids))
