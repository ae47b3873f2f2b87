"""The folders of groups in a machine's memory: their owners, and whether they are still needed.

    /dev/shm/recua-node-NODE/recua-GROUP/      shards, beacons/, fetched/
        owner.json     the run that it belongs to, see Owner
        pulse          touched by the node's agent while it lives

No process owns these files: a run that lost all its processes resumes from them without a lost step. So they are needed
as long as their run may resume. Every node agent at its start, and `recua gc`, remove what a crash left of ended runs.
A folder stays if a live process uses it, if its run may still be resumed, or if that is unknown.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cluster.node.beacons import SUFFIX, BeaconReader
from infra.errors import StoreError
from infra.processes import process_start, this_machine
from infra.storage.files import write_text

SHARED = Path("/dev/shm")
OWNER, PULSE, BEACONS = "owner.json", "pulse", "beacons"
FORMAT = 1
PULSE_FRESH_S = 60.0
"""A folder counts as used for this long after its agent's last touch, even if no process of it is visible."""
NAMELESS_S = 3600.0
"""A folder without an owner goes only after nothing has changed in it for this long."""
ORPHANED = 3
"""Exit status of a worker without an agent."""

Standing = Literal["open", "stopped", "over"]
"""A run runs (or lost its driver), has ended and can be resumed, or is finished or removed."""
AskStanding = Callable[[str, str], Standing]
"""(store URL, run id) -> standing. Raises StoreError if it cannot be read."""


@dataclass(frozen=True)
class Owner:
    """`journal`: the group's file in its state folder, which is removed when the run no longer needs it; empty if this
    machine never saw it. `device`: the file system of that file. `leader`: the controller's number."""

    group: str
    journal: str = ""
    device: int = 0
    store: str = ""
    run: str = ""
    machine: str = ""
    agent: int = 0
    agent_start: str = ""
    leader: int = 0


@dataclass(frozen=True)
class Held:
    """One group's folder on this machine. `reason`: why it is needed or not, for people."""

    folder: Path
    group: str
    run: str
    size: int
    needed: bool
    reason: str


def node_root(node: str, shared: Path = SHARED) -> Path:
    """The folder of one Ray node in its machine's memory (in tests several nodes may share a machine)."""
    return shared / f"recua-node-{node[:16]}"


def group_folder(node: str, group: str, shared: Path = SHARED) -> Path:
    """The folder of one group on a node."""
    return node_root(node, shared) / f"recua-{group}"


def claim(
    folder: Path, group: str, journal: Path | None, accounts: tuple[str, str, str] | None = None, leader: int = 0
) -> None:
    """Write the folder's owner, as this process, the node's agent."""
    store, run, _ = accounts or ("", "", "")
    seen, device = "", 0
    if journal is not None and journal.exists():
        seen, device = str(journal), os.stat(journal).st_dev
    start = process_start(os.getpid()) or ""
    owner = Owner(group, seen, device, store, run, this_machine(), os.getpid(), start, leader)
    write_text(folder / OWNER, json.dumps({"format": FORMAT, **asdict(owner)}) + "\n")
    touch(folder)


def owner_of(folder: Path) -> Owner | None:
    """The folder's owner; None if this version can read none."""
    try:
        tree = json.loads((folder / OWNER).read_text())
        if tree.pop("format") != FORMAT:
            return None
        return Owner(**tree)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def agent_lives(owner: Owner) -> bool:
    """Whether the owner's agent lives, judged by this machine's processes."""
    return owner.machine == this_machine() and process_start(owner.agent) == owner.agent_start


def touch(folder: Path) -> None:
    """Show that the node's agent lives."""
    with contextlib.suppress(OSError):  # larger writes will report a full or missing memory
        (folder / PULSE).touch()


def end_when_unwatched(folder: Path, patience_s: float) -> None:
    """For a worker: end this process when no agent has touched its node's folder for `patience_s`.

    Agents end workers without a controller; this is for workers whose agent died too.
    """

    def watch() -> None:
        seen, since = _touched(folder), time.monotonic()  # a clock that stops while the machine sleeps
        while True:
            time.sleep(min(1.0, patience_s / 4))
            touched = _touched(folder)
            if touched != seen:
                seen, since = touched, time.monotonic()
            elif time.monotonic() - since > patience_s:
                os._exit(ORPHANED)

    threading.Thread(target=watch, name="unwatched", daemon=True).start()


