"""The shapes of rows in training files, checked and converted to one form.

    messages     {"messages": [{"role", "content"}, ...]}      at least one answered turn
    preference   {"prompt", "chosen", "rejected"[, "margin"]}  strings or messages; both answers may repeat the prompt
    prompt       {"prompt"[, "answer"]}                        for reinforcement learning
    text         {"text"}                                      pretraining

A message is {"role", "content"[, "weight"]}. An assistant turn of weight 0 is read but not trained on; the default is
1. Other programs' names for that weight, and tool calls beside the content, are refused, because dropping them would
train on text that nobody wrote. All shapes keep an optional "task_type" and drop other columns. Every checker raises
ValueError with the problem but not its place: `data.formats` adds the file and line.
"""

import sys
from collections.abc import Callable
from textwrap import shorten
from typing import Any, Literal

Row = dict[str, Any]
Message = dict[str, Any]
Shape = Literal["messages", "preference", "prompt", "text"]

ROLES = ("system", "user", "assistant", "tool", "ipython")
UNTRAINED = ("loss", "loss_weight", "train", "train_on_turn", "trainable")
"""Other programs' names for the weight of a turn."""
CALLS = ("tool_calls", "function_call")
"""Parts of a turn that no chat format here renders."""
_LARGEST = sys.float_info.max
_SHOWN = 200
"""Most characters of a row in an error message."""


def check_row(row: object, shape: Shape) -> Row:
    """The row in the one form of its shape (preference: `prompt`, `chosen` and `rejected` as lists of messages).

    Raises:
        ValueError: what is missing or wrong, in one line.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {_named(row)}")
    checkers: dict[str, Callable[[Row], Row]] = {
        "messages": _messages_row,
        "preference": _preference_row,
        "prompt": _prompt_row,
        "text": _text_row,
    }
    checked = checkers[shape](row)
    task_type = row.get("task_type")
    if task_type is not None:
        checked["task_type"] = _string(task_type, '"task_type"')
    return checked


def _text_row(row: Row) -> Row:
    return {"text": _string(_required(row, "text"), '"text"')}


def _messages_row(row: Row) -> Row:
    messages = _messages(_required(row, "messages"), "messages")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError('"messages" has no assistant turn: nothing to train on')
    if not all(message["content"].strip() for message in answers):
        raise ValueError('"messages" has an empty assistant turn')
    if not any(map(is_trained, answers)):
        raise ValueError('"messages" has assistant turns of weight 0 only: nothing to train on')
    return {"messages": messages}


def is_trained(message: Message) -> bool:
    """Whether an assistant turn is trained on."""
    return bool(message.get("weight", 1))


def _prompt_row(row: Row) -> Row:
    checked: Row = {"prompt": _prompt(_required(row, "prompt"))}
    answer = row.get("answer")
    if answer is not None:
        checked["answer"] = _string(answer, '"answer"')
    return checked


def _preference_row(row: Row) -> Row:
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    prompt = (
        _prompt(row["prompt"]) if row.get("prompt") is not None else _common_start(_plain(chosen), _plain(rejected))
    )
    if not prompt:
        raise ValueError('"prompt" is missing, and "chosen" and "rejected" share no first messages')
    chosen, rejected = (
        answer[len(prompt) :] if _plain(answer[: len(prompt)]) == prompt else answer for answer in (chosen, rejected)
    )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not all(map(is_trained, answer)):
            raise ValueError(f'"{name}" has a turn of weight 0: preferences compare whole answers')
        if not answer or answer[-1]["role"] != "assistant" or not answer[-1]["content"].strip():
            raise ValueError(f'"{name}" must end with a non-empty assistant turn')
    if chosen == rejected:
        raise ValueError('"chosen" and "rejected" are equal')
    checked: Row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    margin = row.get("margin")
    if margin is not None:
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= _LARGEST:
            raise ValueError(f'"margin" must be a finite number, found {_shown(margin)}')
        checked["margin"] = float(margin)
    return checked


def _answer(row: Row, key: str) -> list[Message]:
    value = _required(row, key)
    if isinstance(value, str):
        return [{"role": "assistant", "content": _string(value, f'"{key}"')}]
    return _messages(value, key)


def _prompt(value: object) -> list[Message]:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError('"prompt" is empty')
        return [{"role": "user", "content": _string(value, '"prompt"')}]
    messages = _messages(value, "prompt")
    if messages[-1]["role"] == "assistant":
        raise ValueError('"prompt" ends with an assistant turn: there is nothing to answer')
    return _plain(messages)


def _plain(messages: list[Message]) -> list[Message]:
    """The messages without weights."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _common_start(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared]


def _messages(value: object, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'"{key}" must be a non-empty list of messages, found {_named(value)}')
    return [_message(message, f"{key}[{place}]") for place, message in enumerate(value)]


def _message(message: object, name: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{name} must be an object, found {_named(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{name} has role {_shown(role)}; known: {', '.join(ROLES)}")
    checked = {"role": role, "content": _string(content, f'{name} "content"')}
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise ValueError(f"{name} has weight {_shown(weight)}; known: 1 (train on it) and 0 (do not)")
    if untrained := next((key for key in UNTRAINED if message.get(key) in (False, 0) and weight is None), None):
        raise ValueError(f'{name} has "{untrained}": {_shown(message[untrained])}; write "weight": 0 to leave it out')
    if call := next((key for key in CALLS if message.get(key)), None):
        raise ValueError(f'{name} has "{call}", which no chat format here renders: write the call into its "content"')
    return {**checked, "weight": 0} if weight == 0 and role == "assistant" else checked


def _string(value: object, name: str) -> str:
    """The value, checked to be a string that every tokenizer can encode."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, found {_named(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} holds half a surrogate pair at character {error.start}") from None
    return value


def _required(row: Row, key: str) -> Any:
    if row.get(key) is None:
        names = shorten(", ".join(sorted(map(str, row))), _SHOWN, placeholder=" ...")
        found = "it is null" if key in row else f"found: {names or 'nothing'}"
        raise ValueError(f'"{key}" is missing ({found})')
    return row[key]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _named(value: object) -> str:
    names = {"NoneType": "null", "dict": "an object", "list": "a list", "str": "a string", "bool": "a boolean"}
    name = type(value).__name__
    if value == []:
        return "an empty list"
    return names.get(name, "a number" if isinstance(value, int | float) else name)
