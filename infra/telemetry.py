"""Log lines without secrets, and metrics as JSON lines.

`metrics.jsonl` is one object per line, e.g. {"stage": "sft", "step": 12, "loss": 1.9, "loss/reasoning/dates": 2.1}.
"""

import io
import json
import logging
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from infra.errors import UserError

HIDDEN = "[redacted]"
SECRET_LETTERS = 4096
"""The longest secret, in characters."""

_SECRET_NAME = re.compile(r"(?:SECRET|TOKEN|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)", re.IGNORECASE)
_NO_SECRET = "".join(rf"(?<!(?<![\w-]){name}_)" for name in ("bos", "eos", "eot", "pad", "unk", "stop"))
"""Prefixes of a tokenizer's settings, such as `eos_token`, which are not secrets."""

# Each pattern comes with words in lower case; every text that it matches contains one of them. Every pattern takes time
# linear in the text: none begins with an open-ended run, and none runs past a place where another match may begin.
_SECRETS = [
    (
        ("authorization", "x-api-key"),
        re.compile(
            r"(?P<keep>\b(?:Authorization|Proxy-Authorization|X-Api-Key)[\"']?\s*+[:=]\s*+[\"']?)[^\"'\r\n,}]++",
            re.IGNORECASE,
        ),
    ),
    (("bearer", "basic"), re.compile(r"(?P<keep>\b(?:Bearer|Basic)\s++)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)),
    (
        ("secret", "token", "passw", "apikey", "api_key", "accesskey", "access_key"),
        re.compile(
            rf"(?P<keep>(?=[stpa]){_NO_SECRET}(?:secret|token|password|passwd|api_?key|access_?key(?:_?id)?)"
            r"[\"']?\s*+(?:=|:\s)\s*+[\"']?)(?!\d++\b|None\b|null\b|true\b|false\b|\[)[^\s\"',}&]{4,}",
            re.IGNORECASE,
        ),
    ),
    (("://",), re.compile(r"(?P<keep>://[^/\s:@]*+:)[^/\s@]++(?=@)")),
    (("akia", "asia"), re.compile(r"(?P<keep>)\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")),
    (
        ("hf_", "sk-", "ghp_", "gho_", "github_pat_", "xox"),
        re.compile(r"(?P<keep>)\b(?:hf_|sk-|ghp_|gho_|github_pat_|xox[abp]-)[A-Za-z0-9_-]{12,}"),
    ),
    (
        ("x-amz-",),
        re.compile(r"(?P<keep>[?&]X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s\"']+", re.IGNORECASE),
    ),
]


def redact(text: str) -> str:
    """`text` without AWS keys, tokens, passwords in URLs and authorization headers, and without the values of
    environment variables whose names say that they are secret (a bare AWS secret key follows no pattern). Takes time
    linear in the length: a fifth of a second for a million characters."""
    for name, value in os.environ.items():
        if len(value) >= 12 and _SECRET_NAME.search(name) and value in text:
            text = text.replace(value, HIDDEN)
    small = text.lower()
    for words, pattern in _SECRETS:
        if any(word in small for word in words):
            text = pattern.sub(lambda match: match["keep"] + HIDDEN, text)
    return text


def shorten(text: str, most: int) -> str:
    """About `most` characters of `text`: half from its beginning, half from its end, and a note of how many are left
    out between.

    The second half begins at a word's start, because `redact` would not recognise the rest of a secret.
    """
    if len(text) <= most:
        return text
    head, tail = text[: most // 2], text[-(most // 2) :]
    if (gap := re.search(r"[^\w+/=.~-]", tail[:SECRET_LETTERS])) is not None:
        tail = tail[gap.start() :]
    return f"{head} [{len(text) - len(head) - len(tail):,} letters left out] {tail}"


def take_any_text(stream: TextIO | None) -> None:
    """Let a stream write escapes instead of raising, for characters that its encoding lacks (an ASCII terminal) or that
    no encoding has (half a surrogate pair, from a file name that is not text)."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def hide_secrets_in_logs() -> None:
    """Remove secrets from the text, traceback and stack of every log record of this process, for all loggers and
    handlers. Levels, handlers and formats stay as they are. Every process of recua calls this first."""
    make = logging.getLogRecordFactory()
    if not isinstance(make, _RedactedRecords):
        logging.setLogRecordFactory(_RedactedRecords(make))


@dataclass(frozen=True)
class _RedactedRecords:
    """A log record factory that removes secrets from the records that `make` creates."""

    make: Callable[..., logging.LogRecord]

    def __call__(self, *given: Any, **named: Any) -> logging.LogRecord:
        record = self.make(*given, **named)
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        try:
            _hide_in_message(record)
        except Exception:  # the arguments do not fit the text, or cannot be shown: logging must not fail its caller
            record.msg, record.args = redact(_message_as_given(record)), ()
        return record


def _message_as_given(record: logging.LogRecord) -> str:
    try:
        return f"{record.msg} {record.args}"
    except Exception:
        text = record.msg if isinstance(record.msg, str) else f"a {type(record.msg).__name__}"
        return f"{text} (what it says cannot be shown)"


def _hide_in_message(record: logging.LogRecord) -> None:
    """Redact the arguments one by one if that is enough, because the access log's formatter counts them."""
    if (whole := record.getMessage()) == redact(whole):
        return
    if isinstance(record.args, tuple):
        record.args = tuple(redact(value) if isinstance(value, str) else value for value in record.args)
    if (whole := record.getMessage()) != (hidden := redact(whole)):
        record.msg, record.args = hidden, ()


def as_number(name: str, value: Any) -> float:
    """A number of any library as a Python float. NaN and infinities are allowed.

    Raises:
        UserError: `value` is not one number.
    """
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises RuntimeError of several numbers
        raise UserError(f"{name}={value!r:.60}: must be one number") from None


class MetricsWriter:
    """Appends rows to a `metrics.jsonl` and flushes each one: a killed process loses at most the current row.

    NaN and infinities become null, because JSON has neither.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, stage: str, step: int, **values: float) -> None:
        """Append one row. Pass names with a slash as a dictionary: `write("sft", 1, **{"loss/reasoning/dates":
        2.0})`."""
        row: dict[str, Any] = {"stage": stage, "step": step}
        for name, value in values.items():
            number = as_number(name, value)
            row[name] = number if math.isfinite(number) else None
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def metric_rows(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The rows of a `metrics.jsonl`, also of one that recua did not write, and the number of lines that are not rows.

    A row is an object whose `step` is a number. Its other values are kept if they are numbers or None (NaN); of texts
    only `stage` is kept. A last line without a newline is skipped: its writer was killed.
    """
    rows, others = [], 0
    for line in data.decode(errors="replace").split("\n")[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and is_number(row.get("step")):
            stage = {"stage": row.pop("stage")} if isinstance(row.get("stage"), str) else {}
            row.pop("stage", None)
            rows.append({**stage, **{name: value for name, value in row.items() if value is None or is_number(value)}})
        else:
            others += 1
    return rows, others


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number and not a boolean."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer with hundreds of digits
        return False
