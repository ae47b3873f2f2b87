"""Secrets never reach a log; metrics survive a killed writer."""

import asyncio
import base64
import contextlib
import inspect
import io
import logging
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.errors import UserError
from infra.telemetry import MetricsWriter, as_number, hide_secrets_in_logs, metric_rows, redact, shorten

SECRETS = [
    ("Authorization: Bearer abcdef0123456789", "abcdef0123456789"),
    ('headers={"authorization": "Basic dXNlcjpwYXNzd29yZA=="}', "dXNlcjpwYXNzd29yZA"),
    ("curl -H 'X-Api-Key: 9f8e7d6c5b4a' http://host", "9f8e7d6c5b4a"),
    ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "wJalrXUtnFEMI"),
    ("aws_access_key_id = AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
    ("found ASIAIOSFODNN7EXAMPLE in a message", "ASIAIOSFODNN7EXAMPLE"),
    ('{"session_token": "FwoGZXIvYXdzEXAMPLE"}', "FwoGZXIvYXdzEXAMPLE"),
    ("HF_TOKEN=hf_abcdefghijklmnopqrst", "hf_abcdefghijklmnopqrst"),
    ("openai key sk-abcdefghijklmnop1234", "sk-abcdefghijklmnop1234"),
    ("postgres://user:hunter22@db/x", "hunter22"),
    ("https://b.s3.amazonaws.com/k?X-Amz-Signature=deadbeef01&x=1", "deadbeef01"),
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_secrets_are_removed(text: str, secret: str) -> None:
    assert secret in text
    assert secret not in redact(text)
    assert "[redacted]" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=64 tokens: 1234 token_ids=(5, 6)",
        "eos_token: <|eot_id|>, pad_token=<|pad|>",
        "1,024 tokens/s at s3://bucket/prefix and http://127.0.0.1:8000/v1",
        "step sft committed; digest 5f1d7a84db00d2fce00b31a7fc73224f",
        "key: value, keys and tokenizer=llama3",
    ],
)
def test_ordinary_text_is_untouched(text: str) -> None:
    assert redact(text) == text


def test_a_bare_secret_from_the_environment_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "plainlookingvalue0123")
    monkeypatch.setenv("PLAIN_SETTING", "ordinaryvalue0123")
    assert redact("a plainlookingvalue0123 b ordinaryvalue0123") == "a [redacted] b ordinaryvalue0123"


PIECES = ["x", "a:", "/", "a://", "a://b:", "token", "secret-", "token = ", "token:  ", "Bearer ", "AKIA", "é", "a\n"]


