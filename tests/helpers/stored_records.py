"""Journal records given as JSON, as any version may have written them, appended by the real Journal."""

from collections.abc import Iterable, Mapping
from typing import Any

from workflows.runs.journal import Journal
from workflows.runs.records import Record, from_json

Json = dict[str, Any]


def parsed(tree: Mapping[str, Any]) -> Record:
    """One record; the tree is not changed."""
    record = from_json({name: tree[name] for name in tree})
    assert record is not None, f"no version writes {tree}"
    return record


def append(journal: Journal, trees: Iterable[Mapping[str, Any]]) -> None:
    """Write the next slot."""
    journal.append([parsed(tree) for tree in trees])
