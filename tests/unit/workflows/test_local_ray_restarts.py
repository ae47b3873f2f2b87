"""A local Ray that dies is started again, as often as its setting allows: with processes that stand for Ray's."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.errors import ConfigError, NodeLost, SystemFault
from infra.local_ray import LocalRay, RayServers
from workflows.driver import attempts, session
from workflows.driver.ray_tasks import Done
from workflows.driver.settings import RunSettings
from workflows.graph import StepOptions, step, workflow
from workflows.runs.events import Event

DEADLINE_S = 60.0
OWNER = ("run", "Committed steps stay: run it again to resume")


class Stand:
    """Two processes per start. `fail`: errors that the next starts raise."""

    def __init__(self) -> None:
        self.started: list[dict[str, subprocess.Popen[bytes]]] = []
        self.fail: list[Exception] = []
        self.calls: list[str] = []

    def start(self) -> dict[str, int]:
        self.calls.append("start")
        if self.fail:
            raise self.fail.pop(0)
        wait = [sys.executable, "-c", "import sys; sys.exit(int(sys.stdin.readline()))"]
        servers = {name: subprocess.Popen(wait, stdin=subprocess.PIPE) for name in ("raylet", "GCS")}
        self.started.append(servers)
        return {name: process.pid for name, process in servers.items()}

    def kill(self) -> None:
        self.calls.append("kill")
        self._end()

    def stop(self) -> None:
        self.calls.append("stop")
        self._end()

    def logs(self) -> str:
        return "/tmp/logs"

    def _end(self) -> None:
        for process in self.started[-1].values() if self.started else ():
            process.kill()
            process.communicate()


class Watched:
    """A LocalRay, and what it said."""

    def __init__(self, servers: Stand, restarts: int = 3, window_s: float = 600.0, stopped_s: float = 15.0) -> None:
        self.lost: list[str] = []
        self.errors: list[BaseException] = []
        self.back = threading.Semaphore(0)
        self.failed = threading.Event()
        self.ray = LocalRay(
            servers, restarts, window_s, *OWNER, self.lost.append, self.back.release, self._on_error, stopped_s
        )

    def wait_until_back(self) -> None:
        assert self.back.acquire(timeout=DEADLINE_S)
        assert not self.ray.is_lost()

    def wait_for_error(self) -> str:
        assert self.failed.wait(DEADLINE_S)
        assert isinstance(self.errors[0], SystemFault)
        return str(self.errors[0])

    def _on_error(self, error: BaseException) -> None:
        self.errors.append(error)
        self.failed.set()


Watch = Callable[..., Watched]


@pytest.fixture
def servers() -> Stand:
    return Stand()


@pytest.fixture
def watch(servers: Stand) -> Iterator[Watch]:
    made: list[Watched] = []

    def begin(**limits: float) -> Watched:
        made.append(Watched(servers, **limits))  # type: ignore[arg-type]
        return made[-1]

    yield begin
    for each in made:
        each.ray.close()
    assert servers.calls[-1] == "stop"
    assert all(process.poll() is not None for pair in servers.started for process in pair.values())


@pytest.mark.parametrize("server", ["raylet", "GCS"])
def test_a_killed_server_is_noticed_at_once_and_all_is_started_anew(watch: Watch, servers: Stand, server: str) -> None:
    watched = watch()
    assert not watched.ray.is_lost()
    servers.started[0][server].kill()
    watched.wait_until_back()
    (message,) = watched.lost
    assert message == (
        f"the local Ray of this run is gone (its {server} was killed by SIGKILL); starting another one "
        "(start 1 of local_ray_restarts=3)"
    )
    assert servers.calls == ["start", "kill", "stop", "start"]
    assert not watched.errors


def test_a_server_that_ends_is_a_dead_one_too(watch: Watch, servers: Stand) -> None:
    watched = watch()
    servers.started[0]["raylet"].communicate(b"3\n")
    watched.wait_until_back()
    assert "(its raylet ended)" in watched.lost[0] or "(its raylet ended with exit code 3)" in watched.lost[0]


@pytest.mark.parametrize("server", ["raylet", "GCS"])
def test_a_server_that_stays_stopped_is_a_dead_one(watch: Watch, servers: Stand, server: str) -> None:
    watched = watch(stopped_s=0.05)
    servers.started[0][server].send_signal(signal.SIGSTOP)
    watched.wait_until_back()
    assert f"(its {server} has been stopped for 0.05 s); starting another one" in watched.lost[0]
    assert all(process.poll() is not None for process in servers.started[0].values())


def test_one_that_is_condemned_is_lost_though_its_servers_run(watch: Watch) -> None:
    watched = watch()
    watched.ray.condemn("it has given up its only node", watched.ray.count)
    watched.wait_until_back()
    assert "gone (it has given up its only node)" in watched.lost[0]


def test_what_is_said_of_one_that_is_gone_does_not_fall_on_the_next(watch: Watch, servers: Stand) -> None:
    """Ray's answer about a raylet that is leaving may come when that raylet has ended and another Ray runs."""
    watched = watch(restarts=1)
    first = watched.ray.count
    servers.started[0]["raylet"].kill()
    watched.wait_until_back()
    watched.ray.condemn("it has given up its only node", first)
    assert not watched.ray.is_lost() and not watched.errors


