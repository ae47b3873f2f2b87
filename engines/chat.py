"""Conversations as token ids, in and out: what loops above need of a model folder's tokenizer and chat format.

What is trained on is what is served: `write_chat` gives a folder the template, the tokenizer and the stop tokens that
training renders with; `check_chat` says before a run whether plain transformers (and so vLLM) then gives the same ids.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from engines.quiet import one_line, quiet_transformers
from infra.errors import CheckpointError
from infra.storage.files import write_text
from models.chat import TEMPLATES, render, render_with_mask
from models.files import read_object
from models.hf_format import token_ids
from models.tokenizers import Tokenizer, load_tokenizer
from models.tokenizers.hugging_face import own_template

SYSTEM = {"role": "system", "content": "Be brief; don't guess."}
ASKED = {"role": "user", "content": "What is  2 + 345?\n\n- añadir: 日本語"}
ANSWERED = {"role": "assistant", "content": "347.\n  It's the sum."}
PROBES = {
    "a question": [ASKED],
    "a system message and a question": [SYSTEM, ASKED],
    "a question after an answer": [ASKED, ANSWERED, ASKED],
    "an answered question": [SYSTEM, ASKED, ANSWERED],
}
"""Conversations that training and serving must render alike."""


class ChatTokenizer:
    """The tokenizer of a model folder, speaking its chat format. Errors as `models.tokenizers` and `models.chat`."""

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


def write_chat(source: Path, folder: Path) -> None:
    """Give `folder` what a conversation is trained with: `source`'s tokenizer, our template, our stop tokens.

    tokenizer.json and tokenizer_config.json (the template in it) are written, and generation_config.json keeps what
    `source` says beside the ids.

    Raises:
        CheckpointError: a file of `source` that cannot be read.
    """
    tokenizer = load_tokenizer(source)
    tokenizer.save(folder)
    for name in ("chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)  # what they say is in ours, and they would be read first
    own = source / "generation_config.json"
    generation = {**(read_object(own) if own.is_file() else {}), **token_ids(tokenizer)}
    write_text(folder / own.name, json.dumps(generation, indent=2))


def check_chat(folder: Path) -> int:
    """Whether a model trained from `folder`, and saved with `write_chat`, is served with the ids that it is trained on.

    Returns how many ids the model needs, those of tokens that only tokenizer_config.json names among them.

    Raises:
        CheckpointError: no chat format fits the tokenizer; the folder's own template is another format than ours; or
            transformers reads a conversation otherwise than we do.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.chat_format is None:
        raise CheckpointError(
            f"{folder}: its tokenizer has neither Llama 3's header tokens nor Llama 2's <s> and </s>, so that no chat "
            "format fits"
        )
    with TemporaryDirectory() as written:
        write_chat(folder, Path(written))
        served = _load_served(Path(written), folder)
    if difference := _difference(tokenizer, served, TEMPLATES[tokenizer.chat_format]):
        raise CheckpointError(
            f"{folder}: its tokenizer reads text after a special token otherwise than text alone, so that transformers "
            f"and vLLM would serve other ids than are trained on: {difference}. Remove tokenizer.json where "
            "tokenizer.model lies beside it, or take another tokenizer"
        )
    if own := own_template(folder):
        file, template = own
        if difference := _difference(tokenizer, served, template):
            ours = f"the {tokenizer.chat_format} format"
            raise CheckpointError(
                f"{file}: its chat template is not {ours}, which recua trains a model with such a tokenizer on: "
                f"{difference}. Remove the chat template there, to train and to serve in {ours}, or start from a "
                "folder without one, such as the base model"
            )
    return max(tokenizer.vocab_size, *(index + 1 for index in served.get_vocab().values()))


def _load_served(folder: Path, source: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            served = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            served.apply_chat_template([ASKED])  # which reads more of its config than loading does
            return served
    except Exception as error:  # whatever the file's content makes of it
        raise CheckpointError(f"{source}: transformers cannot use its tokenizer: {one_line(error)}") from error


def _difference(tokenizer: Tokenizer, served: Any, template: str) -> str | None:
    """Where transformers, with `template`, renders a probe to other ids than we do; None where it never does."""
    for what, messages in PROBES.items():
        open_end = messages[-1]["role"] != "assistant"
        ours = render(messages, tokenizer, add_generation_prompt=open_end)
        try:
            with quiet_transformers():
                theirs = served.apply_chat_template(
                    messages, chat_template=template, add_generation_prompt=open_end, return_dict=False
                )
        except Exception as error:  # a template raises what it likes
            return f"it refuses {what} ({one_line(error)})"
        if theirs != ours:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            texts = [repr(served.decode(ids[at : at + 8])) for ids in (theirs, ours)]
            return f"it renders {what} to {len(theirs)} ids, ours has {len(ours)}: {texts[0]} in place of {texts[1]}"
    return None
