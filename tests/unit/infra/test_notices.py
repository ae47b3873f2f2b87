"""Notices of preemption, read from a real HTTP server that speaks the clouds' protocols, and from a real signal."""

import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ElasticSettings
from cluster.controller.fleet import Fleet, WorkerKind
from cluster.controller.lead import GroupController, Listener
from cluster.core.history import GroupJournal
from cluster.node.agent import AgentPlace, AgentSettings, NodeAgent
from cluster.node.rank_watch import Beat
from cluster.policies.drain import DrainView, decide_drain
from infra.notices import (
    AwsNotices,
    GcpNotices,
    Notice,
    NoticeSettings,
    NoticeWatch,
    sources,
    this_cloud,
)
from infra.storage import open_store

WAIT_S = 30


class Metadata(ThreadingHTTPServer):
    """Both clouds' metadata services. `answers`: path -> text (absent: 404); `failures`: next answers are 500."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, str] = {}
        self.tokens: set[str] = set()
        self.asked: list[str] = []
        self.failures = 0
        self.slow = threading.Event()
        self.slow.set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        if (
            self.path != "/latest/api/token"
            or not 1 <= int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600
        ):
            return self._answer(400)
        token = f"token-{len(self.server.asked)}"
        self.server.asked.append("token")
        self.server.tokens.add(token)
        self._answer(200, token)

    def do_GET(self) -> None:
        server = self.server
        server.asked.append(self.path)
        server.slow.wait(WAIT_S)
        if server.failures:
            server.failures -= 1
            return self._answer(500)
        if self.path.startswith("/latest/"):
            if self.headers["X-aws-ec2-metadata-token"] not in server.tokens:
                return self._answer(401)
        elif self.headers["Metadata-Flavor"] != "Google":
            return self._answer(403)
        text = server.answers.get(self.path)
        self._answer(404) if text is None else self._answer(200, text)

    def _answer(self, code: int, text: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.slow.set()
    server.shutdown()
    thread.join()
    server.server_close()


ACTION, REBALANCE = "/latest/meta-data/spot/instance-action", "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED, MAINTENANCE = (f"/computeMetadata/v1/instance/{name}" for name in ("preempted", "maintenance-event"))


def until(ready: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := ready()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def test_spot_aws_action_and_recommendation(metadata: Metadata) -> None:
    source = AwsNotices("n0", metadata.url)
    assert source.read() is None
    metadata.answers[REBALANCE] = '{"noticeTime": "2020-10-27T08:22:00Z"}'
    assert source.read() == Notice("n0", "rebalance", math.inf)
    assert AwsNotices("n0", metadata.url, on_rebalance=False).read() is None
    metadata.answers[ACTION] = '{"action": "stop", "time": "2017-09-18T08:22:00Z"}'
    assert source.read() == Notice("n0", "spot-stop", 1505722920.0)


def test_spot_aws_token_is_kept_and_renewed_when_it_has_run_out(metadata: Metadata) -> None:
    source = AwsNotices("n0", metadata.url)
    source.read()
    source.read()
    assert metadata.asked.count("token") == 1
    metadata.tokens.clear()
    assert source.read() is None
    assert metadata.asked.count("token") == 2


def test_spot_gcp_preemption_and_maintenance(metadata: Metadata) -> None:
    metadata.answers = {PREEMPTED: "FALSE\n", MAINTENANCE: "NONE"}
    source = GcpNotices("n0", metadata.url)
    assert source.read() is None
    metadata.answers[MAINTENANCE] = "MIGRATE_ON_HOST_MAINTENANCE"
    assert source.read() is None
    metadata.answers[MAINTENANCE] = "TERMINATE_ON_HOST_MAINTENANCE"
    before = time.time()
    first = source.read()
    assert first is not None and first.kind == "maintenance"
    assert before + 60 <= first.deadline <= time.time() + 60
    assert source.read() == first  # the deadline does not move on
    metadata.answers[PREEMPTED] = "TRUE"
    second = source.read()
    assert second is not None and second.kind == "preempted" and second.deadline < first.deadline


def test_spot_watch_goes_on_after_failures_and_slowness(metadata: Metadata, caplog: pytest.LogCaptureFixture) -> None:
    """A source that fails, or does not answer, is asked again, says so once, and holds up no other source."""
    failing, hanging = AwsNotices("n0", metadata.url), GcpNotices("n0", "http://127.0.0.1:9")
    failing.period_s = hanging.period_s = 0.01
    metadata.failures = 3
    metadata.answers[ACTION] = '{"action": "terminate", "time": "2026-11-21T10:26:00Z"}'
    watch = NoticeWatch([failing, hanging])
    assert until(watch.earliest).kind == "spot-terminate"
    until(lambda: len(caplog.records) >= 3)
    watch.close()
    told = [record.message for record in caplog.records]
    assert sum("AwsNotices: no answer (HTTP Error 500" in line for line in told) == 1
    assert sum("GcpNotices: no answer" in line for line in told) == 1


def test_spot_a_silent_service_is_given_up_and_asked_again(metadata: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.notices.ANSWER_S", 0.05)
    source = GcpNotices("n0", metadata.url)
    metadata.answers = {PREEMPTED: "TRUE"}
    metadata.slow.clear()
    with pytest.raises(OSError, match="timed out"):
        source.read()
    metadata.slow.set()
    monkeypatch.setattr("infra.notices.ANSWER_S", float(WAIT_S))
    assert source.read() is not None


def test_spot_nonsense_is_no_notice(metadata: Metadata, caplog: pytest.LogCaptureFixture) -> None:
    metadata.answers[ACTION] = "<html>a captive portal</html>"
    watch = NoticeWatch([AwsNotices("n0", metadata.url)])
    until(lambda: caplog.records)
    assert watch.earliest() is None
    watch.close()


def test_spot_a_broken_source_is_raised_where_notices_are_asked_for() -> None:
    class Broken:
        period_s = 1.0

        def read(self) -> None:
            raise TypeError("a bug")

    watch = NoticeWatch([Broken()])

    def raised() -> bool:
        try:
            watch.earliest()
        except TypeError:
            return True
        return False

    assert until(raised)


def test_spot_agent_tells_its_controller(metadata: Metadata, tmp_path: Path) -> None:
    """In the beat, whatever the ranks do, and within the controller's usual wait."""
    settings = NoticeSettings(cloud="gcp", metadata_url=metadata.url)
    metadata.answers = {PREEMPTED: "FALSE", MAINTENANCE: "NONE"}
    place = AgentPlace("g", "n0", tmp_path / "recua-node-n0" / "recua-g", AgentSettings(notices=settings))
    agents: list[NodeAgent] = []
    maker = threading.Thread(target=lambda: agents.append(NodeAgent(place)))  # no handler of SIGTERM in pytest itself
    maker.start()
    maker.join()
    agent = agents[0]
    try:
        assert agent.listen(0, 0.1).notice is None
        metadata.answers[PREEMPTED] = "TRUE"
        notice = until(lambda: agent.listen(1 << 40, 0.05).notice)
        assert notice.node == "n0" and notice.kind == "preempted"
    finally:
        agent.close(remove=True)


