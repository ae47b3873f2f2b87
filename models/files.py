"""Model folders that appear whole or not at all, and checks of the files in a folder."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import CheckpointError
from infra.storage.files import LFS_POINTER, sync_file, sync_folder


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        CheckpointError: the file is missing, a Git LFS pointer, or not a JSON object in UTF-8.
    """
    refuse_pointer(file)
    try:
        tree = json.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        hint = "save it as UTF-8 without a byte order mark" if "BOM" in str(error) else str(error)
        raise CheckpointError(f"{file}: not valid JSON: {hint}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return tree


def refuse_pointer(file: Path) -> None:
    """Raises CheckpointError if the file is a Git LFS pointer or a link to nothing (the Hub's cache consists of links).
    Passes if there is no file."""
    if file.is_symlink() and not file.exists():
        raise CheckpointError(
            f"{file} is a link to {os.readlink(file)}, which does not exist: copy the folder with the files that its "
            "links lead to (cp -L), or download it again"
        )
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except OSError:
        return
    if start == LFS_POINTER:
        raise CheckpointError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` there")


def refuse_adapter(folder: Path) -> None:
    """Raises CheckpointError if a folder holds a PEFT adapter, because libraries load such folders differently."""
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds an adapter (adapter_config.json), which is only part of a model: merge it into its base "
            "(PEFT's merge_and_unload) and name the folder of the merged model; if these weights are a whole model, "
            "remove adapter_config.json and adapter_model.safetensors"
        )


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder beside `folder` to fill; on success its files move into `folder`, config.json last.

    No library loads a model without config.json, so a reader sees no model or a whole one. `folder` may exist: an
    earlier model's config.json is removed first, then its weight files (stale shards would be read); other files stay.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    filling = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    filling.mkdir()
    try:
        yield filling
        files = sorted(filling.iterdir(), key=lambda file: file.name == "config.json")
        for file in files:
            sync_file(file)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        for stale in folder.glob("*.safetensors*"):
            stale.unlink()
        for file in files:
            file.replace(folder / file.name)
        sync_folder(folder)
    finally:
        shutil.rmtree(filling, ignore_errors=True)
