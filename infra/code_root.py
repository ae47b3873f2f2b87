"""Where recua's own packages lie."""

from pathlib import Path


def code_root() -> Path:
    """The folder that holds `infra`, `engines`, `workflows` and the others; processes of ours need it on their path."""
    return Path(__file__).resolve().parents[1]
