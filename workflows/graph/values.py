"""How arguments and results become JSON, and back.

JSON values stay as they are. Others become an object whose first key starts with `$`: `{"$tuple": [...]}`,
`{"$dataclass": "module:Name", "fields": {...}}`, `{"$settings": ...}`, `{"$namedtuple": ...}`, `{"$artifact": ...}`,
`{"$path": ...}`, `{"$enum": ...}`, `{"$float": "nan"}`, `{"$dict": [[key, value], ...]}`; `{"$text": ...}` is text
that is not valid Unicode (a file name of other bytes), and `{"$kind": "module:Name", "value": ...}` is an instance of a
class derived from one of these (or numpy's). Nothing is pickled: a store can be read years later, and reading runs no
code except the import of the named class (workflows.graph.classes).
"""

import dataclasses
import hashlib
import inspect
import json
import math
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from infra.errors import UserError
from workflows.graph import classes
from workflows.graph.artifacts import Artifact, ArtifactSource
from workflows.identity.keys import canonical

FORMAT = 1
DEEPEST = 250
"""Most levels of nested JSON: each costs up to three Python frames whenever a value is walked."""
LONGEST_INT = 10**4300
"""Most digits of a decimal number that Python writes and reads."""
INNER = {"fields", "extra", "beside", "private", "value", "items"}
"""Keys that may stand beside a tag; they are not the user's names."""
Replace = Callable[[Any], Any]


def encode(value: Any, where: str = "value", replace: Replace | None = None) -> Any:
    """The JSON form of `value`. `replace(x)` may return an encoded tree for any part (edges), else None.

    Raises:
        UserError: a value cannot be stored; the message has the path to it, e.g. `sft.result["model"]`.
    """
    return _encode(value, where, replace or (lambda _: None), DEEPEST)


def _encode(value: Any, where: str, replace: Replace, room: int) -> Any:
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        if abs(value) >= LONGEST_INT:
            raise UserError(f"{where} has more than 4300 digits, which cannot be stored: make it text, as in hex(...)")
        return value
    if kind is str:
        return value if _is_unicode(value) else {"$text": value.encode("unicode_escape").decode("ascii")}
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if (tree := replace(value)) is not None:
        return tree
    if room <= 0:
        raise UserError(f"{_start(where)} is nested more than {DEEPEST} deep, or contains itself: it cannot be stored")
    if kind is list:
        return [_encode(item, f"{where}[{index}]", replace, room - 1) for index, item in enumerate(value)]
    if kind is tuple:
        return {"$tuple": _encode(list(value), where, replace, room - 1)}
    if kind is dict:
        return _encode_items(list(value.items()), where, replace, room)
    return _encode_object(value, where, replace, room)


def _encode_object(value: Any, where: str, replace: Replace, room: int) -> Any:
    """Encode anything but a plain JSON value, list, tuple or dict."""

    def fields(held: dict[str, Any]) -> dict[str, Any]:
        return {name: _encode(item, f"{where}.{name}", replace, room - 2) for name, item in held.items()}

    def beside(**groups: dict[str, Any]) -> dict[str, Any]:
        return {group: fields(held) for group, held in groups.items() if held}

    if isinstance(value, Enum):
        member = {"$enum": classes.name_of(type(value), where), "name": str(value.name or value.value)}
        return (
            member if classes.is_member(value) else {**member, "value": _encode(value.value, where, replace, room - 1)}
        )
    if (scalar := classes.numpy_scalar(value)) is not None:
        return {"$kind": scalar[0], "value": _encode(scalar[1], where, replace, room)}
    if isinstance(value, Artifact):
        return {"$artifact": {**value.record(), "meta": _encode(value.meta, f"{where}.meta", replace, room - 1)}}
    if type(value) is type(Path()):
        return {"$path": _encode(str(value), where, replace, room)}
    if isinstance(value, BaseModel):
        given, extra, private, more = classes.settings_parts(value, where)
        tree: dict[str, Any] = {"$settings": classes.name_of(type(value), where), "fields": fields(given)}
        tree |= beside(extra=extra, private=private, beside=more)
        # Such settings (pools) decide where and how fast, not the result: they are part of no key.
        return {**tree, "unkeyed": True} if getattr(type(value), "unkeyed", False) else tree
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made_of, more = classes.dataclass_parts(value, where)
        return {
            "$dataclass": classes.name_of(type(value), where),
            "fields": fields(made_of),
            **beside(beside=more),
        }
    if classes.is_named_tuple(value):
        classes.check_no_more(value, where)
        held = dict(zip(type(value)._fields, tuple.__iter__(value), strict=True))
        return {"$namedtuple": classes.name_of(type(value), where), "fields": fields(held)}
    if isinstance(value, classes.BASES):
        return _encode_derived(value, where, replace, room)
    raise UserError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be stored: steps take and "
        "return JSON values, frozen dataclasses, settings and artifacts (large things go into context().artifact(...))"
    )


