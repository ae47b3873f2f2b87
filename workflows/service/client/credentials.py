"""Files that `recua up` writes to ~/.recua for the other commands: the service's address and the token.

~/.recua/token          mode 0600, the bearer token
~/.recua/service.json   {"url", "store", "address", "head": null or {"pid", "start", "mark", "folder"}}
"""

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.storage.files import appear, write_text
from infra.tokens import read_tokens

Record = dict[str, Any]


def home() -> Path:
    return Path.home() / ".recua"


def read_place() -> Record | None:
    """The service of this user's last `recua up`; None if there is none."""
    try:
        place: Record = json.loads((home() / "service.json").read_text())
        return place
    except (OSError, ValueError):
        return None


def write_place(place: Record | None) -> None:
    """None: nothing is up."""
    if place is None:
        forget_place()
        return
    write_text(home() / "service.json", json.dumps(place, indent=2) + "\n")


def forget_place() -> None:
    with contextlib.suppress(FileNotFoundError):
        (home() / "service.json").unlink()


def known_store() -> str | None:
    """The store of the service that this user started; None if there is none."""
    place = read_place()
    return None if place is None else str(place["store"])


def service_url(given: str | None) -> str:
    """--service, RECUA_SERVICE, or what `recua up` left.

    Raises:
        UserError: none of them.
    """
    place = read_place()
    found = given or (place or {}).get("url")
    if not found:
        raise UserError("no service is known here: start one with `recua up`, or give --service URL (RECUA_SERVICE)")
    return str(found).rstrip("/")


def read_token(token_file: str | Path | None) -> str | None:
    """The token of --token-file, RECUA_TOKEN, or ~/.recua/token; None if there is none.

    Raises:
        ConfigError: the named file cannot be read or is empty.
    """
    if token_file is not None:
        return read_tokens(token_file, "--token-file")[0]
    if token := os.environ.get("RECUA_TOKEN", "").strip():
        return token
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (home() / "token").read_text().strip() or None
    return None


def make_token(token_file: str | Path | None) -> str:
    """The token as above; if there is none, a new one is written to ~/.recua/token."""
    token = read_token(token_file)
    if token is None:
        token = secrets.token_urlsafe(32)
        write_secret(home() / "token", token + "\n")
    return token


def write_secret(file: Path, text: str) -> None:
    """Write a file that only this user can read, from its creation on."""
    with appear(file) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
