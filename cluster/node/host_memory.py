"""What groups hold in a machine's memory, whose it is, and when nobody needs it any more.

    /dev/shm/recua-node-NODE/recua-GROUP/      shards, beacons/, fetched/
        owner.json     which run's it is, see Owner
        pulse          touched by the node's agent as long as it lives

No process owns these files: a run that lost all its processes resumes from them without a lost step. So they are needed
as long as their run may resume, and what a crash left of ended runs is found here: by every node agent when it starts,
and by `recua gc`. Nothing goes that a living process uses, or whose run may still be resumed, or of which that cannot
be told.
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
"""A folder counts as used for so long after its agent's last touch, even if none of its processes can be seen."""
NAMELESS_S = 3600.0
"""So long must nothing have happened in a folder that names no owner."""
ORPHANED = 3
"""Exit status of a worker that nobody watches any more."""

Standing = Literal["open", "stopped", "over"]
"""Of a run: it runs (or its driver is lost), it has ended and can be resumed, it is finished or removed."""
AskStanding = Callable[[str, str], Standing]
"""(store URL, run id) -> standing. Raises StoreError if that cannot be told."""


@dataclass(frozen=True)
class Owner:
    """`journal`: the group's file in its state folder, which goes when the run needs nothing of it any more; empty
    if this machine never saw it. `device`: the file system that it was on. `leader`: the controller's number."""

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
    """One group's folder on this machine. `reason` says in words why it is needed, or why not."""

    folder: Path
    group: str
    run: str
    size: int
    needed: bool
    reason: str


def node_root(node: str, shared: Path = SHARED) -> Path:
    """Where everything of one Ray node lies in its machine's memory (several nodes may share a machine in tests)."""
    return shared / f"recua-node-{node[:16]}"


def group_folder(node: str, group: str, shared: Path = SHARED) -> Path:
    """Where everything of one group lies on a node."""
    return node_root(node, shared) / f"recua-{group}"


def claim(
    folder: Path, group: str, journal: Path | None, accounts: tuple[str, str, str] | None = None, leader: int = 0
) -> None:
    """Say whose the folder is, in the name of this process, the node's agent."""
    store, run, _ = accounts or ("", "", "")
    seen, device = "", 0
    if journal is not None and journal.exists():
        seen, device = str(journal), os.stat(journal).st_dev
    start = process_start(os.getpid()) or ""
    owner = Owner(group, seen, device, store, run, this_machine(), os.getpid(), start, leader)
    write_text(folder / OWNER, json.dumps({"format": FORMAT, **asdict(owner)}) + "\n")
    touch(folder)


def owner_of(folder: Path) -> Owner | None:
    """None if it names none that this version can read."""
    try:
        tree = json.loads((folder / OWNER).read_text())
        if tree.pop("format") != FORMAT:
            return None
        return Owner(**tree)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def agent_lives(owner: Owner) -> bool:
    """As far as this machine's processes tell."""
    return owner.machine == this_machine() and process_start(owner.agent) == owner.agent_start


def touch(folder: Path) -> None:
    """The node's agent lives."""
    with contextlib.suppress(OSError):  # who writes more than this will see that the memory is full or gone
        (folder / PULSE).touch()


def end_when_unwatched(folder: Path, patience_s: float) -> None:
    """For a worker: end this process when no agent has touched its node's folder for `patience_s`.

    Agents end workers that nobody leads; this is for those whose agent died too.
    """

    def watch() -> None:
        seen, since = _touched(folder), time.monotonic()  # a clock that stands still while the machine sleeps
        while True:
            time.sleep(min(1.0, patience_s / 4))
            touched = _touched(folder)
            if touched != seen:
                seen, since = touched, time.monotonic()
            elif time.monotonic() - since > patience_s:
                os._exit(ORPHANED)

    threading.Thread(target=watch, name="unwatched", daemon=True).start()


def living_workers(folder: Path) -> list[int]:
    """Process ids of a group's workers that live, by their beacons."""
    found = []
    with contextlib.suppress(OSError):  # others may remove it meanwhile
        for path in (folder / BEACONS).glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError, ValueError):
                record = BeaconReader(path).read()
                if process_start(record.pid) == str(record.started):
                    found.append(record.pid)
    return found


def survey(ask: AskStanding | None = None, shared: Path = SHARED) -> list[Held]:
    """Every group's folder on this machine, and whether it is needed. `ask` knows runs; without it only processes and
    journals count. Folders of other users, who cannot be asked, are left out."""
    found = []
    for folder in _folders(shared, "recua-node-*/recua-*"):
        with contextlib.suppress(OSError):  # it has gone meanwhile
            if _is_mine(folder):
                found.append(_judge(folder, ask))
    return found


def free(found: list[Held], shared: Path = SHARED) -> None:
    """Remove what is not needed, and the empty folders of nodes that were."""
    for held in found:
        if not held.needed:
            shutil.rmtree(held.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # others have something there
                held.folder.parent.rmdir()
    for root in _folders(shared, "recua-node-*"):
        with contextlib.suppress(OSError):
            if _is_mine(root) and not any(root.glob("recua-*")) and _idle_s(root) > NAMELESS_S:
                shutil.rmtree(root, ignore_errors=True)


def _folders(shared: Path, pattern: str) -> list[Path]:
    """Searched again if a folder vanishes meanwhile: in Python 3.11 that ends the search."""
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
    """Not there any more, though its file system is; or another group's, of a state folder that was made anew."""
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
    """Seconds since the epoch; 0 if nobody ever did."""
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