def _encode_derived(value: Any, where: str, replace: Replace, room: int) -> Any:
    base, name, held = classes.derived_parts(value, where)
    if not issubclass(base, dict):
        return {"$kind": name, "value": _encode(held, where, replace, room - 1)}
    if base is OrderedDict:  # equal only in the same order
        return {"$kind": name, "items": _encode_pairs(held, where, replace, room - 1)}
    tree = {"$kind": name, "value": _encode_items(held, where, replace, room - 1)}
    if base is not defaultdict or value.default_factory is None:
        return tree
    if not isinstance(value.default_factory, type):
        raise UserError(
            f"{where} is a defaultdict whose default_factory is not a class, it cannot be stored: use a dict"
        )
    return {**tree, "factory": classes.name_of(value.default_factory, f"{where}.default_factory")}


def _encode_items(items: list[tuple[Any, Any]], where: str, replace: Replace, room: int) -> Any:
    if all(type(key) is str and not key.startswith("$") and _is_unicode(key) for key, _ in items):
        return {key: _encode(item, f"{where}[{key!r}]", replace, room - 1) for key, item in items}
    return {"$dict": _encode_pairs(items, where, replace, room - 1)}


def _encode_pairs(items: list[tuple[Any, Any]], where: str, replace: Replace, room: int) -> Any:
    return [
        [_encode(key, where, replace, room - 2), _encode(item, f"{where}[{_shown(key)}]", replace, room - 2)]
        for key, item in items
    ]


def _shown(key: Any) -> str:
    try:
        return repr(key)
    except ValueError:  # a number with too many digits
        return "..."


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; half a surrogate pair (a file name of other bytes) cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def readable(text: str) -> str:
    """The text with everything that is not valid Unicode escaped, so that it can be written anywhere."""
    return text.encode("utf-8", "backslashreplace").decode()


def _start(where: str) -> str:
    """The beginning of a long path to a value."""
    return where if len(where) <= 120 else f"{where[:120]}..."


def decode(tree: Any, source: ArtifactSource | None = None) -> Any:
    """The inverse of `encode`; artifacts are bound to `source` so that `path()` works.

    Raises:
        UserError: a class that the value names is gone or has other fields now.
    """
    if isinstance(tree, list):
        return [decode(item, source) if isinstance(item, (list, dict)) else item for item in tree]
    if not isinstance(tree, dict):
        return tree
    if (tag := _tag(tree)) is not None:
        return _decoded(tag, tree, source)
    return {key: decode(item, source) for key, item in tree.items()}


def _tag(tree: dict[str, Any]) -> str | None:
    """The tag of an encoded dict; None if it stands for a plain dict."""
    for key in tree:
        if key.startswith("$"):
            return key
    return None


