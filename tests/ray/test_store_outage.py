"""A store that goes down while a run goes on: for some seconds, and for good."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keeping_program as program
import pytest

from infra.errors import StoreError
from infra.storage import open_store
from infra.storage.s3 import S3Store
from tests.helpers.rays import local_ray
from workflows.driver import session
from workflows.driver.settings import RunSettings
from workflows.runs.catalog import load_run

Inject = Callable[..., dict[str, Any]]


@pytest.fixture
def url(s3_url: str, s3_proxy: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store behind the proxy, for the driver and for a Ray of its own."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_proxy)
    with local_ray(num_cpus=1):
        yield s3_url


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class Drive(threading.Thread):
    """One driver of run `name`, up to its second step's gate; `value` or `error` when it has ended."""

    def __init__(self, url: str, folder: Path, name: str) -> None:
        super().__init__()
        self.value: Any = None
        self.error: BaseException | None = None
        self._folder = folder
        cache = str(folder / "cache")
        self._settings = RunSettings(store=url, run_id=name, reuse=False, lease_s=3.0, backoff_s=0.01, cache=cache)
        folder.mkdir(exist_ok=True)
        self.start()
        wait_for(lambda: (folder / "gated-1").exists() or not self.is_alive(), "the second step did not start")

    def run(self) -> None:
        try:
            self.value = session.run(program.chain, str(self._folder), settings=self._settings).value
        except BaseException as error:
            self.error = error

    def open_gate(self) -> None:
        (self._folder / "go").touch()

    def over(self) -> "Drive":
        self.join(timeout=120)
        assert not self.is_alive(), "it did not end"
        return self


def commits(url: str, run_id: str) -> Counter[str]:
    store = open_store(url)
    found: Counter[str] = Counter()
    for key in store.list(f"runs/{run_id}/journal/"):
        records = json.loads(store.get(key) or b"")["records"]
        found.update(record["call"] for record in records if record["type"] == "commit")
    return found


def test_a_run_outlives_an_outage_and_goes_on_after_one_that_did_not_end(
    url: str, inject: Inject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = {f"gated[{number}]": 1 for number in range(4)}

    outlived = Drive(url, tmp_path / "a", "outlived")
    inject(rates={"error-503": 1.0})
    outlived.open_gate()
    wait_for(lambda: inject()["counts"].get("error-503", 0) >= 12, "nobody asked the store")
    inject(rates={})
    assert outlived.over().value == 4, outlived.error
    assert commits(url, "outlived") == once

    monkeypatch.setattr(S3Store.__init__, "__defaults__", (2.0, 5.0, 10.0))  # the driver's patience
    given_up = Drive(url, tmp_path / "b", "given-up")
    inject(rates={"error-503": 1.0})
    given_up.open_gate()
    error = given_up.over().error
    assert type(error) is StoreError and str(error).startswith(f"--store {url}: runs/given-up/")
    assert "unreachable or failing (ServiceUnavailable); check --store and AWS_ENDPOINT_URL" in str(error)
    inject(rates={})
    assert load_run(open_store(url), "given-up").status in ("interrupted", "running"), "its end could not be written"
    resumed = Drive(url, tmp_path / "b", "given-up")
    assert resumed.over().value == 4, resumed.error
    assert commits(url, "given-up") == once and load_run(open_store(url), "given-up").status == "finished"
    assert (tmp_path / "b" / "gated-0").stat().st_size == 1, "committed before the outage: it ran once"
