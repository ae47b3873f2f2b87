"""Encoded values (workflows.graph.values) as a page shows them: plain JSON, short enough, and without secrets.

An artifact stays recognisable: `{"$artifact": {"digest", "name"}}`. Other types that JSON lacks are written plainly: a
dataclass as its fields, a tuple as a list, an enum as its name, a NaN as the text "nan".
"""

import json
import math
import re
from typing import Any

from infra.telemetry import HIDDEN, redact
from workflows.graph.values import artifact_records, brief, mapped

MOST_LETTERS = 200_000
"""Longest value as JSON; of a longer one the beginning is shown."""
DIGEST = re.compile(r"[0-9a-f]{64}")


def shown(tree: Any) -> Any:
    """One value, shortened if it is very long."""
    return _plain(tree if len(json.dumps(tree)) <= MOST_LETTERS else brief(tree))


def shown_parameters(arguments: Any, names: list[str]) -> list[dict[str, Any]]:
    """A call's encoded {"args", "kwargs"} as [{"name", "value"}]; arguments without a name get their position:
    `[2]`."""
    if arguments is None:
        return []
    given = arguments.get("args", [])
    known = [*names, *(f"[{index}]" for index in range(len(names), len(given)))]
    named = {**dict(zip(known, given, strict=False)), **arguments.get("kwargs", {})}
    return [{"name": name, "value": _hidden(name, shown(value))} for name, value in named.items()]


def name_artifacts(value: Any, names: dict[str, str]) -> Any:
    """A shown value with its artifacts' names, if they are known (the journal stores inputs by digest)."""
    if isinstance(value, dict) and "$artifact" in value:
        entry = value["$artifact"]
        return {"$artifact": {**entry, "name": entry.get("name") or names.get(entry["digest"], "")}}
    return mapped(value, lambda item: name_artifacts(item, names))


def sources(value: Any) -> dict[str, str]:
    """Files that a value stands for, {source: sha256}, as workflows.recipes.inputs.content makes them; else nothing."""
    if isinstance(value, dict) and value and all(isinstance(v, str) and DIGEST.fullmatch(v) for v in value.values()):
        return {str(name): digest for name, digest in value.items() if name != "$artifact"}
    return {}


def holds_artifact(value: Any) -> bool:
    """Whether a shown value contains an artifact."""
    return bool(artifact_records(value))


def _plain(tree: Any) -> Any:
    if isinstance(tree, str):
        return redact(tree)
    if isinstance(tree, list):
        return [_plain(item) for item in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return repr(tree)
    if not isinstance(tree, dict):
        return tree
    if "$artifact" in tree:
        entry = tree["$artifact"]
        return {"$artifact": {"digest": entry} if isinstance(entry, str) else _known(entry)}
    for tag in ("$dataclass", "$settings", "$namedtuple"):
        if tag in tree:
            return _plain({**tree.get("fields", {}), **tree.get("extra", {}), **tree.get("beside", {})})
    for tag in ("$tuple", "$float", "$path", "$text"):
        if tag in tree:
            return _plain(tree[tag])
    if "$kind" in tree:
        return _plain(tree["value"] if "value" in tree else {"$dict": tree["items"]})
    if "$enum" in tree:
        return tree["name"]
    pairs = tree["$dict"] if "$dict" in tree else tree.items()
    named = [(key if isinstance(key, str) else json.dumps(_plain(key)), _plain(item)) for key, item in pairs]
    return {key: _hidden(key, item) for key, item in named}


def _known(entry: dict[str, Any]) -> dict[str, Any]:
    return {"digest": entry["digest"], "name": entry["name"]}


def _hidden(name: str, value: Any) -> Any:
    """Hide a text whose name says that it is secret."""
    return HIDDEN if isinstance(value, str) and value and redact(f"{name}: {value}") == f"{name}: {HIDDEN}" else value
