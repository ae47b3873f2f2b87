"""What every test shares: nothing is fetched or reported; GPU tests need a GPU, page tests a browser."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def pytest_configure(config: pytest.Config) -> None:
    """Before any import of Ray or transformers, and inherited by every process that a test starts."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = (
        shutil.which("nvidia-smi") is not None
        and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    )
    browser = any(shutil.which(name) for name in BROWSERS)
    for item in items:
        if "tests/gpu/" in item.nodeid and not gpu:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))
        if item.get_closest_marker("page") and not browser:
            item.add_marker(pytest.mark.skip(reason="no headless Chromium here"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A throw-away HOME, so that the default store and the artifact cache are empty."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    yield folder
