"""A small process beside each step worker that ends what the worker leaves behind.

It runs as a script with the standard library only. It reads lines from its worker: `begin SECONDS` and `end`, around
bodies with a timeout. When a body's time is up it kills the worker and everything the worker started. When the pipe
closes because the worker has ended (killed, crashed or finished) it kills what is left. It finds the worker's processes
by a marker in their environment, which children inherit even when they move to another session. The reaper itself is
not a child of its worker, because a Ray worker that is told to end kills its children first.

A driver that started a local Ray has a guardian, which is another reaper. When the driver is killed, Ray's servers end
with it, but a Ray worker that was just starting waits up to a minute for them, and a process that an actor started in
another session stays for ever: the guardian ends both at once. Ray's object store has no name in shared memory and ends
with its process. Ray's folder of logs stays, as it does after every Ray.

The worker and its reaper share memory that names what an attempt leaves behind, which saves a message per attempt: its
scratch folder, which the reaper removes, and its output, which the reaper keeps as a log if the worker no longer can.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

MARKER, LOCAL_RAY = "RECUA_STEP_WORKER", "RECUA_LOCAL_RAY"
NO_MEMORY = -1
STILL_S, LOCAL_RAY_STILL_S, LONGEST_S = 0.08, 2.0, 5.0
"""How long a reaper, and a guardian, must find nothing before it stops looking (a guardian needs longer: a single look
at the moment of the kill missed Ray's two agents, which then stayed for a minute); the longest that either looks."""


class Reaper:
    """The worker's handle on its reaper process."""

    def __init__(self) -> None:
        self._marker = os.environ[MARKER] = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._memory = os.memfd_create("recua-attempt")
        self._limited = False
        self._process = self._start()

    def begin(self, timeout_s: float | None, scratch: str, printed: str, log: str) -> None:
        """An attempt begins. `scratch`: a folder to remove; `printed`: the file that takes its output; `log`: where
        that file is linked unless it is empty, "" for nowhere."""
        self._remember(scratch, printed, log)
        if timeout_s:
            self._limited = True
            self._tell(f"begin {timeout_s}\n")
        elif self._gone():
            self._process = self._start()

    def end(self, printed: str) -> None:
        """The attempt has ended; `printed`: the file that takes the next one's output."""
        self._remember("", printed, "")
        if self._limited:
            self._limited = False
            self._tell("end\n")

    def _remember(self, *paths: str) -> None:
        text = "\n".join(paths).encode()
        os.pwrite(self._memory, len(text).to_bytes(4, "big") + text, 0)

    def _start(self) -> "subprocess.Popen[bytes]":
        return _reap(f"{MARKER}={self._marker}", self._memory)

    def _gone(self) -> bool:
        """Whether the reaper was killed, perhaps by the out-of-memory killer: the pipe has no reader any more."""
        assert self._process.stdin is not None
        pipe = select.poll()
        pipe.register(self._process.stdin, 0)
        return bool(pipe.poll(0))

    def _tell(self, line: str) -> None:
        with self._lock:
            try:
                self._write(line)
            except OSError:
                self._process = self._start()
                self._write(line)

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode())


class Guardian:
    """A driver's handle on the process that ends its local Ray's processes when the driver dies, or at `close`."""

    def __init__(self) -> None:
        self._marker = uuid.uuid4().hex
        self._process = _reap(f"{LOCAL_RAY}={self._marker}", NO_MEMORY)

    def kill(self, spare: int) -> None:
        """End all processes of the local Ray now, except `spare`."""
        kill_all(f"{LOCAL_RAY}={self._marker}", None, spare=spare)

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Processes that start inside the block, and their descendants, belong to the local Ray."""
        before = os.environ.get(LOCAL_RAY)
        os.environ[LOCAL_RAY] = self._marker
        try:
            yield
        finally:
            if before is None:
                del os.environ[LOCAL_RAY]
            else:  # this driver is a step of another one with a local Ray
                os.environ[LOCAL_RAY] = before

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()


def _reap(marker: str, memory: int) -> "subprocess.Popen[bytes]":
    """Start a reaper of this process. It carries no marker itself, so that no reaper ends another."""
    from infra.processes import adopt_orphans

    environment = {key: value for key, value in os.environ.items() if key not in (MARKER, LOCAL_RAY)}
    adopted = adopt_orphans(False)
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__), marker, str(os.getpid()), str(memory)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[] if memory == NO_MEMORY else [memory],
            env=environment,
            start_new_session=True,
        )
        process.wait()  # the reaper itself keeps running, detached from this process
    finally:
        adopt_orphans(adopted)
    return process


def marked(marker: str) -> list[int]:
    """Ids of the processes whose environment holds `marker`, written as NAME=VALUE."""
    wanted = marker.encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/environ", "rb") as stream:
                    if wanted in stream.read().split(b"\0"):
                        found.append(int(name))
            except OSError:
                continue
    return found


def kill_all(marker: str, worker: int | None, still_s: float = STILL_S, spare: int = 0) -> None:
    """SIGKILL `worker` and all processes with the marker except `spare`, until none was found for `still_s`: a process
    may fork between two looks, and one that is calling exec shows no environment."""
    began = found = time.monotonic()
    while (now := time.monotonic()) - found < still_s and now - began < LONGEST_S:
        targets = [pid for pid in marked(marker) if pid not in (os.getpid(), spare)]
        if worker is not None:
            targets.append(worker)
            worker = None
        if targets:
            found = now
        for pid in targets:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def clean_up(memory: int) -> None:
    """Keep the last attempt's output and remove its scratch folder. Paths: see `Reaper.begin`."""
    length = int.from_bytes(os.pread(memory, 4, 0), "big")
    scratch, printed, log = (os.pread(memory, length, 4).decode() or "\n\n").split("\n")
    try:
        if log and os.stat(printed).st_size:
            os.makedirs(os.path.dirname(log), exist_ok=True)
            os.link(printed, log)
    except OSError:
        pass  # the log exists already, or its disk is gone
    for path in (printed, scratch):
        try:
            os.unlink(path)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)


def main(marker: str, worker: int, memory: int) -> None:
    deadline: float | None = None
    buffer = b""
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([0], [], [], wait)
        if not ready:
            kill_all(marker, worker)
            break
        data = os.read(0, 65536)
        if not data:
            kill_all(marker, None, LOCAL_RAY_STILL_S if memory == NO_MEMORY else STILL_S)
            break
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            word, _, seconds = line.decode().partition(" ")
            deadline = time.monotonic() + float(seconds) if word == "begin" else None
    if memory != NO_MEMORY:
        clean_up(memory)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if os.fork():
        os._exit(0)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
