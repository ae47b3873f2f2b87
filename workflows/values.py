"""How arguments and results become JSON, and back.

JSON values go as they are. What JSON lacks is a one-key object whose key starts with `$`: `{"$tuple": [...]}`,
`{"$dataclass": "module:Name", "fields": {...}}`, `{"$settings": ...}`, `{"$artifact": ...}`, `{"$path": ...}`,
`{"$enum": ...}`, `{"$float": "nan"}`, `{"$dict": [[key, value], ...]}`. Never a pickle: a store can be read years
later, and reading it runs nobody's code but the named class's constructor.
"""

import dataclasses
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from infra.errors import UserError
from workflows.artifacts import Artifact, ArtifactSource
from workflows.names import canonical_name, load_name

FORMAT = 1


def encode(value: Any, where: str = "value", replace: Callable[[Any], Any] | None = None) -> Any:
    """JSON-able form of `value`. `replace(x)` may return an encoded tree for any part (edges), else None.

    Raises:
        UserError: something that cannot be kept; the message has the path to it, e.g. `sft.result["model"]`.
    """
    if replace is not None and (tree := replace(value)) is not None:
        return tree
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, Enum):
        return {"$enum": canonical_name(type(value)), "name": value.name}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list):
        return [encode(item, f"{where}[{index}]", replace) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [encode(item, f"{where}[{index}]", replace) for index, item in enumerate(value)]}
    if isinstance(value, dict):
        return _encode_dict(value, where, replace)
    if isinstance(value, Artifact):
        return {"$artifact": value.record()}
    if isinstance(value, Path):
        return {"$path": str(value)}
    if isinstance(value, BaseModel):
        if not value.model_config.get("frozen"):
            raise UserError(f"{where}: {type(value).__name__} must be frozen (derive it from infra.config.Settings)")
        fields = {name: encode(getattr(value, name), f"{where}.{name}", replace) for name in type(value).model_fields}
        tree = {"$settings": canonical_name(type(value)), "fields": fields}
        # Where and how fast, never what: such settings (pools) are part of no key.
        return {**tree, "unkeyed": True} if getattr(type(value), "unkeyed", False) else tree
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _encode_dataclass(value, where, replace)
    if isinstance(value, (int, str)):  # a subclass such as numpy's str_
        return int(value) if isinstance(value, int) else str(value)
    raise UserError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be kept: steps take and "
        "return JSON values, frozen dataclasses, settings and artifacts (large things go into context().artifact(...))"
    )