@pytest.mark.parametrize("piece", [*PIECES, "Authorization" + " " * 99, "?X-Amz-Signature=", "1.-+", "eos_", "base64"])
def test_redaction_of_a_million_letters_comes_to_its_end(piece: str) -> None:
    """No clock is asked: what is quadratic takes hours here, and the test's time limit ends it."""
    text = piece * (1_000_000 // len(piece))
    if piece == "base64":
        text = base64.b64encode(random.Random(0).randbytes(750_000)).decode()
    redact(f"{text} password=hunter2222 {text}")
    assert redact(f"{text} and postgres://user:hunter22@db/x").endswith("postgres://user:[redacted]@db/x")


def test_a_long_text_keeps_its_beginning_and_its_end_but_no_half_of_a_word() -> None:
    text = f"first {'x' * 1000} AWS_SECRET_ACCESS_KEY=abcdefghij klm last"
    assert shorten(text, 40) == "first xxxxxxxxxxxxxx [1,019 letters left out]  klm last"
    assert shorten(text, len(text)) == text
    assert len(shorten("x" * 20_000_000, 10_000)) < 10_100


@pytest.fixture
def plain_logs() -> Iterator[None]:
    """Log records as Python makes them, before and after."""
    logging.setLogRecordFactory(logging.LogRecord)
    yield
    logging.setLogRecordFactory(logging.LogRecord)


def test_log_records_carry_no_secrets_whatever_handles_them(plain_logs: None) -> None:
    hide_secrets_in_logs()
    hide_secrets_in_logs()
    stream, log = io.StringIO(), logging.getLogger("some.library")
    handler = logging.StreamHandler(stream)  # a user's own, with a format of its own
    log.addHandler(handler)
    try:
        log.error("connecting to postgres://user:hunter2222@db/x", stack_info=True)
        try:
            raise RuntimeError("request failed: Authorization: Bearer abcdef0123456789")
        except RuntimeError:
            log.exception("with password=%s", "hunter2222")
        log.error("%(what)s", {"what": "token=hunter2222"})
        log.error("%d of them", "token=hunter2222")
    finally:
        log.removeHandler(handler)
    text = stream.getvalue()
    assert "Traceback" in text and "with password=[redacted]" in text and "postgres://user:[redacted]@db/x" in text
    assert "abcdef0123456789" not in text and "hunter2222" not in text


def test_log_records_keep_their_arguments_apart(plain_logs: None) -> None:
    """A server's access log counts them."""
    hide_secrets_in_logs()
    given = ("GET", "/runs?token=hunter2222", 200)
    record = logging.getLogger("access").makeRecord("access", 20, "f", 1, "%s %s %d", given, None)
    assert record.args == ("GET", "/runs?token=[redacted]", 200)
    assert record.getMessage() == "GET /runs?token=[redacted] 200"


def test_who_logs_what_cannot_be_shown_is_not_failed(plain_logs: None) -> None:
    """Logging says so itself and goes on: what removes secrets may not do less."""

    class Silent:
        def __repr__(self) -> str:
            raise RuntimeError("nobody knows")

    hide_secrets_in_logs()
    make = logging.getLogger("some.library").makeRecord
    record = make("x", 30, "f", 1, "token=hunter2222 %s", (Silent(),), None)
    assert record.getMessage() == "token=[redacted] %s (what it says cannot be shown)"
    assert make("x", 30, "f", 1, Silent(), (), None).getMessage() == "a Silent (what it says cannot be shown)"


def _new(kind: type, *given: Any) -> None:
    """Begin to make an object of a class, as far as that goes without what it needs."""
    made = kind.__init__(object(), *given)  # type: ignore[misc]
    if inspect.iscoroutine(made):
        asyncio.run(made)


def _starts() -> dict[str, Callable[[], Any]]:
    from actors.pools.generators import GeneratorWorker
    from actors.pools.keeper import PoolKeeper
    from actors.pretrain.rank import PretrainRank
    from cluster.node.agent import NodeAgent
    from cluster.workers.seat import Worker
    from engines.vllm import process
    from serving.deployment import Replica
    from serving.gateway import Gateway
    from workflows.driver import session
    from workflows.launch.guarded import guarded
    from workflows.service.server.actor import Host
    from workflows.worker import attempt

    nothing: Any = None
    return {
        "command": lambda: guarded(lambda: None),
        "run": lambda: session.run(nothing, settings="none"),  # type: ignore[arg-type]
        "step": lambda: attempt.run_attempt("{}", {}),
        "service": lambda: _new(Host, nothing),
        "rank of a group": Worker,
        "rank of pretraining": lambda: _new(PretrainRank, "w0", "g", 0.0, nothing, nothing),
        "node agent": lambda: _new(NodeAgent, nothing),
        "pools": lambda: _new(PoolKeeper, "p", "c", 1.0, None),
        "generator": lambda: _new(GeneratorWorker, nothing, nothing),
        "engine": process.main,
        "replica": lambda: _new(Replica, nothing, nothing),
        "gateway": lambda: _new(Gateway, nothing, 0, ()),
    }


def test_every_process_of_ours_hides_secrets_first(plain_logs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    for name, begin in _starts().items():
        logging.setLogRecordFactory(logging.LogRecord)
        with contextlib.suppress(Exception):
            begin()
        record = logging.getLogger("x").makeRecord("x", 30, "f", 1, "password=hunter2222", (), None)
        assert record.getMessage() == "password=[redacted]", name


def test_a_command_warns_without_secrets() -> None:
    code = """
        import logging
        from workflows.launch.guarded import guarded
        guarded(lambda: logging.getLogger("workflows.x").warning("no answer from s3://key:hunter2222@host"))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.stderr == "no answer from s3://key:[redacted]@host\n"


def test_metrics_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "sft" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write("sft", 1, loss=2.5, **{"loss/reasoning/arithmetic": 2.75})
        writer.write("sft", 2, loss=float("nan"))
    rows = [
        {"stage": "sft", "step": 1, "loss": 2.5, "loss/reasoning/arithmetic": 2.75},
        {"stage": "sft", "step": 2, "loss": None},
    ]
    assert metric_rows(path.read_bytes()) == (rows, 0)


def test_the_rows_of_a_file_of_whatever_origin_are_read_and_the_rest_is_counted() -> None:
    lines = [
        b'{"stage": "sft", "step": 1, "loss": 2.5, "note": "warm", "ok": true, "kl": null}',
        b"",
        b"[1, 0.5]",
        '{"step": "caf\xe9"}'.encode("latin-1"),
        b'{"loss": 1}',
        b'{"step": Infinity, "loss": 1}',
        b'{"step": 1' + b"0" * 400 + b"}",
        b"[" * 100_000,
        b'{"stage": 7, "step": 2, "loss": NaN}',
        b'{"stage": "sft", "st',
    ]
    rows, others = metric_rows(b"\n".join(lines))
    assert rows == [{"stage": "sft", "step": 1, "loss": 2.5, "kl": None}, {"step": 2}] and others == 7


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(3), np.array(2.0), True, 7, float("nan"), "0.25"])
def test_numbers_of_other_libraries_are_metrics(value: Any) -> None:
    assert type(as_number("loss", value)) is float


@pytest.mark.parametrize("value", [None, "high", [1.0, 2.0], np.zeros(2), 1j, 10**400])
def test_what_is_no_number_is_refused_by_name(value: Any, tmp_path: Path) -> None:
    with (
        MetricsWriter(tmp_path / "m.jsonl") as writer,
        pytest.raises(UserError, match=r"^loss=.*: must be one number$"),
    ):
        writer.write("sft", 1, loss=value)