def test_what_is_said_of_one_that_is_being_replaced_does_not_fall_on_the_next(watch: Watch, servers: Stand) -> None:
    gate, begun = threading.Event(), threading.Event()
    start = servers.start

    def slow() -> dict[str, int]:
        begun.set()
        assert gate.wait(DEADLINE_S)
        return start()

    watched = watch(restarts=1)
    servers.start = slow  # type: ignore[method-assign]
    first = watched.ray.count
    servers.started[0]["raylet"].kill()
    assert begun.wait(DEADLINE_S)
    watched.ray.condemn("it has given up its only node", first)
    gate.set()
    watched.wait_until_back()
    assert len(watched.lost) == 1 and not watched.errors


def test_the_bound_is_named_with_the_setting_and_the_way_on(watch: Watch, servers: Stand) -> None:
    watched = watch(restarts=2)
    for number in range(2):
        servers.started[number]["raylet"].kill()
        watched.wait_until_back()
    servers.started[2]["GCS"].kill()
    assert watched.wait_for_error() == (
        "the local Ray of this run is gone (its GCS was killed by SIGKILL), and local_ray_restarts=2 allows no further "
        "restart within retry_window_s=600; Ray's logs: /tmp/logs. Committed steps stay: run it again to resume, "
        "with --local-ray-restarts for more"
    )
    assert len(watched.lost) == 2 and watched.ray.is_lost()


def test_no_restart_at_all_may_be_asked_for(watch: Watch, servers: Stand) -> None:
    watched = watch(restarts=0)
    servers.started[0]["raylet"].kill()
    assert "local_ray_restarts=0 allows no further restart" in watched.wait_for_error()
    assert not watched.lost


def test_one_that_lived_for_long_is_the_first_that_counts(watch: Watch, servers: Stand) -> None:
    watched = watch(restarts=1, window_s=0)
    for number in range(3):
        servers.started[number]["raylet"].kill()
        watched.wait_until_back()
    assert all("start 1 of local_ray_restarts=1" in message for message in watched.lost)


def test_a_start_that_fails_counts_as_one(watch: Watch, servers: Stand) -> None:
    watched = watch(restarts=2)
    servers.fail = [SystemFault("Ray did not start (timed out); an overloaded machine? run it again")]
    servers.started[0]["raylet"].kill()
    watched.wait_until_back()
    assert "gone (Ray did not start" in watched.lost[1] and "start 2 of" in watched.lost[1]


def test_a_first_start_that_fails_is_raised(servers: Stand) -> None:
    servers.fail = [ConfigError("cannot start or join a local Ray: no such option")]
    with pytest.raises(ConfigError, match="no such option"):
        Watched(servers)
    assert servers.calls == ["start", "stop"]


def test_a_first_start_that_takes_too_long_is_tried_once_more(watch: Watch, servers: Stand) -> None:
    servers.fail = [SystemFault("Ray did not start (timed out); an overloaded machine? run it again")]
    watched = watch(restarts=1)
    assert servers.calls == ["start", "stop", "start"] and not watched.ray.is_lost() and not watched.lost


def test_where_the_run_is_ending_no_other_one_is_started(watch: Watch, servers: Stand) -> None:
    """Ctrl-C reaches Ray's processes as well."""
    watched = watch()
    watched.ray.leave()
    servers.started[0]["raylet"].kill()
    deadline = time.monotonic() + DEADLINE_S
    while "stop" not in servers.calls:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert watched.ray.is_lost() and not watched.lost
    assert servers.calls.count("start") == 1


def test_closed_while_another_one_is_being_started(servers: Stand) -> None:
    """It is stopped like any other: nothing stays behind."""
    gate, begun = threading.Event(), threading.Event()
    start = servers.start

    def slow() -> dict[str, int]:
        if servers.started:
            begun.set()
            assert gate.wait(DEADLINE_S)
        return start()

    servers.start = slow  # type: ignore[method-assign]
    watched = Watched(servers)
    servers.started[0]["raylet"].kill()
    assert begun.wait(DEADLINE_S)
    closing = threading.Thread(target=watched.ray.close)
    closing.start()
    gate.set()
    closing.join(DEADLINE_S)
    assert not closing.is_alive() and servers.calls[-1] == "stop"
    assert all(process.poll() is not None for pair in servers.started for process in pair.values())


