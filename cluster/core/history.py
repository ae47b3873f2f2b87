"""The part of a controller's state that survives its death: one small object of a store, replaced as a whole.

    {"format", "group", "controllers", "joins": {generation: step that it loaded}, "skipped": [[first, last], ...],
     "rollbacks", "ranks", "verified", "corruptions": [{"step", "to_step", "workers", "nodes"}, ...]}

`verified`: digests agreed at this step, so training may go back to any state up to it.

`group` is drawn once: a state that was removed and made again never finds what the older one left in memory.
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.policies.rollback import DataWindow
from infra.errors import CheckpointError, SystemFault
from infra.storage import Store

FORMAT = 1
KEY = "group.json"


class Superseded(SystemFault):
    """A later controller leads the group, and this one must leave everything to it."""


@dataclass(frozen=True)
class GroupHistory:
    """See the module's docstring. `controllers`: how many have led this group so far, the present one included.
    `ranks`: a digest of the code and settings of its ranks."""

    group: str
    controllers: int = 0
    joins: Mapping[int, int] = field(default_factory=dict)
    skipped: tuple[DataWindow, ...] = ()
    rollbacks: int = 0
    ranks: str = ""
    verified: int = 0
    corruptions: tuple[Mapping[str, Any], ...] = ()

    def on_trajectory(self, generation: int, step: int) -> bool:
        """Whether the state that a generation saved after `step` steps is on the path that later ones continued."""
        return all(step <= start for later, start in self.joins.items() if later > generation)


class GroupJournal:
    """The journal of the group whose state is in `store`; it has one writer.

    Raises:
        CheckpointError: the journal is damaged, or of another format.
        StoreError: the store fails.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        content = store.get(KEY)
        self.history = GroupHistory(f"{prefix}-{uuid.uuid4().hex[:12]}") if content is None else self._read(content)

    def note(self, **changes: object) -> None:
        """Change some fields, durably.

        Raises:
            Superseded: another controller has written it since.
            StoreError: the store fails.
        """
        content = self._store.get(KEY)
        if content is not None and self._read(content).controllers > self.history.controllers:
            raise Superseded(f"group {self.history.group}: another controller leads it (see {self._store.url}/{KEY})")
        self.history = history = replace(self.history, **changes)  # type: ignore[arg-type]
        tree = {
            "format": FORMAT,
            "group": history.group,
            "controllers": history.controllers,
            "joins": {str(generation): step for generation, step in history.joins.items()},
            "skipped": [[window.first, window.last] for window in history.skipped],
            "rollbacks": history.rollbacks,
            "ranks": history.ranks,
            "verified": history.verified,
            "corruptions": [dict(one) for one in history.corruptions],
        }
        self._store.put(KEY, (json.dumps(tree, indent=1) + "\n").encode())

    def _read(self, content: bytes) -> GroupHistory:
        where = f"{self._store.url}/{KEY}"
        try:
            tree = json.loads(content)
            if tree["format"] != FORMAT:
                raise CheckpointError(f"{where}: format {tree['format']}, this version reads {FORMAT}")
            return GroupHistory(
                tree["group"],
                tree["controllers"],
                {int(generation): step for generation, step in tree["joins"].items()},
                tuple(DataWindow(first, last) for first, last in tree["skipped"]),
                tree["rollbacks"],
                tree.get("ranks", ""),
                tree.get("verified", 0),
                tuple(tree.get("corruptions", ())),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{where}: not a group's journal: {error}") from error
