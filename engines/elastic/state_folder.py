"""Saved training states on disk: whole and verified, or not there.

A state is written to `<name>.partial`, gets a manifest with every file's size and SHA-256, and is renamed. A crash at
any byte leaves a `.partial` folder that nothing reads. A state whose files no longer match is refused, and the one
before it is taken.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from infra.errors import CheckpointError
from infra.storage import sha256_file, sync_folder

MANIFEST = "manifest.json"
FORMAT = 1


def state_path(root: Path, step: int) -> Path:
    """Where the state before step `step` lives."""
    return root / f"step-{step:010d}"


def saved_steps(root: Path) -> list[int]:
    """Steps with a complete state, oldest first. Reads names only."""
    if not root.is_dir():
        return []
    names = [re.fullmatch(r"step-(\d{10})", entry.name) for entry in root.iterdir()]
    return sorted(int(match[1]) for match in names if match and (root / match[0] / MANIFEST).is_file())


def newest_verified(root: Path) -> tuple[int, Path] | None:
    """The newest state whose files match their manifest, or None. Damaged ones are skipped."""
    for step in reversed(saved_steps(root)):
        folder = state_path(root, step)
        try:
            verify(folder)
        except CheckpointError:
            continue
        return step, folder
    return None


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` states, and what interrupted saves left."""
    for step in saved_steps(root)[:-keep]:
        shutil.rmtree(state_path(root, step))
    for leftover in [*root.glob("*.partial"), *root.glob("*.replaced")]:
        shutil.rmtree(leftover)


def partial(folder: Path) -> Path:
    """The name under which `folder` is written."""
    return folder.with_name(folder.name + ".partial")


def checksums(folder: Path, names: Iterable[str]) -> dict[str, list]:
    """File name -> [size in bytes, SHA-256 hex]."""
    return {name: [(folder / name).stat().st_size, sha256_file(folder / name)] for name in sorted(names)}


def seal(folder: Path, files: Mapping[str, list]) -> None:
    """Write the manifest into `folder`'s partial form, make it durable, give it its name."""
    draft = partial(folder)
    with (draft / MANIFEST).open("w") as out:
        json.dump({"format": FORMAT, "files": dict(files)}, out, indent=1, sort_keys=True)
        out.flush()
        os.fsync(out.fileno())
    sync_folder(draft)
    if folder.exists():
        replaced = folder.with_name(folder.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        draft.rename(folder)
        shutil.rmtree(replaced)
    else:
        draft.rename(folder)
    sync_folder(folder.parent)


def verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: no manifest, another format, a file is missing or differs.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"state {folder}: no readable {MANIFEST}") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"state {folder}: format {manifest.get('format')}, this version reads {FORMAT}")
    for name, (size, digest) in manifest["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or sha256_file(file) != digest:
            raise CheckpointError(f"state {folder}: {name} is missing or damaged")
