"""A node agent's watch over the ranks on its node, from outside them.

Who waits for whom: one thread looks at every beacon and process about every `period_s` and sleeps on the processes'
pidfds in between, so that it sees any death at once. A caller of `wait` is woken if a rank has died or changed its
state, and otherwise at intervals; the answer is the node's beat. Nothing here waits for a rank.

A stopped process is known by its state in the kernel, a locked interpreter by its pulse. Time in which this process had
no processor does not count against a pulse.
"""

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.goodput.accounts import NodeAccount, RankAccount
from cluster.goodput.stopwatch import last_sign, read_account
from cluster.node.beacons import ROWS, SUFFIX, BeaconReader, Record
from cluster.node.health_watch import Reading
from cluster.node.wire_speed import SinkAddress
from infra.notices import Notice
from infra.processes import ExitWatch, process_start, process_state, starved_s

SHARD = re.compile(r"generation-(\d{5})\.step-(\d{10})\.rank-(\d{5})-of-(\d{5})\.shard")
"""Names of engines.snapshots, which this layer does not import; a test compares the two."""
Shard = tuple[int, int, int, int]
"""(generation, step, rank, world size) of a sealed shard in this node's memory."""
SCAN_PERIOD_S = 0.05
PROGRESS_PERIOD_S = 0.1
"""Ordinary progress wakes a waiting caller at most this often, in seconds."""
ROWS_A_BEAT = 4096
KEPT_ROWS = 1 << 20
"""Outcomes of steps that are kept until a controller asks for them (about 300 bytes each)."""
STOPPED_AFTER_S = 0.1
"""How long the kernel must call a process stopped (a debugger stops one for less)."""
STILL_S = 1.0
"""A pulse that is less late than this is not booked."""


@dataclass(frozen=True)
class Sight:
    """One rank as it is now. Ages in seconds; `pulse_age` is infinite for a stopped process."""

    worker: str
    alive: bool
    record: Record
    phase_age: float = 0.0
    pulse_age: float = 0.0
    starved_s: float = 0.0
    """Total seconds that its training thread has waited for a processor."""
    out_s: float = 0.0
    """Seconds since it died, was stopped or locked up; 0 if it did not."""
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """See cluster.node.beacons.NOTES."""


@dataclass(frozen=True)
class Beat:
    """A node's report. `number` grows; `rows`: outcomes of steps (see cluster.node.beacons), in order without a gap."""

    node: str
    number: int
    sights: tuple[Sight, ...] = ()
    shards: tuple[Shard, ...] = ()
    rows: tuple[Mapping[str, Any], ...] = ()
    notice: Notice | None = None
    """The notice that the node will leave."""
    sent_at: float = 0.0
    """Seconds since the epoch; 0 if unknown."""
    health: Reading = field(default_factory=Reading)
    sink: SinkAddress | None = None
    """The sink for workers that measure the way to this node."""


class _Watched:
    """One beacon and its last reading."""

    def __init__(self, path: Path, now: float) -> None:
        self.path, self.reader = path, BeaconReader(path)
        self.record = self.reader.read()
        self.pid = self.record.pid
        self.died_at = None if process_start(self.pid) == str(self.record.started) else last_sign(self.reader.account)
        self.pidfd: int | None = None
        self._exit: ExitWatch | None = None
        if self.died_at is None:
            try:
                self.pidfd = os.pidfd_open(self.pid)
                self._exit = ExitWatch(self.pid)
            except ProcessLookupError:
                self.close()
                self.died_at = last_sign(self.reader.account)
        self.pulse, self.still_s = self.reader.pulse, 0.0
        self.stopped_since: float | None = None
        self.looked_at = now

    @property
    def still_since(self) -> float | None:
        """When it was stopped or its interpreter locked; None if it runs, or ran until it died."""
        if self.stopped_since is not None:
            return self.stopped_since
        return self.looked_at - self.still_s if self.still_s > STILL_S else None

    @property
    def ends(self) -> bool:
        return self._exit is not None and self._exit.ends()

    def close(self) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None
        if self._exit is not None:
            self._exit.close()
            self._exit = None


