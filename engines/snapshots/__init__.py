"""Training state in host memory, every step: taken beside the training, checksummed, replicated, read into any mesh."""

from engines.snapshots.catalog import SnapshotName
from engines.snapshots.flush import Flusher, StoreSource
from engines.snapshots.memory import Acknowledged, Holder, Reach, Snapshots, unheard
from engines.snapshots.milestones import Milestones
from engines.snapshots.reader import SnapshotReader, restore
from engines.snapshots.replicas import Peer, ReplicaServer
from engines.snapshots.segments import forget, node_folder, sealed
from engines.snapshots.shard import Layout, Piece, Shard, ShardName, open_shard
from engines.snapshots.sources import FolderSource, Source, Sources

__all__ = [
    "Acknowledged",
    "Flusher",
    "FolderSource",
    "Holder",
    "Layout",
    "Milestones",
    "Peer",
    "Piece",
    "Reach",
    "ReplicaServer",
    "Shard",
    "ShardName",
    "SnapshotName",
    "SnapshotReader",
    "Snapshots",
    "Source",
    "Sources",
    "StoreSource",
    "forget",
    "node_folder",
    "open_shard",
    "restore",
    "sealed",
    "unheard",
]
