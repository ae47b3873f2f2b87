"""A service on loopback for the tests of the page, and a user's actions on the page."""

import hashlib
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from infra.errors import UserError
from infra.storage import Store
from tests.helpers.ports import free_ports
from workflows.service.schemas import Submission
from workflows.service.server.app import create_app
from workflows.service.server.control import Control

TOKEN = "a-token-for-the-page"
PATIENCE_MS = 180_000


class Site:
    """A service on a loopback port; `down()` and `up()` as an administrator would."""

    def __init__(self, store: Store, control: Control) -> None:
        self._app = create_app(store, control, {hashlib.sha256(TOKEN.encode()).hexdigest()})
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.up()

    def up(self) -> None:
        self._server = uvicorn.Server(uvicorn.Config(self._app, "127.0.0.1", self.port, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < deadline, "the service did not start"
            time.sleep(0.02)

    def down(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=60)


@dataclass
class Asked:
    """A Control that records the requests of the buttons, and refuses a second resume."""

    said: list[tuple[str, str]] = field(default_factory=list)

    def active(self) -> list[str]:
        return []

    def is_active(self, run_id: str) -> bool:
        return False

    def has_package(self, sha256: str) -> bool:
        return False

    async def put_package(self, sha256: str, content: AsyncIterator[bytes]) -> None:
        raise AssertionError("the page sends no packages")

    def submit(self, submission: Submission) -> dict[str, Any]:
        raise AssertionError("the page submits nothing")

    def cancel(self, run_id: str) -> str:
        self.said.append(("cancel", run_id))
        return "cancelling"

    def resume(self, run_id: str) -> str:
        if ("resume", run_id) in self.said:
            raise UserError(f"run {run_id} is being driven already")
        self.said.append(("resume", run_id))
        return "submitted"


def enter(tab: Any, site: Site, address: str = "#/runs") -> None:
    """Open an address with the token, as `recua up` prints it."""
    tab.goto(f"{site.url}/#token={TOKEN}&{address.removeprefix('#')}")
    tab.wait_for_selector("main > *")


def until(tab: Any, expression: str) -> None:
    """Wait for an expression of the page to be true (Playwright's own way needs eval, which the page forbids)."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not tab.evaluate(expression):
        assert time.monotonic() < deadline, expression
        tab.wait_for_timeout(50)


def click_node(tab: Any, name: str) -> None:
    """Click a node of the graph's canvas, with the mouse."""
    until(tab, f"document.querySelector('.view.graph')?.scene?.where({name!r})")
    tab.click("text=Fit")
    tab.wait_for_timeout(100)
    at = tab.evaluate(f"document.querySelector('.view.graph').scene.where({name!r})")
    tab.mouse.click(at["x"], at["y"])