class RankWatch:
    """See the module's docstring.

    Args:
        folder: the group's folder in this node's shared memory: shards lie in it, beacons in its folder `beacons`.
        before: accounts of an earlier agent of this node; those of ranks that are not found here stay unchanged.
    """

    def __init__(self, node: str, folder: Path, *, period_s: float = 0.01, before: Sequence[RankAccount] = ()) -> None:
        self.node, self.folder, self.period_s = node, folder, period_s
        self._beacons = folder / "beacons"
        self._beacons.mkdir(parents=True, exist_ok=True)
        self._watched: dict[str, _Watched] = {}
        self._before = [replace(rank, gone=True) for rank in before]
        self._gone: list[RankAccount] = []
        self._kept: dict[int, Mapping[str, Any]] = {}
        self._news = threading.Condition()
        self._number, self._progress_at = 0, 0.0
        self._poll = select.poll()
        self._ended = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    def wait(self, after: int, timeout_s: float, first_row: int = 0, row_floor: int = 0) -> Beat:
        """The next beat after number `after`, at the latest in `timeout_s`. Its rows start at step `first_row` and are
        of generation `row_floor` or later."""
        with self._news:
            self._news.wait_for(lambda: self._number > after or self._failure is not None, timeout_s)
            if self._failure is not None:
                raise self._failure
            now, sent_at = time.monotonic(), time.time()
            watched = list(self._watched.values())
            sights = tuple(_sight(one, now) for one in watched)
            number = self._number
            rows = self._kept_from(first_row, row_floor)
        for one in watched:
            rows += one.reader.rows(first_row + len(rows), row_floor)
        del rows[ROWS_A_BEAT:]
        return Beat(self.node, number, sights, tuple(self.shards()), tuple(rows), sent_at=sent_at)

    def keep_rows(self) -> None:
        """Keep the outcomes in the beacons, which have room for the last `ROWS` only. For an agent without a
        controller; call it more often than they fill."""
        with self._news:
            newest = max(self._kept, default=0)
            for one in self._watched.values():
                until = one.reader.read().step
                oldest = until - ROWS * 3 // 4  # older rows may be overwritten while they are read
                for row in map(one.reader.row, range(max(0, oldest, newest), until)):
                    if row is not None and row["generation"] >= self._kept.get(row["step"], row)["generation"]:
                        self._kept[row["step"]] = row
            while len(self._kept) > KEPT_ROWS:
                del self._kept[next(iter(self._kept))]

    def _kept_from(self, first: int, floor: int) -> list[Mapping[str, Any]]:
        """The kept rows from `first` on without a gap; earlier ones have been sent."""
        for step in [step for step in self._kept if step < first]:
            del self._kept[step]
        rows: list[Mapping[str, Any]] = []
        while (row := self._kept.get(first + len(rows))) is not None and row["generation"] >= floor:
            rows.append(row)
        return rows

    def shards(self) -> list[Shard]:
        """The sealed shards in this node's memory, own ones and replicas."""
        found = []
        for name in os.listdir(self.folder):
            match = SHARD.fullmatch(name)
            if match:
                generation, step, rank, world = map(int, match.groups())
                found.append((generation, step, rank, world))
        return sorted(found)

    def kill(self, workers: Collection[str]) -> dict[str, str]:
        """SIGKILL workers; returns the stacks of the live ones, taken just before."""
        stacks = {}
        for one in self._named(workers):
            if one.died_at is None:
                stacks[one.reader.name] = read_stacks(one.pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGKILL)
        return stacks

    def end(self, workers: Iterable[str]) -> None:
        """SIGKILL workers without taking stacks."""
        for one in self._named(workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)

    @property
    def known(self) -> int:
        """The number of workers that have had a beacon here."""
        with self._news:
            return len(self._watched) + len(self._gone)

    def workers(self) -> list[str]:
        """The live workers."""
        with self._news:
            return [name for name, one in self._watched.items() if one.died_at is None]

    def discard(self, workers: Collection[str]) -> None:
        """Forget dead workers that the controller knows of; their accounts stay."""
        for one in self._named(workers):
            if one.died_at is not None:
                one.path.unlink(missing_ok=True)  # first, or it would be found again as a new beacon
                with self._news:
                    del self._watched[one.reader.name]
                self._gone.append(_account(one))
                one.close()

    def account(self) -> NodeAccount:
        """The ledgers of all ranks that have lived here."""
        with self._news:
            watched = list(self._watched.values())
        found = [*self._gone, *map(_account, watched)]
        names = {rank.worker for rank in found}
        return NodeAccount(self.node, (*(rank for rank in self._before if rank.worker not in names), *found))

    def close(self, remove: bool = False) -> None:
        """Stop watching; `remove` frees the group's memory on this node."""
        self._ended = True
        self._thread.join()
        for one in self._watched.values():
            one.close()
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _named(self, workers: Iterable[str]) -> list[_Watched]:
        with self._news:
            return [self._watched[name] for name in workers if name in self._watched]

    def _run(self) -> None:
        try:
            self._watch()
        except BaseException as error:  # raised again in wait()
            with self._news:
                self._failure = error
                self._news.notify_all()

    def _watch(self) -> None:
        scanned_at = looked_at = 0.0
        last = time.monotonic()
        while not self._ended:
            dead = {descriptor for descriptor, _ in self._poll.poll(self.period_s * 1000)}
            now = time.monotonic()
            ran_s = min(now - last, 3 * self.period_s)
            last = now
            urgent = self._bury(dead, now) or self._number == 0  # the first beat goes out at once
            if now - scanned_at > SCAN_PERIOD_S:
                scanned_at = now
                urgent |= self._find(now)
            asks_kernel = now - looked_at > STOPPED_AFTER_S / 2
            looked_at = now if asks_kernel else looked_at
            moved = False
            for one in list(self._watched.values()):
                if one.died_at is None:
                    changed, went_on = _look(one, now, ran_s, asks_kernel)
                    urgent, moved = urgent | changed, moved | went_on
            if urgent or (moved and now - self._progress_at > PROGRESS_PERIOD_S):
                self._progress_at = now
                with self._news:
                    self._number += 1
                    self._news.notify_all()

    def _bury(self, dead: Collection[int], now: float) -> bool:
        buried = False
        for one in list(self._watched.values()):
            if one.pidfd is not None and (one.pidfd in dead or one.ends):
                self._poll.unregister(one.pidfd)
                one.close()
                one.died_at, one.record = now, one.reader.read()
                buried = True
        return buried

    def _find(self, now: float) -> bool:
        found = False
        for name in os.listdir(self._beacons):
            worker = name.removesuffix(SUFFIX)
            if name.endswith(SUFFIX) and worker not in self._watched:
                try:
                    one = _Watched(self._beacons / name, now)
                except (OSError, ValueError):  # removed meanwhile, or not a beacon
                    continue
                if one.pidfd is not None:
                    self._poll.register(one.pidfd, select.POLLIN)
                with self._news:
                    self._watched[worker] = one
                found = True
        return found