def living_workers(folder: Path) -> list[int]:
    """Process ids of a group's live workers, from their beacons."""
    found = []
    with contextlib.suppress(OSError):  # another process may remove it meanwhile
        for path in (folder / BEACONS).glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError, ValueError):
                record = BeaconReader(path).read()
                if process_start(record.pid) == str(record.started):
                    found.append(record.pid)
    return found


def survey(ask: AskStanding | None = None, shared: Path = SHARED) -> list[Held]:
    """Every group's folder on this machine, and whether it is needed. `ask` knows runs; without it only processes and
    journals count. Folders of other users are left out."""
    found = []
    for folder in _folders(shared, "recua-node-*/recua-*"):
        with contextlib.suppress(OSError):  # it was removed meanwhile
            if _is_mine(folder):
                found.append(_judge(folder, ask))
    return found


def free(found: list[Held], shared: Path = SHARED) -> None:
    """Remove folders that are not needed, and the empty folders of former nodes."""
    for held in found:
        if not held.needed:
            shutil.rmtree(held.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # others have files there
                held.folder.parent.rmdir()
    for root in _folders(shared, "recua-node-*"):
        with contextlib.suppress(OSError):
            if _is_mine(root) and not any(root.glob("recua-*")) and _idle_s(root) > NAMELESS_S:
                shutil.rmtree(root, ignore_errors=True)


def _folders(shared: Path, pattern: str) -> list[Path]:
    """Matching folders; repeats the search if a folder vanishes, which ends it in Python 3.11."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            return sorted(shared.glob(pattern))
    return []


def _judge(folder: Path, ask: AskStanding | None) -> Held:
    owner = owner_of(folder)
    reason, needed = _why(folder, owner, ask)
    group, run = (folder.name.removeprefix("recua-"), "") if owner is None else (owner.group, owner.run)
    return Held(folder, group, run, sum(_sizes(folder)), needed, reason)


def _why(folder: Path, owner: Owner | None, ask: AskStanding | None) -> tuple[str, bool]:
    here = owner is None or owner.machine == this_machine()
    if here and (pids := living_workers(folder)):
        return f"process {pids[0]} works with it", True
    if owner is None:
        idle = _idle_s(folder) > NAMELESS_S
        return ("names no owner, and no process works with it" if idle else "names no owner yet"), not idle
    if agent_lives(owner):
        return f"its node's agent lives (process {owner.agent})", True
    if time.time() - _touched(folder) < PULSE_FRESH_S:
        return "its node's agent lived a moment ago", True
    if owner.journal and _journal_is_gone(owner):
        return "its pretraining has ended: its journal is gone", False
    if owner.run and ask is not None:
        try:
            standing = ask(owner.store, owner.run)
        except StoreError as error:
            return f"it cannot be told whether run {owner.run} goes on: {error}", True
        if standing == "over":
            return f"run {owner.run} is finished or removed", False
    return f"{f'run {owner.run}' if owner.run else 'its run'} may go on from it", True


def _journal_is_gone(owner: Owner) -> bool:
    """Whether the journal is missing although its file system exists, or belongs to another group (a new state)."""
    path = Path(owner.journal)
    try:
        return bool(json.loads(path.read_text())["group"] != owner.group)
    except FileNotFoundError:
        there = next(folder for folder in path.parents if folder.exists())
        return os.stat(there).st_dev == owner.device
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_mine(folder: Path) -> bool:
    try:
        return folder.stat().st_uid == os.getuid()
    except OSError:
        return False


def _touched(folder: Path) -> float:
    """Seconds since the epoch of the last touch; 0 if there was none."""
    try:
        return (folder / PULSE).stat().st_mtime
    except OSError:
        return 0.0


def _idle_s(folder: Path) -> float:
    times = [folder.stat().st_mtime] if folder.exists() else []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return time.time() - max(times, default=0.0)


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            yield path.stat().st_blocks * 512
