"""Object storage: a folder or `s3://bucket/prefix` behind one protocol.

    store = open_store("s3://bucket/runs")
    store.put_if_absent("runs/a/lease.json", b"...")  # exactly one of all writers anywhere succeeds

`open`: which store a URL means. `store`: the protocol. `folder`, `s3`: the two stores. `files`: durable local files.
"""

from infra.storage.folder import FolderStore
from infra.storage.open import default_store, open_store, parse_store
from infra.storage.store import Store

__all__ = ["FolderStore", "Store", "default_store", "open_store", "parse_store"]
