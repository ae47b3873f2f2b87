"""Folders between nodes without a shared file system: the inputs of ranks on many nodes, and their model."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from infra.errors import StoreError
from infra.storage import Store
from infra.storage.files import sha256_file

FOLDER = "model"
LIST = "model.json"


class Stored(Protocol):
    """A folder that any node can fetch (an artifact of the graph)."""

    def path(self) -> Path:
        """Its path on this node, whole and checked. Raises StoreError."""
        ...


Folder = Path | Stored


def local(folder: Folder) -> Path:
    """The path of `folder` on this node; a stored folder is fetched if necessary. Raises StoreError."""
    return folder if isinstance(folder, Path) else folder.path()


def hand_over(save: Callable[[Path], None], store: Store, uploads: bool) -> None:
    """(collective if `save` is) Save into a folder of this node; with `uploads`, upload it to `store`.

    Raises:
        StoreError: the store fails.
    """
    with tempfile.TemporaryDirectory(prefix="recua-model-") as name:
        folder = Path(name)
        save(folder)
        if not uploads:
            return
        files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
        for relative, file in files.items():
            store.upload_file(f"{FOLDER}/{relative}", file)
        listed = {relative: sha256_file(file) for relative, file in files.items()}
        store.put(LIST, (json.dumps(listed, indent=1) + "\n").encode())


def take_over(store: Store, folder: Path) -> None:
    """Download the folder that `hand_over` uploaded to `store`.

    Raises:
        StoreError: a file is missing or damaged.
    """
    content = store.get(LIST)
    if content is None:
        raise StoreError(f"{store.url}/{LIST}: the model was not handed over")
    for relative, digest in json.loads(content).items():
        store.download_file(f"{FOLDER}/{relative}", folder / relative, digest)