def decode(tree: Any, source: ArtifactSource | None = None) -> Any:
    """The inverse of `encode`; artifacts are bound to `source` so that `path()` works."""
    if isinstance(tree, list):
        return [decode(item, source) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$artifact" in tree:
        return Artifact.from_record(tree["$artifact"], source)
    if "$tuple" in tree:
        return tuple(decode(item, source) for item in tree["$tuple"])
    if "$dict" in tree:
        return {decode(key, source): decode(item, source) for key, item in tree["$dict"]}
    if "$float" in tree:
        return float(tree["$float"])
    if "$path" in tree:
        return Path(tree["$path"])
    if "$enum" in tree:
        return load_name(tree["$enum"])[tree["name"]]
    for tag in ("$dataclass", "$settings"):
        if tag in tree:
            return _construct(tree[tag], {name: decode(item, source) for name, item in tree["fields"].items()})
    return {key: decode(item, source) for key, item in tree.items()}


def field_of(tree: Any, field: str | None, where: str) -> Any:
    """One field of an encoded dataclass or dict; the whole value for None.

    Raises:
        UserError: there is no such field.
    """
    if field is None:
        return tree
    fields = tree.get("fields", tree) if isinstance(tree, dict) else {}
    if field not in fields:
        raise UserError(f"{where}: its result has no field {field!r} (it has {', '.join(fields) or 'none'})")
    return fields[field]


def canonical(tree: Any) -> bytes:
    """One byte string per encoded value, whatever the order of its keys."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def identity(tree: Any) -> Any:
    """An encoded value reduced to what makes it equal to another: an artifact is its digest, wherever it lies."""
    if isinstance(tree, list):
        return [identity(item) for item in tree]
    if isinstance(tree, dict):
        if "$artifact" in tree:
            return {"$artifact": tree["$artifact"]["digest"]}
        if tree.get("unkeyed") is True and "$settings" in tree:
            return {"$settings": tree["$settings"]}
        return {key: identity(item) for key, item in tree.items()}
    return tree


def digest(tree: Any) -> str:
    """sha256 of an encoded value's identity."""
    return hashlib.sha256(canonical(identity(tree))).hexdigest()


def named_arguments(function: Callable[..., Any], arguments: Any) -> dict[str, Any]:
    """A call's encoded {"args", "kwargs"} by the function's parameter names."""
    names = list(inspect.signature(function).parameters)
    rest = [f"[{index}]" for index in range(len(arguments["args"]))]
    return {**dict(zip([*names, *rest[len(names) :]], arguments["args"], strict=False)), **arguments["kwargs"]}


def brief(tree: Any) -> Any:
    """An encoded value for people: long texts and lists cut to their beginning and a digest."""
    if isinstance(tree, str) and len(tree) > 200:
        return f"{tree[:40]}... (sha256 {hashlib.sha256(tree.encode()).hexdigest()[:12]})"
    if isinstance(tree, list):
        cut = [brief(item) for item in tree[:20]]
        return [*cut, f"... {len(tree)} in all, sha256 {digest(tree)[:12]}"] if len(tree) > 20 else cut
    if isinstance(tree, dict):
        return {key: brief(item) for key, item in tree.items()}
    return tree


def one_line(tree: Any, most: int = 300) -> str | None:
    """A short value as JSON, for a terminal; None where it would take more than `most` letters."""
    text = json.dumps(tree)
    return text if len(text) <= most else None


def differences(before: Any, now: Any, most: int = 5) -> list[str]:
    """What changed between two identities, leaf by leaf: `sft.batch_size 64, now 32`."""
    then, later = dict(_leaves(before, "")), dict(_leaves(now, ""))
    changed = [path for path in then | later if then.get(path) != later.get(path)]
    lines = [f"{path} {then.get(path, 'not there')}, now {later.get(path, 'not there')}" for path in changed[:most]]
    return [*lines, f"and {len(changed) - most} more"] if len(changed) > most else lines


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path, value as shown) of everything inside an identity."""
    if isinstance(tree, dict) and "$artifact" in tree:
        yield path, f"artifact {tree['$artifact'][:12]}"
    elif isinstance(tree, dict) and tree:
        for key, item in tree.items():
            if key in ("$settings", "$dataclass", "$enum"):
                yield f"{path} (its type)", str(item)
            elif key in ("fields", "$tuple", "$path", "$float", "$dict"):
                yield from _leaves(item, path)
            else:
                yield from _leaves(item, f"{path}.{key}".lstrip("."))
    elif isinstance(tree, list) and tree:
        for index, item in enumerate(tree):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        shown = repr(tree)
        yield path, shown if len(shown) <= 100 else f"{shown[:80]}... (sha256 {digest(tree)[:12]})"


def artifact_records(tree: Any) -> list[dict[str, Any]]:
    """The records of all artifacts inside an encoded value."""
    if isinstance(tree, list):
        return [record for item in tree for record in artifact_records(item)]
    if isinstance(tree, dict):
        if "$artifact" in tree:
            return [tree["$artifact"]]
        return [record for item in tree.values() for record in artifact_records(item)]
    return []


def _encode_dict(value: dict[Any, Any], where: str, replace: Callable[[Any], Any] | None) -> Any:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: encode(item, f"{where}[{key!r}]", replace) for key, item in value.items()}
    pairs = [[encode(key, where, replace), encode(item, f"{where}[{key!r}]", replace)] for key, item in value.items()]
    return {"$dict": pairs}


def _encode_dataclass(value: Any, where: str, replace: Callable[[Any], Any] | None) -> Any:
    if not type(value).__dataclass_params__.frozen:
        raise UserError(f"{where}: {type(value).__name__} must be a frozen dataclass to be kept")
    names = [field.name for field in dataclasses.fields(value) if field.init]
    fields = {name: encode(getattr(value, name), f"{where}.{name}", replace) for name in names}
    return {"$dataclass": canonical_name(type(value)), "fields": fields}


def _construct(name: str, fields: dict[str, Any]) -> Any:
    kind = load_name(name)
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"a stored {name} no longer fits its class: {error}") from error
