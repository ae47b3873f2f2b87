"""Notices that this machine will be taken away: from its cloud's metadata service, or by SIGTERM.

Who waits for whom: one thread per source polls and sleeps; nothing waits for it. A source that is slow, fails or does
not exist is polled again and delays no other. Ray's own drains are not read here, because `infra` does not know Ray.

Sources:
    AWS  https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html (two minutes ahead)
         https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/rebalance-recommendations.html (no time is given)
    GCP  https://cloud.google.com/compute/docs/instances/create-use-spot (30 seconds ahead)
         https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice (60 seconds or more ahead)
"""

import http.client
import json
import logging
import math
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

from infra.config import Seconds, Settings

log = logging.getLogger(__name__)

AWS_URL, GCP_URL = "http://169.254.169.254", "http://metadata.google.internal"
ANSWER_S = 2.0
"""How long a metadata service may take to answer; it runs on the machine itself or next to it."""
GCP_PREEMPTION_S, GCP_MAINTENANCE_S = 30.0, 60.0
TOKEN_LIFE_S = 21600


class NoticeSettings(Settings):
    """Which notices of preemption and maintenance a node watches for, besides Ray's own drains."""

    cloud: Literal["auto", "aws", "gcp", "none"] = "auto"
    """The cloud whose metadata service each node polls. auto: the cloud that the machine's firmware names; none if it
    names neither."""
    metadata_url: str = ""
    """The metadata service's address, if it is not the cloud's usual one (a proxy, IPv6)."""
    on_rebalance: bool = True
    """After AWS's rebalance recommendation, leave the machine as soon as a replacement is ready. AWS may never take
    the machine."""
    sigterm_grace_s: Seconds = 30
    """Time from SIGTERM until the machine ends: a pod's terminationGracePeriodSeconds, GCP's or init's time-out."""


@dataclass(frozen=True)
class Notice:
    """A node will end, at `deadline` at the earliest (seconds since the epoch; infinite: it may end at any time).

    `kind`: spot-terminate, spot-stop, spot-hibernate, rebalance, preempted, maintenance or sigterm.
    Example: Notice("4f1c", "spot-terminate", 1763718000.0).
    """

    node: str
    kind: str
    deadline: float


class NoticeSource(Protocol):
    """One source of notices. `read` may raise OSError, ValueError or HTTPException: the source has no answer now."""

    period_s: float

    def read(self) -> Notice | None: ...


class AwsNotices:
    """IMDSv2: a token, then the spot action, then, if there is no spot action, the rebalance recommendation."""

    period_s = 5.0  # what AWS recommends

    def __init__(self, node: str, url: str = AWS_URL, on_rebalance: bool = True) -> None:
        self.node, self.url, self.on_rebalance = node, url.rstrip("/"), on_rebalance
        self._token = ""

    def read(self) -> Notice | None:
        action = self._get("spot/instance-action")
        if action is not None:
            tree = json.loads(action)
            return Notice(self.node, f"spot-{tree['action']}", _epoch(tree["time"]))
        if self.on_rebalance and self._get("events/recommendations/rebalance") is not None:
            return Notice(self.node, "rebalance", math.inf)
        return None

    def _get(self, path: str) -> str | None:
        """A metadata item; None if it does not exist (yet). An expired token is renewed once."""
        for fresh in (not self._token, True):
            if fresh:
                life = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_LIFE_S)}
                self._token = _ask(f"{self.url}/latest/api/token", life, "PUT")
            try:
                return _ask(f"{self.url}/latest/meta-data/{path}", {"X-aws-ec2-metadata-token": self._token})
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401 or fresh:
                    raise
        raise AssertionError("the second round returns or raises")


class GcpNotices:
    """The metadata server of Compute Engine: preempted, then host maintenance that ends the machine."""

    period_s = 1.0

    def __init__(self, node: str, url: str = GCP_URL) -> None:
        self.node, self.url = node, url.rstrip("/")
        self._first: dict[str, float] = {}

    def read(self) -> Notice | None:
        if self._get("preempted") == "TRUE":
            return self._notice("preempted", GCP_PREEMPTION_S)
        if self._get("maintenance-event") == "TERMINATE_ON_HOST_MAINTENANCE":  # a live migration ends nothing
            return self._notice("maintenance", GCP_MAINTENANCE_S)
        return None

    def _notice(self, kind: str, after_s: float) -> Notice:
        """GCP names no time, so the deadline counts from the moment when the notice was first seen."""
        return Notice(self.node, kind, self._first.setdefault(kind, time.time()) + after_s)

    def _get(self, path: str) -> str:
        return _ask(f"{self.url}/computeMetadata/v1/instance/{path}", {"Metadata-Flavor": "Google"}).strip()