def _decoded(tag: str, tree: dict[str, Any], source: ArtifactSource | None) -> Any:
    def group(name: str) -> dict[str, Any] | None:
        return {key: decode(item, source) for key, item in tree[name].items()} if name in tree else None

    held = tree[tag]
    match tag:
        case "$artifact":
            return Artifact.from_record({**held, "meta": decode(held["meta"])}, source)
        case "$tuple":
            return tuple(decode(item, source) for item in held)
        case "$dict":
            return _dict_of([(decode(key, source), decode(item, source)) for key, item in held])
        case "$float":
            return float(held)
        case "$text":
            return held.encode("ascii").decode("unicode_escape")
        case "$path":
            return Path(decode(held))
        case "$enum":
            return classes.enum_member(held, tree["name"], decode(tree.get("value"), source), "value" in tree)
        case "$dataclass":
            return classes.restore_dataclass(held, group("fields") or {}, group("beside"))
        case "$settings":
            fields, extra, beside = (group(name) or {} for name in ("fields", "extra", "beside"))
            return classes.restore_settings(held, fields, extra, group("private"), beside)
        case "$namedtuple":
            return classes.restore_named_tuple(held, group("fields") or {})
        case "$kind":
            inner = decode(tree["items"] if "items" in tree else tree["value"], source)
            factory = classes.load_name(tree["factory"]) if "factory" in tree else None
            return classes.restore_derived(held, list(inner.items()) if isinstance(inner, dict) else inner, factory)
    raise UserError(f"a stored value has a {tag}, which this version of recua does not know: use a newer one")


def _dict_of(items: list[tuple[Any, Any]]) -> dict[Any, Any]:
    try:
        return dict(items)
    except TypeError as error:  # a key was a Future whose result is a list
        raise UserError(f"a dict's key came to be what cannot be one ({error}): take the Future's .result()") from None


def field_of(tree: Any, field: str | None, where: str) -> Any:
    """One field of an encoded dataclass, settings, named tuple or dict; the whole value for None.

    Raises:
        UserError: there is no such field.
    """
    if field is None:
        return tree
    fields = _fields(tree)
    if field not in fields:
        raise UserError(f"{where}: its result has no field {field!r} (it has {', '.join(map(str, fields)) or 'none'})")
    return fields[field]


def _fields(tree: Any) -> dict[Any, Any]:
    """The named fields of an encoded value."""
    if not isinstance(tree, dict):
        return {}
    if "fields" in tree and _tag(tree) is not None:
        return {**tree["fields"], **tree.get("extra", {}), **tree.get("beside", {})}
    if "$kind" in tree and "value" in tree:
        return _fields(tree["value"])
    if "$dict" in tree or "$kind" in tree:
        return {decode(key): item for key, item in tree.get("$dict") or tree["items"]}
    return {} if _tag(tree) is not None else tree


def items_of(tree: Any) -> list[Any] | None:
    """The items of an encoded list or tuple, or of a derived class; None for anything else."""
    if isinstance(tree, dict) and "$kind" in tree:
        tree = tree.get("value")
    if isinstance(tree, dict):
        tree = list(tree["fields"].values()) if "$namedtuple" in tree else tree.get("$tuple")
    return tree if isinstance(tree, list) else None


def identity(tree: Any) -> Any:
    """An encoded value reduced to what makes it equal to another: an artifact counts by its digest and the metadata it
    was sealed with, not by its location; a dict's order does not count. Unchanged parts are not copied."""
    if not isinstance(tree, dict):
        return mapped(tree, identity)
    if "$artifact" in tree:
        kept = {"$artifact": tree["$artifact"]["digest"]}
        meta = tree["$artifact"]["meta"]
        return {**kept, "meta": identity(meta)} if meta else kept
    if tree.get("unkeyed") is True and "$settings" in tree:
        return {"$settings": tree["$settings"]}
    if "$dict" in tree:
        return {"$dict": sorted((identity(pair) for pair in tree["$dict"]), key=canonical)}
    return mapped(tree, identity)


