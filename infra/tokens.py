"""Bearer tokens, as files and as digests: only digests leave the process that reads a token."""

import hashlib
from pathlib import Path

from infra.errors import ConfigError


def read_tokens(file: str | Path, setting: str) -> list[str]:
    """The tokens in a file, one per line. Empty lines and lines that begin with # are skipped.

    Raises:
        ConfigError: the file cannot be read or holds no token; the message names `setting`.
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
    """The sha256 of a token: all that a server keeps of it."""
    return hashlib.sha256(token.encode()).hexdigest()
