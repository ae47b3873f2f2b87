"""Bearer tokens, as files and as digests: only digests leave the process that reads a token."""

import hashlib
from pathlib import Path

from infra.errors import ConfigError


def read_tokens(file: str | Path, setting: str) -> list[str]:
    """The tokens in a file, one a line; empty lines and those that begin with # are none.

    Raises:
        ConfigError: it cannot be read or holds none; names `setting`.
    """
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    tokens = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not tokens:
        raise ConfigError(f"{setting}: {file} holds no token")
    return tokens


def digest(token: str) -> str:
    """All that a server knows of a token: its sha256."""
    return hashlib.sha256(token.encode()).hexdigest()
