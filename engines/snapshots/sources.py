"""Where shards can be had: this node's memory, peers, a store; and which snapshot is taken from them.

Sources are asked in the order given, nearest first. A copy that fails its checksums is refused and the next one taken;
when a shard that is needed has no intact copy left, the whole snapshot is given up and the one before it is tried.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from engines.snapshots.catalog import SnapshotName, covers, snapshots
from engines.snapshots.reader import SnapshotReader
from engines.snapshots.segments import sealed
from engines.snapshots.shard import Layout, Shard, ShardName, open_shard, read_layout
from infra.errors import CheckpointError, StoreError
from infra.storage.files import Moved, unseen

T = TypeVar("T")


class Source(Protocol):
    """One place with shards. Every method raises StoreError when the place cannot be reached."""

    def names(self) -> list[ShardName]: ...

    def layout(self, name: ShardName) -> Layout:
        """Raises CheckpointError where the shard is damaged or gone."""
        ...

    def open(self, name: ShardName, moved: Moved = unseen) -> Shard:
        """The shard, verified here; `moved` is called while it comes. Raises CheckpointError likewise."""
        ...


class FolderSource:
    """A node's folder in shared memory, or any other local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[ShardName]:
        return sealed(self.folder)

    def layout(self, name: ShardName) -> Layout:
        return read_layout(self.folder / str(name))

    def open(self, name: ShardName, moved: Moved = unseen) -> Shard:
        return open_shard(self.folder / str(name))

    def __str__(self) -> str:
        return str(self.folder)


class Sources:
    """All places together, as they are now; make a new one for every recovery.

    `refused` collects what was not taken and why, for the log. `moved` is called with "load" for every piece that was
    found, and with "fetch" before a place that is not this machine's memory is asked, and while it answers.
    """

    def __init__(self, sources: Sequence[Source], moved: Callable[[str], None] = lambda name: None) -> None:
        self.refused: list[str] = []
        self._moved = moved
        self._places: dict[ShardName, list[Source]] = {}
        self.add(sources)

    def add(self, sources: Sequence[Source]) -> None:
        """More places, farther away."""
        for source in sources:
            try:
                names = self._ask(source, lambda place: place.names())
            except StoreError as error:
                self.refused.append(f"{source}: {error}")
                continue
            for name in names:
                self._places.setdefault(name, []).append(source)

    def snapshots(self) -> list[SnapshotName]:
        """Whole snapshots by what the holders claim to have, best first."""
        return [snapshot for snapshot, _ in snapshots(self._places, self._layout)]

    def reader(self, snapshot: SnapshotName, rank: int | None = None) -> SnapshotReader:
        """For that snapshot; shards are fetched and verified when they are read.

        Where the shard of `rank` holds all of the state (replicated parameters), others are looked at only if it is
        refused.
        """

        def moved() -> None:
            self._moved("load")

        names = [one for one in self._places if (one.generation, one.step) == (snapshot.generation, snapshot.step)]
        own = self._layouts([name for name in names if name.rank == rank])
        others = [name for name in names if name not in own]
        if own and covers(own.values()):
            return SnapshotReader(own, self._open, moved, lambda: self._layouts(others))
        return SnapshotReader({**own, **self._layouts(others)}, self._open, moved)

    def _layouts(self, names: Iterable[ShardName]) -> dict[ShardName, Layout]:
        found = {name: self._layout(name) for name in names}
        return {name: layout for name, layout in found.items() if layout is not None}

    def _layout(self, name: ShardName) -> Layout | None:
        return self._first(name, lambda source: source.layout(name))

    def _open(self, name: ShardName) -> Shard:
        def fetching() -> None:
            self._moved("fetch")

        shard = self._first(name, lambda source: _expected(source.open(name, fetching), name))
        if shard is None:
            raise CheckpointError(f"no intact copy of {name}: {'; '.join(self.refused)}")
        return shard

    def _first(self, name: ShardName, ask: Callable[[Source], T]) -> T | None:
        for source in self._places.get(name, ()):
            try:
                return self._ask(source, ask)
            except (CheckpointError, StoreError) as error:
                self.refused.append(f"{source}: {error}")
        return None

    def _ask(self, source: Source, ask: Callable[[Source], T]) -> T:
        self._moved("load" if isinstance(source, FolderSource) else "fetch")
        try:
            return ask(source)
        finally:
            self._moved("load")


def _expected(shard: Shard, name: ShardName) -> Shard:
    if shard.name != name:
        raise CheckpointError(f"the shard called {name} is {shard.name}")
    return shard