class SigtermNotices:
    """SIGTERM to this process. Create it in the main thread (Python's rule), once per process.

    The signal's number arrives through a pipe, so it is seen while the main thread is inside native code, as a Ray
    worker's main thread always is.
    """

    period_s = 0.1

    def __init__(self, node: str, grace_s: float) -> None:
        self.node, self.grace_s = node, grace_s
        self._deadline: float | None = None
        self._end, write = os.pipe()
        os.set_blocking(self._end, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)

    def read(self) -> Notice | None:
        try:
            numbers = os.read(self._end, 4096)
        except BlockingIOError:
            numbers = b""
        if self._deadline is None and signal.SIGTERM in numbers:
            self._deadline = time.time() + self.grace_s
        return None if self._deadline is None else Notice(self.node, "sigterm", self._deadline)


class NoticeWatch:
    """Polls every source in a thread of its own until `close`."""

    def __init__(self, sources: Iterable[NoticeSource]) -> None:
        self._found: dict[str, Notice] = {}
        self._failure: BaseException | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()
        for source in sources:
            threading.Thread(target=self._watch, args=(source,), name="notices", daemon=True).start()

    def earliest(self) -> Notice | None:
        """The most urgent notice so far. Raises the error that ended a source's thread."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            return min(self._found.values(), key=lambda notice: notice.deadline, default=None)

    def close(self) -> None:
        """Stop polling."""
        self._ended.set()

    def _watch(self, source: NoticeSource) -> None:
        silent = False
        while not self._ended.is_set():
            try:
                notice = source.read()
                silent = False
                if notice is not None:
                    self._take(notice)
            except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
                if not silent:
                    name = type(source).__name__
                    log.warning("%s: no answer (%s), a notice may be missed; see elastic.notices.cloud", name, error)
                silent = True
            except BaseException as error:  # raised again in earliest()
                with self._lock:
                    self._failure = error
                return
            self._ended.wait(source.period_s)

    def _take(self, notice: Notice) -> None:
        with self._lock:
            new = self._found.get(notice.kind) != notice
            self._found[notice.kind] = notice
        if new:
            log.warning("%s: %s", notice.node[:12], in_words(notice))


def in_words(notice: Notice) -> str:
    """A notice as text, e.g. "will go in 118 s (spot-terminate)"."""
    left = max(0.0, notice.deadline - time.time())
    return f"may go at any time ({notice.kind})" if math.isinf(left) else f"will go in {left:.0f} s ({notice.kind})"


def sources(node: str, settings: NoticeSettings) -> list[NoticeSource]:
    """The sources that this process can read."""
    found: list[NoticeSource] = []
    cloud = this_cloud() if settings.cloud == "auto" else settings.cloud
    if cloud == "aws":
        found.append(AwsNotices(node, settings.metadata_url or AWS_URL, settings.on_rebalance))
    elif cloud == "gcp":
        found.append(GcpNotices(node, settings.metadata_url or GCP_URL))
    if threading.current_thread() is threading.main_thread():
        found.append(SigtermNotices(node, settings.sigterm_grace_s))
    return found


def this_cloud(firmware: Path = Path("/sys/class/dmi/id")) -> Literal["aws", "gcp", "none"]:
    """The cloud that this machine's firmware names. Sends nothing over the network."""
    words = ""
    for name in ("sys_vendor", "product_name", "bios_vendor"):
        try:
            words += (firmware / name).read_text()
        except OSError:
            continue
    if "Amazon EC2" in words:
        return "aws"
    return "gcp" if "Google" in words else "none"


def _ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str:
    """Bypasses proxies, because a metadata service answers only its own machine."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=ANSWER_S) as answer:
        return str(answer.read(1 << 16).decode())


def _epoch(text: str) -> float:
    """Seconds since the epoch of a time such as "2026-11-21T10:26:00Z"."""
    return datetime.fromisoformat(text).timestamp()
