"""One Ray actor per node: a NodeWatch that the controller can call, and the node's part of the accounts.

Who waits for whom: the controller keeps one `listen` open per agent; an agent waits for nobody. An agent that nobody
listens to for `orphan_s` has lost its controller for good: it ends the workers of its node, and itself.
"""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.exporter import Exporter, export_account
from cluster.goodput_records import PERIOD_S, write_node
from cluster.node_watch import Beat, NodeWatch
from infra.errors import StoreError
from infra.notices import NoticeSettings, NoticeWatch, sources
from infra.storage import open_store

GOING_S = 2.0
"""How long workers that were told to go may take before they are killed."""


@dataclass(frozen=True)
class AgentPlace:
    """What an agent is told at its start. `accounts`: (store URL, run id, group) for the goodput records and the
    stacks of killed ranks, or None."""

    group: str
    node: str
    folder: Path
    orphan_s: float = 60.0
    accounts: tuple[str, str, str] | None = None
    living: tuple[str, ...] = ()
    """Nodes of the cluster: what the group has in this machine's memory under another node's name is taken over."""
    notices: NoticeSettings = field(default_factory=NoticeSettings)


class NodeAgent:
    """A plain class; cluster.fleet makes the actors. Its methods run in threads of their own."""

    def __init__(self, place: AgentPlace) -> None:
        self.place = place
        inherit(place.folder, place.living)
        self._watch = NodeWatch(place.node, place.folder)
        self._notices = NoticeWatch(sources(place.node, place.notices))
        self._heard_at = time.monotonic()
        self._ended = threading.Event()
        self._store = None if place.accounts is None else open_store(place.accounts[0])
        self._exporter = Exporter("" if place.accounts is None else place.accounts[1], place.group)
        threading.Thread(target=self._keep, name="keeper", daemon=True).start()

    def listen(self, after: int, timeout_s: float, first_row: int = 0, row_floor: int = 0) -> Beat:
        """See NodeWatch.wait."""
        self._heard_at = time.monotonic()
        return replace(self._watch.wait(after, timeout_s, first_row, row_floor), notice=self._notices.earliest())

    def kill(self, workers: Collection[str], reason: str) -> dict[str, str]:
        """SIGKILL, after their stacks were taken: {worker: where the stacks are (or the stacks themselves)}."""
        stacks = self._watch.kill(workers)
        if self._store is None or self.place.accounts is None:
            return stacks
        places = {}
        for worker, text in stacks.items():
            key = f"runs/{self.place.accounts[1]}/stacks/{self.place.group}-{worker}.txt"
            try:
                self._store.put(key, f"{worker} was killed: {reason}\n\n{text}\n".encode())
                places[worker] = key
            except StoreError as error:
                places[worker] = f"{error}\n{text}"
        return places

    def discard(self, workers: Collection[str]) -> None:
        """These deaths are known."""
        self._watch.discard(workers)

    def close(self, remove: bool) -> None:
        """The group has ended: no worker lives on, the accounts are written, the memory is freed where asked."""
        self._ended.set()
        self._notices.close()
        if not self._await_deaths(GOING_S):
            self._watch.end(self._watch.workers())
            self._await_deaths(GOING_S)
        self._write(last=True)
        self._watch.close(remove)
        with contextlib.suppress(OSError):  # others may have something there
            self.place.folder.parent.rmdir()

    def _await_deaths(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self._watch.workers() and time.monotonic() < deadline:
            time.sleep(0.005)
        return not self._watch.workers()

    def _keep(self) -> None:
        """Write the account now and then; notice that the controller is gone."""
        slice_s = min(PERIOD_S, self.place.orphan_s / 4)
        while not self._ended.wait(slice_s):
            self._write()
            if time.monotonic() - self._heard_at > self.place.orphan_s:
                self.close(remove=False)
                os._exit(0)

    def _write(self, last: bool = False) -> None:
        account = self._watch.account()
        export_account(self._exporter, account)
        if self._store is not None and self.place.accounts is not None:
            _, run, group = self.place.accounts
            try:
                write_node(self._store, run, group, account, last)
            except StoreError:
                return  # the next write says everything again


def inherit(folder: Path, living: Collection[str]) -> None:
    """Take over the shards that nodes before this one left in the machine's memory (Ray was started again here).

    What is still of a living node, or of a living process, stays where it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {f"recua-node-{node[:16]}" for node in living}
    for other in folder.parent.parent.glob(f"recua-node-*/{folder.name}"):
        if other == folder or other.parent.name in names:
            continue
        heirs = [*other.glob("*.shard")]
        for path in heirs:
            path.rename(folder / path.name)
        beacons = other / "beacons"
        for path in beacons.glob("*.beacon"):
            (folder / "beacons").mkdir(exist_ok=True)
            path.rename(folder / "beacons" / path.name)
        shutil.rmtree(other, ignore_errors=True)
        with contextlib.suppress(OSError):
            other.parent.rmdir()
