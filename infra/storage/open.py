"""Object storage: one small protocol, a folder or `s3://bucket/prefix` behind it.

Keys are relative, `/`-separated paths. The rest of recua builds on `put_if_absent`: of any number of writers of one
key, in any number of processes on any number of nodes, exactly one succeeds, and a reader sees either nothing or the
whole object. A folder implements it by a complete temporary file and `link(2)`; S3 by a conditional PUT
(`If-None-Match: *`).
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
        ConfigError: an empty text, another scheme, or a URL without its slashes or its bucket.
    """
    scheme, rest = parse_store(str(url))
    if scheme == "s3":
        from infra.storage.s3 import S3Store

        return S3Store(f"s3://{rest}")
    return FolderStore(Path(rest))


def parse_store(text: str, setting: str = "--store") -> tuple[str, str]:
    """("s3", "bucket/prefix") or ("file", path) from `text`, the value of `setting`.

    A scheme without its two slashes is refused: `Path` turns a URL into that, and it would name a folder `s3:`.

    Raises:
        ConfigError: as `open_store`.
    """
    given = f"{setting} {text}".strip()
    scheme, separator, rest = text.partition(":")
    scheme = scheme.strip().lower()
    if not text.strip():
        raise ConfigError(f"{setting} is empty: name a folder or s3://bucket/prefix")
    if found := re.match(r"(s3|file)//+", text.strip(), re.IGNORECASE):
        raise ConfigError(f"{given}: a colon is missing; write it as {found[1].lower()}:{text.strip()[found.end(1) :]}")
    if not separator or not (rest.startswith("/") or scheme in ("s3", "file")) or "/" in scheme:
        return "file", text  # a folder, colons in its name or not
    if scheme == "file" and rest.startswith("/"):
        host, _, path = rest.removeprefix("//").partition("/") if rest.startswith("//") else ("", "", rest.lstrip("/"))
        if host in ("", "localhost"):
            return "file", f"/{unquote(path)}"
        raise ConfigError(f"{given}: {host} is read as a host; write file:///{host}/{path}, or leave file:// out")
    if scheme not in ("s3", "file"):
        raise ConfigError(f"{given}: unknown scheme {scheme}://; use a folder or s3://bucket/prefix")
    if scheme == "file" or not rest.startswith("//"):
        right = "s3://bucket/prefix" if scheme == "s3" else "file:///folder"
        raise ConfigError(f"{given}: this would create a folder of that name; write it as {right}")
    bucket = rest.removeprefix("//").partition("/")[0]
    if not bucket:
        raise ConfigError(f"{given}: no bucket; write it as s3://bucket/prefix")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,255}|arn:[\w:.-]+", bucket):
        raise ConfigError(f"{given}: {bucket!r} cannot be a bucket's name; write it as s3://bucket/prefix")
    return "s3", rest.removeprefix("//")


def default_store() -> str:
    """The default folder of runs. Absolute, because jobs run in a copy of the working folder."""
    return str(Path.home() / ".recua" / "store")
