"""What recua says about itself: log lines with secrets removed, and metrics as JSON lines.

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
"""No secret is longer than that."""

_SECRET_NAME = re.compile(r"(?:SECRET|TOKEN|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)", re.IGNORECASE)
_NO_SECRET = "".join(rf"(?<!(?<![\w-]){name}_)" for name in ("bos", "eos", "eot", "pad", "unk", "stop"))
"""Before a word like `token`: those of a tokenizer are none."""

# Each with words of which a text that it matches has one, in small letters. Every one takes time linear in the text:
# none begins with an open-ended run, and none runs on over a place where another match may begin.
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
    """`text` without AWS keys, tokens, passwords in URLs, authorization headers, and without the values of environment
    variables whose names say that they are secret (a bare AWS secret key looks like nothing in particular). The time
    that it takes grows with the length and no faster: a fifth of a second for a million letters."""
    for name, value in os.environ.items():
        if len(value) >= 12 and _SECRET_NAME.search(name) and value in text:
            text = text.replace(value, HIDDEN)
    small = text.lower()
    for words, pattern in _SECRETS:
        if any(word in small for word in words):
            text = pattern.sub(lambda match: match["keep"] + HIDDEN, text)
    return text


def shorten(text: str, most: int) -> str:
    """About `most` letters of `text`, half of them its beginning and half its end, with a word on what is missing.

    The end begins where a word does: the rest of a secret would not be known as one.
    """
    if len(text) <= most:
        return text
    head, tail = text[: most // 2], text[-(most // 2) :]
    if (gap := re.search(r"[^\w+/=.~-]", tail[:SECRET_LETTERS])) is not None:
        tail = tail[gap.start() :]
    return f"{head} [{len(text) - len(head) - len(tail):,} letters left out] {tail}"


def take_any_text(stream: TextIO | None) -> None:
    """Let a stream write what its encoding lacks (a terminal that knows ASCII only) or nobody can encode (half a
    surrogate, of a file name that is no text) as escapes, where it would raise."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def hide_secrets_in_logs() -> None:
    """Remove secrets from every log record of this process, whoever writes it and whatever handles it: from its text,
    its traceback and its stack. Levels, handlers and formats stay as they are. Every process of ours calls it first."""
    make = logging.getLogRecordFactory()
    if not isinstance(make, _RedactedRecords):
        logging.setLogRecordFactory(_RedactedRecords(make))


@dataclass(frozen=True)
class _RedactedRecords:
    """Makes log records as `make` does, without secrets."""

    make: Callable[..., logging.LogRecord]

    def __call__(self, *given: Any, **named: Any) -> logging.LogRecord:
        record = self.make(*given, **named)
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        try:
            _hide_in_message(record)
        except Exception:  # arguments that do not fit their text, or cannot be shown: no reason to fail who logs
            record.msg, record.args = redact(_message_as_given(record)), ()
        return record


def _message_as_given(record: logging.LogRecord) -> str:
    try:
        return f"{record.msg} {record.args}"
    except Exception:
        text = record.msg if isinstance(record.msg, str) else f"a {type(record.msg).__name__}"
        return f"{text} (what it says cannot be shown)"


def _hide_in_message(record: logging.LogRecord) -> None:
    """Arguments stay apart where they can: the access log's formatter counts them."""
    if (whole := record.getMessage()) == redact(whole):
        return
    if isinstance(record.args, tuple):
        record.args = tuple(redact(value) if isinstance(value, str) else value for value in record.args)
    if (whole := record.getMessage()) != (hidden := redact(whole)):
        record.msg, record.args = hidden, ()


def as_number(name: str, value: Any) -> float:
    """A number of whatever library as Python's own float; NaN and infinities are numbers here.

    Raises:
        UserError: it is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises RuntimeError of several numbers
        raise UserError(f"{name}={value!r:.60}: must be one number") from None


class MetricsWriter:
    """Appends rows to a `metrics.jsonl`; each row is flushed, so that a killed process loses at most the current one.

    NaN and infinities, which JSON does not have, become null.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, stage: str, step: int, **values: float) -> None:
        """One row. Write a slash in a name as a dictionary: `write("sft", 1, **{"loss/reasoning/arithmetic": 2.0})`."""
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
    """The rows of a `metrics.jsonl` of whatever origin, and how many of its lines are none.

    A row is an object whose `step` is a number. What else it has is kept where it is a number, or None for NaN, and of
    texts `stage` only. A last line without its newline (its writer was killed) is not looked at.
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
    """Whether it is a number that JSON has, and no boolean."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number with hundreds of digits
        return False
