"""Snapshots from host memory to a store (a folder or S3), beside the training.

    snapshots/RUN/GENERATION-STEP/SHARD            the file as it lies in memory
    snapshots/RUN/GENERATION-STEP/SHARD.layout     its description
    snapshots/RUN/GENERATION-STEP/SHARD.receipt    {"bytes", "sha256", "layout_sha256"}: both are there
    snapshots/RUN/manifests/GENERATION-STEP        all receipts: the snapshot exists

Every rank uploads its own shard and then its receipt; a rank that sees all receipts writes the manifest, once
(`put_if_absent`). Readers go by manifests alone, so a crash at any byte leaves a snapshot that does not exist.
Retention removes a manifest before its shards.
"""

import hashlib
import json
import logging
import queue
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from engines.snapshots.memory import Reach, unheard
from engines.snapshots.shard import Layout, Shard, ShardName, open_shard
from infra.errors import CheckpointError
from infra.storage import Store
from infra.storage.files import Moved, sha256_file, unseen

log = logging.getLogger(__name__)

RECEIPT, LAYOUT = ".receipt", ".layout"


class Flusher:
    """Uploads one rank's sealed shards, one at a time, in a thread.

    Args:
        reading: `Snapshots.reading`, which keeps a file from being recycled.
        keep: complete snapshots that stay in the store.
        reach: of "flush", where a shard is in the store and its receipt is not.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        reading: Callable[[int], AbstractContextManager[Path | None]],
        *,
        keep: int = 2,
        reach: Reach = unheard,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep {keep}: at least one snapshot stays in the store")
        self.store, self.run, self.keep = store, run, keep
        self.flushed: list[int] = []
        """Steps whose shard of this rank is in the store."""
        self.problems: list[str] = []
        """Store errors; a later flush starts afresh."""
        self._reading, self._reach = reading, reach
        self._steps: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._work, name="flush", daemon=True)
        self._thread.start()

    def offer(self, step: int) -> bool:
        """Begin to upload the sealed snapshot `step`; False while an earlier one is under way.

        All ranks should offer the same steps, rarely enough for the store: a snapshot that a rank left out stays
        incomplete, and is removed with the next complete one.
        """
        if not self._idle.is_set():
            return False
        self._idle.clear()
        self._steps.put(step)
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until nothing is under way."""
        return self._idle.wait(timeout_s)

    def close(self, wait: bool = True) -> None:
        """Take no more; what is under way is finished, here or (`wait=False`) in the background."""
        self._steps.put(None)
        if wait:
            self._thread.join()

    def _work(self) -> None:
        while (step := self._steps.get()) is not None:
            try:
                with self._reading(step) as path:
                    if path is not None:
                        upload(self.store, self.run, path, self.keep, self._reach)
                        self.flushed.append(step)
            except Exception as error:  # the next one may get there
                log.warning("snapshot %d of run %s is not in the store: %r", step, self.run, error)
                self.problems.append(f"step {step}: {error}")
            finally:
                self._idle.set()


def upload(store: Store, run: str, path: Path, keep: int, reach: Reach = unheard) -> None:
    """One sealed shard; the last rank to come completes the snapshot and removes older ones.

    Raises:
        StoreError: the store failed; nothing of this snapshot will be read.
        CheckpointError: the shard is damaged.
    """
    name = ShardName.parse(path.name)
    assert name is not None, path
    shard = open_shard(path)  # what is damaged in memory must not look whole in the store
    layout = shard.layout.encode()
    key = f"{_folder(run, name)}/{name}"
    store.upload_file(key, path)
    store.put(key + LAYOUT, layout)
    reach("flush", name.rank, name.step)
    receipt = {
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "layout_sha256": hashlib.sha256(layout).hexdigest(),
    }
    store.put(key + RECEIPT, json.dumps(receipt).encode())
    if complete(store, run, name):
        prune(store, run, keep)


def complete(store: Store, run: str, name: ShardName) -> bool:
    """Write the manifest if every rank's receipt is there; True if it is there now."""
    folder = _folder(run, name)
    keys = [key for key in store.list(folder) if key.endswith(RECEIPT)]
    if len(keys) < name.world_size:
        return False
    receipts = {key.rpartition("/")[2].removesuffix(RECEIPT): json.loads(store.get(key) or b"null") for key in keys}
    if None in receipts.values():
        return False
    store.put_if_absent(_manifest(run, name), json.dumps({"format": 1, "shards": receipts}, sort_keys=True).encode())
    return True


def prune(store: Store, run: str, keep: int) -> None:
    """Remove all but the newest `keep` snapshots, and incomplete ones older than those."""
    manifests = sorted(store.list(f"snapshots/{run}/manifests"))
    for key in manifests[:-keep]:
        store.delete(key)
    oldest = manifests[-keep:][0].rpartition("/")[2] if manifests else ""
    for folder in list(store.folders(f"snapshots/{run}")):
        if folder != "manifests" and folder < oldest:
            for key in list(store.list(f"snapshots/{run}/{folder}")):
                store.delete(key)


class StoreSource:
    """The complete snapshots of a run in a store, as a `sources.Source`.

    Args:
        scratch: a local folder with room for the shards that this rank needs.
    """

    def __init__(self, store: Store, run: str, scratch: Path) -> None:
        self.store, self.run, self.scratch = store, run, scratch
        self._receipts: dict[ShardName, dict[str, Any]] = {}

    def __str__(self) -> str:
        return f"store {self.store.url}"

    def names(self) -> list[ShardName]:
        for key in self.store.list(f"snapshots/{self.run}/manifests"):
            try:
                shards = json.loads(self.store.get(key) or b"")["shards"]
            except (ValueError, KeyError, TypeError):  # gone by now, or damaged: as if it were not there
                continue
            for text, receipt in shards.items():
                name = ShardName.parse(text)
                if name is not None:
                    self._receipts[name] = receipt
        return sorted(self._receipts)

    def layout(self, name: ShardName) -> Layout:
        content = self.store.get(f"{_folder(self.run, name)}/{name}{LAYOUT}")
        if content is None or hashlib.sha256(content).hexdigest() != self._receipts[name]["layout_sha256"]:
            raise CheckpointError(f"{self}: the description of {name} is missing or damaged")
        return Layout.decode(content)

    def open(self, name: ShardName, moved: Moved = unseen) -> Shard:
        self.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            target = Path(folder) / str(name)
            key = f"{_folder(self.run, name)}/{name}"
            self.store.download_file(key, target, self._receipts[name]["sha256"], moved)
            return open_shard(target)  # mapped: it outlives its name


def _folder(run: str, name: ShardName) -> str:
    return f"snapshots/{run}/{_key(name)}"


def _manifest(run: str, name: ShardName) -> str:
    return f"snapshots/{run}/manifests/{_key(name)}"


def _key(name: ShardName) -> str:
    return f"{name.generation:05d}-{name.step:010d}"
