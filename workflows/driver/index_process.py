"""A process beside the driver that writes the entries of the reuse index into a folder store.

It runs as a script with the standard library only. Each line that it reads is `PATH<tab>TEXT`: it writes TEXT to the
file at PATH, whole or not at all. A file costs four system calls, and in the driver each of them would pass the
interpreter's lock between busy threads: a fifth of the driver's time with short steps. When the pipe closes (also
because the driver died), the process writes what was sent, and ends.
"""

import os
import signal
import subprocess
import sys

CHUNK = 1 << 16


class IndexProcess:
    """The driver's handle: `put` sends files, `close` waits until they are written. Both raise OSError if the process
    could not write (it prints the reason). A killed process (perhaps by the out-of-memory killer) is replaced; the loss
    of its unwritten entries only costs their reuse."""

    def __init__(self) -> None:
        self._process = self._start()

    def put(self, files: list[tuple[str, str]]) -> None:
        """Send (path, text) pairs; neither may contain a newline."""
        data = "".join(f"{path}\t{text}\n" for path, text in files).encode()
        try:
            self._send(data)
        except BrokenPipeError:
            self._check(self._process.wait())
            self._process = self._start()
            self._send(data)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._check(self._process.wait())

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        left = memoryview(data)
        while left:
            left = left[self._process.stdin.write(left) :]

    def _check(self, code: int) -> None:
        if code > 0:
            raise OSError(f"the reuse index could not be written (exit code {code})")


def write(path: str, text: bytes) -> None:
    temporary = f"{os.path.dirname(path)}/.tmp-{os.getpid()}-{os.path.basename(path)}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.write(descriptor, text)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)


def main() -> None:
    rest = b""
    while data := os.read(0, CHUNK):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            path, _, text = line.partition(b"\t")
            write(path.decode(), text)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    main()