def read_stacks(pid: int) -> str:
    """The stacks of all threads of a process, even a stopped one; or the reason why they cannot be read."""
    tool = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    try:
        found = subprocess.run(
            [tool, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=5
        )
        if found.returncode == 0:
            return found.stdout
        why = found.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    lines = [f"no Python stacks of process {pid} ({why}); its threads:"]
    with contextlib.suppress(OSError):
        for task in sorted(os.listdir(f"/proc/{pid}/task")):
            words = Path(f"/proc/{pid}/task/{task}/stat").read_text().rpartition(")")[2].split()
            waits = Path(f"/proc/{pid}/task/{task}/wchan").read_text().strip("0\n") or "-"
            lines.append(f"  thread {task}: state {words[0]}, waits in {waits}")
    return "\n".join(lines)


def _look(one: _Watched, now: float, ran_s: float, asks_kernel: bool) -> tuple[bool, bool]:
    """(whether waiting callers must know at once, whether it made progress)."""
    before, one.record = one.record, one.reader.read()
    pulse = one.reader.pulse
    one.still_s = 0.0 if pulse != one.pulse else one.still_s + ran_s
    one.pulse, one.looked_at = pulse, now
    stood = _stands(one, now)
    if asks_kernel:
        if process_state(one.pid) not in "Tt":
            one.stopped_since = None
        elif one.stopped_since is None:
            one.stopped_since = now
    record = one.record
    changed = (before.state, before.generation) != (record.state, record.generation)
    return changed or (_stands(one, now) and not stood), record.step != before.step or record.ticks != before.ticks


def _stands(one: _Watched, now: float) -> bool:
    return one.stopped_since is not None and now - one.stopped_since > STOPPED_AFTER_S


def _sight(one: _Watched, now: float) -> Sight:
    pulse_age = float("inf") if _stands(one, now) else one.still_s
    record = one.record
    age = max(0.0, now - record.entered_at)
    began = [moment for moment in (one.died_at, one.still_since) if moment is not None]
    return Sight(
        one.reader.name,
        one.died_at is None,
        record,
        age,
        pulse_age,
        starved_s(record.pid, record.thread),
        now - min(began) if began else 0.0,
        one.reader.notes(),
    )


def _account(one: _Watched) -> RankAccount:
    """The rank's account, in seconds since the epoch."""
    now, clock = time.monotonic(), time.time()
    until = now if one.died_at is None else one.died_at
    died = one.died_at is not None and one.record.state not in ("finished", "failed")
    ledger = read_account(one.reader.account, until, died, one.still_since)
    ended = clock - (now - until)
    return RankAccount(one.reader.name, ended - ledger.lived_s, ended, ledger, one.died_at is not None)
