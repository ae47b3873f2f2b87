"""A model folder that is there whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder beside `folder` to fill; on success its files move into `folder`, config.json last.

    A model without config.json does not load anywhere, so a reader sees no model, or a whole one. `folder` may exist:
    an earlier model's config.json goes first, then its weight files (stale shards would be read); other files stay.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    filling = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    filling.mkdir()
    try:
        yield filling
        files = sorted(filling.iterdir(), key=lambda file: file.name == "config.json")
        for file in files:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        folder.mkdir(exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        for stale in folder.glob("*.safetensors*"):
            stale.unlink()
        for file in files:
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(filling, ignore_errors=True)
