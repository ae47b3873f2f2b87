"""Folders between nodes that share no file system: what a step reads on many nodes, what a rank leaves for the step."""

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
    """A folder that any node can bring to itself (an artifact of the graph)."""

    def path(self) -> Path:
        """Where it lies on this node, whole and checked. Raises StoreError."""
        ...


Folder = Path | Stored


def local(folder: Folder) -> Path:
    """Where `folder` lies on this node: a path as it is, anything else fetched if need be. Raises StoreError."""
    return folder if isinstance(folder, Path) else folder.path()


def hand_over(save: Callable[[Path], None], store: Store, uploads: bool) -> None:
    """(collective where `save` is) Save into a folder of this node, and bring that to `store` where `uploads`.

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
    """The other end of `hand_over`.

    Raises:
        StoreError: a file is missing or damaged.
    """
    content = store.get(LIST)
    if content is None:
        raise StoreError(f"{store.url}/{LIST}: the model was not handed over")
    for relative, digest in json.loads(content).items():
        store.download_file(f"{FOLDER}/{relative}", folder / relative, digest)