def earlier_identity(tree: Any) -> Any:
    """The `identity` behind the digests in older stores: an artifact's metadata and a value's class did not count, but
    a dict's order did."""
    if not isinstance(tree, dict):
        return mapped(tree, earlier_identity)
    if "$artifact" in tree:
        return {"$artifact": tree["$artifact"]["digest"]}
    if tree.get("unkeyed") is True and "$settings" in tree:
        return {"$settings": tree["$settings"]}
    if "$namedtuple" in tree:
        return {"$tuple": earlier_identity(list(tree["fields"].values()))}
    if "$kind" in tree and "value" in tree:
        return earlier_identity(tree["value"])
    if "$kind" in tree:
        pairs = earlier_identity(tree["items"])
        texts = all(type(key) is str and not key.startswith("$") for key, _ in pairs)
        return dict(pairs) if texts else {"$dict": pairs}
    later = ("extra", "beside", "private") if _tag(tree) is not None else ()
    return mapped({key: item for key, item in tree.items() if key not in later}, earlier_identity)


def walk(tree: Any) -> Iterator[Any]:
    """Every list and dict inside an encoded value, except inside artifacts; outer ones and earlier ones first."""
    todo = [tree] if isinstance(tree, (list, dict)) else []
    while todo:
        item = todo.pop()
        yield item
        if isinstance(item, list) or "$artifact" not in item:
            inside = item if isinstance(item, list) else item.values()
            todo += [each for each in inside if isinstance(each, (list, dict))][::-1]


def mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A list or dict with `change(x)` for each list and dict x that it holds; `tree` itself if that changes nothing, so
    that a value that many calls share is stored once."""
    if isinstance(tree, list):
        items = [change(item) if isinstance(item, (list, dict)) else item for item in tree]
        return tree if all(map(operator.is_, tree, items)) else items
    if isinstance(tree, dict):
        fields = {key: change(item) if isinstance(item, (list, dict)) else item for key, item in tree.items()}
        return tree if all(map(operator.is_, tree.values(), fields.values())) else fields
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
    """A short value as JSON, for a terminal; None if it has more than `most` characters."""
    text = json.dumps(_without_kinds(tree))
    return text if len(text) <= most else None


def _without_kinds(tree: Any) -> Any:
    """An encoded value in which numpy numbers and dicts of derived classes look like plain ones."""
    if isinstance(tree, dict) and "$kind" in tree:
        return _without_kinds(tree["value"] if "value" in tree else {"$dict": tree["items"]})
    return mapped(tree, _without_kinds)


def differences(before: Any, now: Any, most: int = 5) -> list[str]:
    """The changes between two identities, leaf by leaf: `sft.batch_size 64, now 32`."""
    then, later = dict(_leaves(before, "")), dict(_leaves(now, ""))
    changed = [path for path in then | later if then.get(path) != later.get(path)]
    lines = [f"{path} {then.get(path, 'not there')}, now {later.get(path, 'not there')}" for path in changed[:most]]
    return [*lines, f"and {len(changed) - most} more"] if len(changed) > most else lines


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path, value as shown) of everything inside an identity."""
    if isinstance(tree, dict) and "$artifact" in tree:
        yield path, f"artifact {tree['$artifact'][:12]}"
        if "meta" in tree:
            yield from _leaves(tree["meta"], f"{path}.meta")
    elif isinstance(tree, dict) and tree:
        tagged = _tag(tree) is not None
        for key, item in tree.items():
            if key in ("$settings", "$dataclass", "$enum", "$namedtuple", "$kind"):
                yield f"{path} (its type)", str(item)
            elif tagged and (key in INNER or key.startswith("$")):
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
    """The records of all artifacts inside an encoded value, in order."""
    return [item["$artifact"] for item in walk(tree) if isinstance(item, dict) and "$artifact" in item]
