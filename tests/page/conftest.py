"""Headless Chromium. Screenshots go to PAGE_SCREENSHOTS, or to the test's temporary folder."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.page_site import PATIENCE_MS, TOKEN


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """It ends with these tests: as long as it lives, an event loop runs in this thread."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def window(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens private windows: `window(width=1280, scheme="light")`. What fails the test: an error of the page's own
    code, a request to anybody but the service, the token in an address."""
    problems: list[str] = []
    contexts = []

    def open_window(width: int = 1280, height: int = 800, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: _console(message, problems))
        page.on("request", lambda request: _request(request, problems))
        return page

    yield open_window
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def tab(window: Callable[..., Any]) -> Any:
    return window()


def _console(message: Any, problems: list[str]) -> None:
    expected = re.search(r"401|404|422|ERR_CONNECTION_(REFUSED|RESET|CLOSED|ABORTED)|ERR_EMPTY_RESPONSE", message.text)
    if message.type == "error" and not expected:
        problems.append(message.text)


def _request(request: Any, problems: list[str]) -> None:
    if not request.url.startswith("http://127.0.0.1:") or TOKEN in request.url.partition("#")[0]:
        problems.append(f"a request for {request.url}")


@pytest.fixture
def shoot(tmp_path: Path) -> Callable[[Any, str], None]:
    folder = Path(os.environ.get("PAGE_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=folder / f"{name}.png")