class Cluster:
    """A placement whose Ray comes and goes: `nodes_seen` and `fates` are used up, one per look and per attempt."""

    def __init__(self, nodes_seen: Iterable[list[dict[str, float]]] = (), fates: Iterable[str] = ()) -> None:
        self._nodes_seen, self._fates = list(nodes_seen), list(fates)
        self.lost = False
        self.submitted = 0
        self.on_lost: Callable[[str], None] = print
        self.on_back: Callable[[], None] = print
        self.is_local = True

    def __call__(self, *settings: Any) -> "Cluster":
        _, _, self.on_lost, self.on_back, _ = settings
        return self

    def nodes(self) -> list[dict[str, float]]:
        return self._nodes_seen.pop(0) if self._nodes_seen else [{"CPU": 1.0}]

    def is_lost(self) -> bool:
        return self.lost

    def look_again(self) -> None:
        self.lost = False

    def at_once(self, options: StepOptions) -> int:
        return 1

    def submit(self, call_id: str, step: str, options: StepOptions, text: bytes, done: Done) -> object:
        self.submitted += 1
        threading.Thread(target=self._run, args=(text, done)).start()
        return object()

    def _run(self, text: bytes, done: Done) -> None:
        fate = self._fates.pop(0) if self._fates else "ends"
        outcome = {"ok": True, "result": 7, "started": time.time(), "seconds": 0.001, "node": "n", "pid": 1}
        if fate == "fails":  # what a body says whose actors have gone with their Ray
            self.lost = True
            record: dict[str, Any] = {
                "kind": "user",
                "type": "ValueError",
                "message": "an actor is gone",
                "traceback": "",
            }
            done(json.dumps([{**outcome, "ok": False, "error": record}]).encode(), None)
        if fate in ("fails", "is lost"):
            self.lost = True
            self.on_lost("the local Ray of this run is gone (its raylet was killed by SIGKILL)")
            self.on_back()
        if fate == "is lost":
            done(None, RuntimeError("its node died, which is known already"))
        if fate == "ends":
            done(json.dumps([outcome]).encode(), None)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: "127.0.0.1" if name == "start" else None


@step
def seven() -> int:
    raise AssertionError("its body never runs here")


@workflow
def one() -> int:
    return seven().result()


Run = Callable[..., list[Event]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    def begin(cluster: Cluster, **settings: Any) -> list[Event]:
        monkeypatch.setattr(attempts, "RayTasks", cluster)
        monkeypatch.setattr(attempts, "NODES_AGE_S", 0.01)
        events: list[Event] = []
        given = RunSettings(store=str(tmp_path / "store"), backoff_s=0.001, new=True, **settings)
        assert session.run(one, settings=given, observers=[events.append]).value == 7
        return events

    return begin


@pytest.mark.parametrize("fate", ["is lost", "fails"])
def test_what_ran_on_a_ray_that_died_goes_on_at_no_cost_to_its_retries(run: Run, fate: str) -> None:
    cluster = Cluster(fates=[fate] * 4)
    events = run(cluster, system_retries=1)
    assert cluster.submitted == 5
    reasons = {event.data["error"] for event in events if event.kind == "retry"}
    assert reasons == {"the local Ray is gone"}
    warnings = [event.data["message"] for event in events if event.kind == "warning"]
    assert warnings == ["the local Ray of this run is gone (its raylet was killed by SIGKILL)"] * 4


def test_where_nothing_may_be_repeated_a_lost_ray_ends_the_run(run: Run) -> None:
    with pytest.raises(NodeLost, match=r"seven\[0\]: the local Ray is gone"):
        run(Cluster(fates=["is lost"]), system_retries=0)


def test_a_cluster_without_any_node_is_waited_for_and_named(run: Run) -> None:
    """It is not said to lack what the step asks for; checks of the workflow see the first nodes that there are."""
    cluster = Cluster(nodes_seen=[[], [], []])
    cluster.is_local = False
    events = run(cluster)
    warnings = [event.data["message"] for event in events if event.kind == "warning"]
    assert warnings == ["the Ray cluster has no live node: steps wait until one joins it"]
    assert cluster.submitted == 1


@pytest.mark.parametrize(
    ("options", "begun"),
    [({}, []), ({"log_to_driver": True}, ["log_monitor"]), ({"include_dashboard": True}, ["api_server"])],
)
def test_a_local_ray_has_no_server_that_nobody_asked_for(options: dict[str, bool], begun: list[str]) -> None:
    started: list[str] = []

    class Node:
        def start_api_server(self) -> None:
            started.append("api_server")

        def start_monitor(self) -> None:
            started.append("monitor")

        def start_log_monitor(self) -> None:
            started.append("log_monitor")

    def init(**_: Any) -> None:
        node = Node()
        node.start_api_server()
        node.start_monitor()
        node.start_log_monitor()
        raise ValueError("that is enough")

    own = {name: value for name, value in vars(Node).items() if name.startswith("start_")}
    errors = SimpleNamespace(AuthenticationError=PermissionError)
    constants = SimpleNamespace(SETUP_WORKER_FILENAME="setup_worker.py")
    private = SimpleNamespace(node=SimpleNamespace(Node=Node), ray_constants=constants)
    ray = SimpleNamespace(init=init, exceptions=errors, shutdown=lambda: None, _private=private)
    servers = RayServers(ray, options)
    with pytest.raises(ConfigError, match="that is enough"):
        servers.start()
    servers.stop()
    assert started == begun
    assert own.items() <= vars(Node).items(), "another Ray of this process starts what it wants"
