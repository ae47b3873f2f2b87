"""The folder of recua's own packages."""

from pathlib import Path


def code_root() -> Path:
    """The folder that holds `infra`, `engines`, `workflows` and the others. recua's processes need it on their path."""
    return Path(__file__).resolve().parents[1]
