"""Conversations to token ids, with a mask of the ids that the loss sees.

Two formats, chosen by the tokenizer's special tokens:

llama3  <|begin_of_text|> then per message <|start_header_id|>ROLE<|end_header_id|>\\n\\nCONTENT<|eot_id|>;
        a prompt ends with an open assistant header.
llama2  per exchange <s>[INST] USER [/INST] ANSWER </s>; a system message becomes <<SYS>> tags in the first USER.

Content is stripped and encoded as ordinary text: "<|eot_id|>" typed by a user becomes its letters, never the token.
`TEMPLATES` are the same formats in Jinja. They are saved with a model, so that transformers and vLLM build the ids that
the model was trained on. (Jinja renders to one string, so those programs read special names in a user's text as special
tokens. To serve untrusted text, render it here and pass ids.)
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from infra.errors import ConfigError

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | ..., "content": text[, "weight": 0 for a turn that is not trained on]}"""

TEMPLATES = {
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
        "{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = '<<SYS>>\\n' + (messages[0]['content'] | trim) + '\\n<</SYS>>\\n\\n' %}"
        "{% set turns = messages[1:] %}"
        "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for message in turns %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] not in ['user', 'assistant'] %}"
        "{{ raise_exception('Llama 2 turns must alternate user, assistant, user, ...') }}"
        "{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{% set content = message['content'] | trim %}"
        "{{ bos_token + '[INST] ' + ((system + content) | trim if loop.first else content) + ' [/INST]' }}"
        "{% else %}"
        "{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
}
LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class Encoder(Protocol):
    """The part of `models.tokenizers.Tokenizer` that rendering uses."""

    specials: dict[str, int]
    chat_format: str | None
    bos_id: int
    eos_id: int
    eot_id: int

    def encode(self, text: str) -> list[int]: ...


def chat_format(specials: Mapping[str, int]) -> str | None:
    """The chat format of a tokenizer with these special tokens: "llama3", "llama2", or None."""
    if {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= specials.keys():
        return "llama3"
    if {"<s>", "</s>"} <= specials.keys():
        return "llama2"
    return None


def render(messages: Sequence[Message], tokenizer: Encoder, add_generation_prompt: bool = False) -> list[int]:
    """The ids of a conversation; `add_generation_prompt` leaves it open where the assistant's answer starts.

    Raises:
        ConfigError: the tokenizer has the special tokens of neither format.
        ValueError: no messages; or Llama 2 turns that do not alternate, or that contain its tags.
    """
    return [token for piece, _ in _pieces(messages, tokenizer, add_generation_prompt) for token in piece]


def render_with_mask(
    messages: Sequence[Message], tokenizer: Encoder, train_on: Literal["all", "last"] = "all"
) -> tuple[list[int], list[int]]:
    """(ids [T], mask [T]): the mask is 1 on the tokens that the assistant must produce, with its end-of-turn token.

    A turn of weight 0 has mask 0. `train_on="last"` keeps only the last assistant turn. The mask belongs to the token
    itself: if position t predicts token t + 1, shift it with the labels. Raises as `render`, and ValueError if no
    assistant turn is trained on.
    """
    pieces = _pieces(messages, tokenizer, open_end=False)
    answers = [index for index, (_, is_answer) in enumerate(pieces) if is_answer]
    if not answers:
        raise ValueError("nothing to train on: the conversation has no assistant turn")
    turns = [message for message in messages if message["role"] == "assistant"]
    wanted = [index for index, turn in zip(answers, turns, strict=True) if turn.get("weight", 1)]
    kept = set(answers if train_on == "all" else answers[-1:]) & set(wanted)
    if not kept:
        raise ValueError(
            f"nothing to train on: {'every' if train_on == 'all' else 'the last'} assistant turn has weight 0"
        )
    ids: list[int] = []
    mask: list[int] = []
    for index, (piece, _) in enumerate(pieces):
        ids += piece
        mask += [int(index in kept)] * len(piece)
    return ids, mask


def _pieces(messages: Sequence[Message], tokenizer: Encoder, open_end: bool) -> list[tuple[list[int], bool]]:
    """The conversation as (ids, whether the assistant must produce them) pairs in order."""
    if not messages:
        raise ValueError("a conversation needs at least one message")
    if tokenizer.chat_format == "llama3":
        return _llama3(messages, tokenizer, open_end)
    if tokenizer.chat_format == "llama2":
        return _llama2(messages, tokenizer)
    raise ConfigError(
        "this tokenizer has neither Llama 3's header tokens nor Llama 2's <s> and </s>: no chat format fits"
    )


def _llama3(messages: Sequence[Message], tokenizer: Encoder, open_end: bool) -> list[tuple[list[int], bool]]:
    start, end = tokenizer.specials["<|start_header_id|>"], tokenizer.specials["<|end_header_id|>"]
    blank_line = tokenizer.encode("\n\n")

    def header(role: str) -> list[int]:
        return [start, *tokenizer.encode(role), end, *blank_line]

    pieces: list[tuple[list[int], bool]] = [([tokenizer.bos_id], False)]
    for message in messages:
        pieces.append((header(message["role"]), False))
        content = [*tokenizer.encode(message["content"].strip()), tokenizer.eot_id]
        pieces.append((content, message["role"] == "assistant"))
    if open_end:
        pieces.append((header("assistant"), False))
    return pieces


def _llama2(messages: Sequence[Message], tokenizer: Encoder) -> list[tuple[list[int], bool]]:
    """Encodes a prompt and its answer as one text, because tokens may join across them, then cuts after the prompt."""
    turns = _llama2_turns(messages)
    pieces: list[tuple[list[int], bool]] = []
    for index in range(0, len(turns), 2):
        prompt_text = f"[INST] {turns[index]} [/INST]"
        prompt = [tokenizer.bos_id, *tokenizer.encode(prompt_text)]
        pieces.append((prompt, False))
        if index + 1 == len(turns):
            break
        whole = [tokenizer.bos_id, *tokenizer.encode(f"{prompt_text} {turns[index + 1]} "), tokenizer.eos_id]
        cut = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        pieces[-1] = (whole[:cut], False)
        pieces.append((whole[cut:], True))
    return pieces


def _llama2_turns(messages: Sequence[Message]) -> list[str]:
    """[user, assistant, user, ...] contents, the system message folded into the first."""
    for number, message in enumerate(messages):
        if tag := next((tag for tag in LLAMA2_TAGS if tag in message["content"]), None):
            raise ValueError(
                f"message {number} contains {tag}: Llama 2's tags are plain text, so that it would read as a turn"
            )
    system = ""
    if messages[0]["role"] == "system":
        system = f"<<SYS>>\n{messages[0]['content'].strip()}\n<</SYS>>\n\n"
        messages = messages[1:]
    for number, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise ValueError("Llama 2 turns must alternate user, assistant, user, ...")
    if not messages:
        raise ValueError("a Llama 2 conversation needs a user message")
    turns = [message["content"].strip() for message in messages]
    return [(system + turns[0]).strip(), *turns[1:]]
