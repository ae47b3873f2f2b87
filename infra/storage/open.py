"""Object storage: one small protocol, a folder or `s3://bucket/prefix` behind it.

Keys are relative, `/`-separated paths. What the rest of recua builds on is `put_if_absent`: of any number of writers
of one key, in any number of processes and on any number of nodes, exactly one succeeds, and a reader sees either
nothing or the whole object. A folder gets that from a fully written temporary file and `link(2)`; S3 from a conditional
PUT (`If-None-Match: *`).
"""

import re
from pathlib import Path
from urllib.parse import unquote

from infra.errors import ConfigError
from infra.storage.folder import FolderStore
from infra.storage.store import Store


def open_store(url: str | Path) -> Store:
    """A store from `s3://bucket[/prefix]`, `file:///path` or a plain path (made absolute).

    Raises:
        ConfigError: nothing, another scheme, or a URL that lacks a slash or its bucket.
    """
    scheme, rest = parse_store(str(url))
    if scheme == "s3":
        from infra.storage.s3 import S3Store

        return S3Store(f"s3://{rest}")
    return FolderStore(Path(rest))


def parse_store(text: str, setting: str = "--store") -> tuple[str, str]:
    """("s3", "bucket/prefix") or ("file", path), from what `setting` says.

    A scheme without its two slashes is refused: it is what `Path` makes of a URL, and would name a folder `s3:`.

    Raises:
        ConfigError: as `open_store`.
    """
    said = f"{setting} {text}".strip()
    scheme, separator, rest = text.partition(":")
    scheme = scheme.strip().lower()
    if not text.strip():
        raise ConfigError(f"{setting} is empty: name a folder or s3://bucket/prefix")
    if found := re.match(r"(s3|file)//+", text.strip(), re.IGNORECASE):
        raise ConfigError(f"{said}: a colon is missing; write it as {found[1].lower()}:{text.strip()[found.end(1) :]}")
    if not separator or not (rest.startswith("/") or scheme in ("s3", "file")) or "/" in scheme:
        return "file", text  # a folder, colons in its name or not
    if scheme == "file" and rest.startswith("/"):
        host, _, path = rest.removeprefix("//").partition("/") if rest.startswith("//") else ("", "", rest.lstrip("/"))
        if host in ("", "localhost"):
            return "file", f"/{unquote(path)}"
        raise ConfigError(f"{said}: {host} stands where a host does; write file:///{host}/{path}, or no file:// at all")
    if scheme not in ("s3", "file"):
        raise ConfigError(f"{said}: unknown scheme {scheme}://; use a folder or s3://bucket/prefix")
    if scheme == "file" or not rest.startswith("//"):
        right = "s3://bucket/prefix" if scheme == "s3" else "file:///folder"
        raise ConfigError(f"{said}: a folder by that name would be made; write it as {right}")
    bucket = rest.removeprefix("//").partition("/")[0]
    if not bucket:
        raise ConfigError(f"{said}: no bucket; write it as s3://bucket/prefix")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,255}|arn:[\w:.-]+", bucket):
        raise ConfigError(f"{said}: {bucket!r} cannot be a bucket's name; write it as s3://bucket/prefix")
    return "s3", rest.removeprefix("//")


def default_store() -> str:
    """Where runs are kept when nobody says otherwise: absolute, because jobs run in a copy of the working folder."""
    return str(Path.home() / ".recua" / "store")
