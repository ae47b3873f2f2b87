"""Output of step bodies and their children, captured per attempt at almost no cost if nothing is printed.

While a body runs, file descriptors 1 and 2 of its process lead to an anonymous file, and sys.stdout and sys.stderr are
streams of the body's own, which it may close or replace. If the body prints, that file becomes the attempt's log (a
link, or an upload if the store is not a folder) and the next attempt gets another file; an attempt that prints nothing
leaves no log. The log of a longer body is available while it runs. If the process dies, its reaper makes the link.
"""

import contextlib
import io
import os
import sys
import tempfile
import uuid
from pathlib import Path
from typing import TextIO

from infra.errors import StoreError
from infra.processes import flush_c_streams
from infra.storage import Store
from infra.storage.files import TEMPORARY_PREFIX


class CapturedOutput:
    """Captures the output of one worker process, for one attempt at a time."""

    def __init__(self) -> None:
        self.printed = ""
        """The file that takes the present output."""
        self._file = -1
        self._saved: list[int] = []
        self._streams: tuple[TextIO, TextIO] = (sys.stdout, sys.stderr)
        self._store: Store | None = None
        self._key = ""
        self._shown = False

    def prepare(self, store: Store, key: str) -> str:
        """Prepare a file for an attempt whose log is `key`; returns the log's path on this machine, "" on S3."""
        log = store.local_path(key)
        folder = str(log.parent.parent) if log is not None else tempfile.gettempdir()
        if self._file >= 0 and (os.path.dirname(self.printed) != folder or os.fstat(self._file).st_size):
            self._publish()  # output of another run, or of what the previous attempt left behind
        self._store, self._key, self._shown = store, key, False
        if self._file < 0:
            os.makedirs(folder, exist_ok=True)
            self.printed = f"{folder}/{TEMPORARY_PREFIX}log-{uuid.uuid4().hex}"
            self._file = os.open(self.printed, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        return "" if log is None else str(log)

    def begin(self) -> None:
        _flush()
        self._saved = [os.dup(1), os.dup(2)]
        os.dup2(self._file, 1)
        os.dup2(self._file, 2)
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _stream(1), _stream(2)

    def say(self, text: str) -> None:
        """Write a line of our own, independent of the body's streams."""
        _flush()
        with contextlib.suppress(OSError):
            os.write(self._file, f"{text}\n".encode(errors="backslashreplace"))

    def show(self) -> None:
        """Publish the log while the body still runs."""
        assert self._store is not None
        log = self._store.local_path(self._key)
        if log is not None and not self._shown:
            self._link(log)

    def end(self) -> str:
        """A message if the log could not be stored, else ""."""
        _flush()
        sys.stdout, sys.stderr = self._streams
        for number, descriptor in zip((1, 2), self._saved, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        if not self._shown and not os.fstat(self._file).st_size:
            return ""
        try:
            self._publish()
        except (StoreError, OSError) as error:
            return f"its log could not be kept: {error}"
        return ""

    def _publish(self) -> None:
        """Make the output the log of the last attempt; the next attempt needs a new file."""
        store, size = self._store, os.fstat(self._file).st_size
        assert store is not None
        try:
            log = store.local_path(self._key)
            if log is None and size:
                store.upload_file(self._key, Path(self.printed))
            elif log is not None and size and not self._shown:
                self._link(log)
        finally:
            os.close(self._file)
            self._file = -1
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.printed)

    def _link(self, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.link(self.printed, log)
        self._shown = True


def _stream(descriptor: int) -> TextIO:
    """An unbuffered text stream: output of several processes stays in order. Any text can be printed."""
    raw = io.FileIO(descriptor, "w", closefd=False)
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)  # type: ignore[type-var]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a body may have closed it, or put anything in its place
            stream.flush()
    flush_c_streams()