SIGTERM_PROGRAM = """
import hashlib, threading, time
from infra.notices import NoticeSettings, NoticeWatch, sources
[source] = sources("n0", NoticeSettings(cloud="none", sigterm_grace_s=30))
watch = NoticeWatch([source])
def tell():
    while watch.earliest() is None:
        time.sleep(0.01)
    print(watch.earliest().kind, watch.earliest().deadline - time.time(), flush=True)
threading.Thread(target=tell).start()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # native code for minutes: no Python handler would run
"""


def test_spot_sigterm_is_a_notice_and_ends_nothing(repository: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SIGTERM_PROGRAM], cwd=repository, stdout=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
        one.send_signal(signal.SIGTERM)
        kind, left = one.stdout.readline().split()
        assert kind == "sigterm" and 0 < float(left) <= 30
        assert one.poll() is None
        one.kill()


@pytest.mark.parametrize(
    ("vendor", "product", "cloud"),
    [("Amazon EC2", "c7i.4xlarge", "aws"), ("Google", "Google Compute Engine", "gcp"), ("QEMU", "Standard PC", "none")],
)
def test_spot_cloud_by_firmware(tmp_path: Path, vendor: str, product: str, cloud: str) -> None:
    (tmp_path / "sys_vendor").write_text(f"{vendor}\n")
    (tmp_path / "product_name").write_text(f"{product}\n")
    assert this_cloud(tmp_path) == cloud
    assert this_cloud(tmp_path / "nothing") == "none"


def test_spot_sources_follow_the_settings() -> None:
    """In a thread, where Python allows no signal handlers."""
    found: list[list[Any]] = []

    def ask() -> None:
        found.extend(sources("n0", NoticeSettings(cloud=cloud)) for cloud in ("aws", "gcp", "none"))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert [[type(source) for source in some] for some in found] == [[AwsNotices], [GcpNotices], []]


class Quiet:
    """A group's task with nothing in storage."""

    replicated = True

    def orders(self, join: Any, fleet: Any, history: Any, *_: Any) -> dict[str, Any]:
        return {}

    def stored(self, fresh: bool = False) -> list[tuple[int, int]]:
        return []


def test_spot_controller_drains_a_node_once_and_again_when_it_goes_sooner(tmp_path: Path) -> None:
    """What the agents' beats say becomes the core's drains, in the core's clock."""
    told: list[dict[str, Any]] = []
    controller = GroupController(
        Fleet("g", WorkerKind(object)),
        Quiet(),
        ElasticSettings(),
        GroupJournal(open_store(tmp_path), "g"),
        Listener(event=told.append),
    )
    soon = time.time() + 100
    for deadline in (math.inf, math.inf, soon, soon, soon + 30, soon - 50):
        controller.hearing.hear(Beat("n0", 1, notice=Notice("n0", "some-notice", deadline)))
    drains = [event for event in told if event.get("notice") == "some-notice"]
    assert drains[0]["what"].split(" (")[0] == "node n0 may go at any time"
    assert len(drains) == 3
    assert all(event["event"] == "detected" and event["node"] == "n0" for event in drains)
    left = controller.core.roster.draining["n0"] - time.monotonic()
    assert 40 < left <= 50


def test_spot_a_risk_without_a_time_waits_for_a_replacement() -> None:
    view = DrainView("n0", now=100.0, deadline=math.inf, step_s=2.0, pause_s=0.5, covered=False)
    held = decide_drain(view, ElasticSettings())
    assert held.action == "hold" and held.reason == "n0 may go at any time, until a replacement is ready"
    assert decide_drain(replace(view, covered=True), ElasticSettings()).action == "leave-at-boundary"
