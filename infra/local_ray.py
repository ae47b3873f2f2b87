"""The Ray that a process starts on its own machine. It is watched; if it dies, another one is started.

A Ray of one machine is lost when its raylet or its GCS dies, and Ray ends a raylet whose dashboard agent or runtime-env
agent died. The driver owns this Ray, so the loss costs no more than another start. Without the restart, a Ray that lost
its raylet has no node, and one that lost its GCS never answers and ends the driver's process after a minute (Ray 2.60).

A stopped server (SIGSTOP) is alive but does nothing. Ray reports the lost node of a stopped raylet only to callers that
ask for something, which the driver of a long step does not do, and a call to a stopped GCS does not return. A server
that stays stopped counts as dead.

The module `ray` is an argument, because nothing in `infra` imports it.

Who waits for whom: one thread starts Ray, waits for the end of one of its servers, ends the rest and starts another
Ray; a local Ray's processes die with the thread that started them. The thread waits only for Ray. From the end of a
server until `on_back` no thread may call Ray (`is_lost()`): a call to a dead GCS does not return.
"""

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from infra.errors import ConfigError, SystemFault
from infra.processes import process_state
from infra.ray_internals import few_servers, own_worker
from infra.reaper import Guardian

LOOK_S, STOPPED_S = 1.0, 15.0
"""How often the thread checks for stopped servers, and how long a server may be stopped. Only time in which this
process runs counts, because Ctrl-Z stops both."""
SERVERS = {"raylet": "raylet", "gcs_server": "GCS"}
"""The servers that a Ray cannot run without: Ray's name for each, and ours."""


class Servers(Protocol):
    """One Ray after another."""

    def start(self) -> dict[str, int]:
        """Start one, and return the process ids of the servers that it cannot run without, by their names."""

    def kill(self) -> None:
        """End what is left of a Ray that lost a server, so that its processes do not run beside the next one's."""

    def stop(self) -> None:
        """Disconnect, and end every remaining process."""

    def logs(self) -> str:
        """The folder with the logs of the last Ray."""


class LocalRay:
    """Starts a Ray for its `owner` ("run"), and returns when it runs.

    `on_lost(message)`: the Ray died, and another one is being started; `on_back()`: the new one runs.
    `on_error(error)`: Ray died more than `restarts` times; a Ray that ran for longer than `window_s` resets that count.
    All are called from the watching thread.

    Raises:
        ConfigError, SystemFault: the first one did not start.
    """

    def __init__(
        self,
        servers: Servers,
        restarts: int,
        window_s: float,
        owner: str,
        way_on: str,
        on_lost: Callable[[str], None],
        on_back: Callable[[], None],
        on_error: Callable[[BaseException], None],
        stopped_s: float = STOPPED_S,
    ) -> None:
        self._stopped_s = stopped_s
        self._servers = servers
        self._most = restarts
        self._window_s = window_s
        self._name = f"the local Ray of this {owner}"
        self._way_on = way_on
        self._on_lost = on_lost
        self._on_back = on_back
        self._on_error = on_error
        self._restarts = 0
        self._since = 0.0
        self._count = 0
        self._ends: dict[int, str] = {}
        self._pids: dict[str, int] = {}
        self._lock = threading.Lock()
        self._lost = False
        self._condemned = ""
        self._leaving = self._closing = False
        self._wake = os.eventfd(0)
        self._connected = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="recua-ray", daemon=True)
        self._thread.start()
        self._connected.wait()
        if self._error is not None:
            raise self._error

    def is_lost(self) -> bool:
        """Whether there is no Ray to call: from the end of a server until the next Ray runs."""
        with self._lock:
            return self._lost or bool(self._condemned) or bool(_ended(self._ends, 0))

    @property
    def count(self) -> int:
        """How many Rays were started so far; identifies the present one."""
        with self._lock:
            return self._count

    def condemn(self, reason: str, count: int) -> None:
        """Replace a Ray that is unusable although its servers run. Does nothing if the Ray with this count is gone."""
        with self._lock:
            if self._lost or self._count != count:
                return
            self._condemned = reason
        os.eventfd_write(self._wake, 1)

    def leave(self) -> None:
        """The run is ending: start no other Ray."""
        self._leaving = True

    def close(self) -> None:
        """Stop Ray. Raises the error that ended the watching thread."""
        self._leaving = self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        with self._lock:
            self._lost = True
            for number in (*self._ends, self._wake):
                os.close(number)
            self._ends = {}
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._watch(self._first())
        except BaseException as error:
            self._error = error
            self._servers.stop()
            return
        finally:
            self._connected.set()
        try:
            while reason := self._wait():
                self._replace(reason)
            self._servers.stop()
        except BaseException as error:
            self._error = error
            self._on_error(error)

    def _first(self) -> dict[str, int]:
        """Start Ray, twice if need be: Ray gives its servers 30 s to start, which a busy machine may exceed."""
        try:
            return self._servers.start()
        except SystemFault:
            self._servers.stop()
            return self._servers.start()

    def _watch(self, servers: dict[str, int]) -> None:
        self._since = time.monotonic()
        with self._lock:
            self._ends = {os.pidfd_open(pid): name for name, pid in servers.items()}
            self._pids = servers
            self._count += 1
            self._lost = False

    def _wait(self) -> str:
        """Wait until Ray dies and return why; "" if it is to be stopped."""
        look_s = min(LOOK_S, self._stopped_s)
        stopped_s = dict.fromkeys(self._pids, 0.0)
        while True:
            ended = _ended([*self._ends, self._wake], int(1000 * look_s))
            if self._wake in ended:
                os.eventfd_read(self._wake)
            if self._closing:
                return ""
            for number in self._ends.keys() & ended:
                return f"its {self._ends[number]} {_how_it_ended(number)}"
            if self._condemned:
                return self._condemned
            for name, pid in self._pids.items():
                stopped_s[name] = stopped_s[name] + look_s if process_state(pid) == "T" else 0.0
                if stopped_s[name] > self._stopped_s:
                    return f"its {name} has been stopped for {self._stopped_s:g} s"

    def _replace(self, reason: str) -> None:
        """Start another Ray, unless the run is ending (Ctrl-C may reach Ray's processes too) or too many have died."""
        with self._lock:
            self._lost, self._condemned = True, ""
            ends, self._ends = self._ends, {}
        for number in ends:
            os.close(number)
        self._servers.kill()
        if time.monotonic() - self._since > self._window_s:
            self._restarts = 0
        while True:
            too_often = self._restarts >= self._most
            if not self._leaving and not too_often:
                count = f"start {self._restarts + 1} of local_ray_restarts={self._most}"
                self._on_lost(f"{self._name} is gone ({reason}); starting another one ({count})")
            self._servers.stop()
            if self._leaving:
                return
            if too_often:
                self._on_error(self._too_often(reason))
                return
            self._restarts += 1
            try:
                self._watch(self._servers.start())
            except Exception as error:
                reason = str(error)
            else:
                self._on_back()
                return

    def _too_often(self, reason: str) -> SystemFault:
        return SystemFault(
            f"{self._name} is gone ({reason}), and local_ray_restarts={self._most} allows no further restart "
            f"within retry_window_s={self._window_s:g}; Ray's logs: {self._servers.logs()}. "
            f"{self._way_on}, with --local-ray-restarts for more"
        )


