"""What a group's controller must not forget when it is killed: one small file, replaced as a whole.

    {"format", "group", "controllers", "joins": {generation: step that it loaded}, "skipped": [[first, last], ...],
     "rollbacks", "ranks", "verified", "corruptions": [{"step", "to_step", "workers", "nodes"}, ...]}

`verified`: digests agreed there, so every state up to this step may be gone back to.

`group` is drawn once: a state folder that was removed and made again never meets what the older one left in memory.
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.policies.rollback import DataWindow
from infra.errors import CheckpointError, SystemFault
from infra.storage import write_text

FORMAT = 1


class Superseded(SystemFault):
    """A later controller leads the group: this one leaves everything to it."""


@dataclass(frozen=True)
class GroupHistory:
    """See the module's docstring. `controllers`: how many have led this group so far, the present one included.
    `ranks`: a digest of the code and the settings that its ranks were started with."""

    group: str
    controllers: int = 0
    joins: Mapping[int, int] = field(default_factory=dict)
    skipped: tuple[DataWindow, ...] = ()
    rollbacks: int = 0
    ranks: str = ""
    verified: int = 0
    corruptions: tuple[Mapping[str, Any], ...] = ()

    def on_trajectory(self, generation: int, step: int) -> bool:
        """Whether what a generation saved after `step` steps belongs to what later ones went on from."""
        return all(step <= start for later, start in self.joins.items() if later > generation)


class GroupJournal:
    """The file of one group, with one writer.

    Raises:
        CheckpointError: the file is damaged, or of another format.
    """

    def __init__(self, path: Path, prefix: str) -> None:
        self.path = path
        self.history = self._read() if path.exists() else GroupHistory(f"{prefix}-{uuid.uuid4().hex[:12]}")

    def note(self, **changes: object) -> None:
        """Change some fields, durably.

        Raises:
            Superseded: another controller has written the file since.
        """
        if self.path.exists() and self._read().controllers > self.history.controllers:
            raise Superseded(f"group {self.history.group}: another controller leads it (see {self.path})")
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
        write_text(self.path, json.dumps(tree, indent=1) + "\n")

    def _read(self) -> GroupHistory:
        try:
            tree = json.loads(self.path.read_text())
            if tree["format"] != FORMAT:
                raise CheckpointError(f"{self.path}: format {tree['format']}, this version reads {FORMAT}")
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
            raise CheckpointError(f"{self.path}: not a group's journal: {error}") from error