class RayServers:
    """Servers of `ray.init(address="local", **options)`."""

    def __init__(self, ray: Any, options: dict[str, Any]) -> None:
        self._ray = ray
        self._options = {"include_dashboard": False, **options}
        self._guardian: Guardian | None = None
        self._gcs = 0
        self._logs = ""

    def start(self) -> dict[str, int]:
        self._guardian = Guardian()
        wanted = {"dashboard": "include_dashboard", "log_monitor": "log_to_driver"}
        keep = tuple(server for server, option in wanted.items() if self._options.get(option))
        with self._guardian.guarding(), few_servers(self._ray, keep):
            connect(self._ray, "a local Ray", address="local", **self._options)
        node = own_worker(self._ray).node
        self._logs = node.get_logs_dir_path()
        pids = {ours: node.all_processes[name][0].process.pid for name, ours in SERVERS.items()}
        self._gcs = pids["GCS"]
        return pids

    def kill(self) -> None:
        """End the GCS last, if it is alive, and wake it if it is stopped: a driver that disconnects without it waits up
        to 15 s. Ray's own messages are silenced: they repeat in two pages what the run says in one line."""
        assert self._guardian is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._gcs, signal.SIGCONT)
        connected = own_worker(self._ray)
        connected.threads_stopped.set()
        connected.gcs_error_subscriber.close()
        self._guardian.kill(spare=self._gcs)

    def stop(self) -> None:
        try:
            self._ray.shutdown()
        finally:
            if self._guardian is not None:
                self._guardian.close()

    def logs(self) -> str:
        return self._logs


def connect(ray: Any, where: str, **options: Any) -> None:
    """Call `ray.init`.

    Raises:
        ConfigError: there is no Ray, or it refuses the options.
        SystemFault: Ray did not start in time.
    """
    try:
        ray.init(**{"logging_level": logging.ERROR, "log_to_driver": False, **options})
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        raise ConfigError(f"cannot start or join {where}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # Ray's own start raises a bare Exception when it times out
        raise SystemFault(
            f"Ray did not start ({str(error)[:200]}); the machine may be overloaded: run the command again"
        ) from error


def _ended(numbers: Iterable[int], patience_ms: int | None) -> set[int]:
    """Those of the descriptors that can be read, waiting up to `patience_ms` for one. A pidfd can be read once its
    process has ended."""
    poll = select.poll()
    for number in numbers:
        poll.register(number, select.POLLIN)
    return {number for number, _ in poll.poll(patience_ms)}


def _how_it_ended(pidfd: int) -> str:
    try:
        found = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # Ray has collected its exit code before us
        found = None
    if found is None:
        return "ended"
    if found.si_code == os.CLD_EXITED and found.si_status == 0:
        return "ended by itself, as a raylet does when one of its agents dies"
    if found.si_code == os.CLD_EXITED:
        return f"ended with exit code {found.si_status}"
    return f"was killed by {signal.Signals(found.si_status).name}"
