"""Classes of values: instances are encoded, and rebuilt without running the class's code.

A validator or a `__post_init__` that changes its input (adds a prefix, scales a rate) must not run a second time on the
receiver. An object is therefore created empty and gets its fields back. Fields that the class has gained since the
value was stored take their defaults.
"""

import dataclasses
import functools
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from pydantic import BaseModel

from infra.errors import UserError
from workflows.identity.names import canonical_name, load_name

Fields = dict[str, Any]
BASES: tuple[type, ...] = (OrderedDict, defaultdict, dict, list, tuple, str, int, float)
"""An instance of a class derived from one of these is stored by the class's name and the base's value."""


def name_of(kind: type, where: str) -> str:
    """The canonical name of a value's class, by which decoding finds it.

    Raises:
        UserError: no class is found by that name, or another one; the message names `where`.
    """
    try:
        return _checked_name(kind)
    except UserError as error:
        raise UserError(f"{where} cannot be stored: {error}") from None


@functools.cache
def _checked_name(kind: type) -> str:
    name = canonical_name(kind)
    try:
        found = load_name(name)
    except UserError:
        found = None
    if found is not kind:
        raise UserError(f"its class must be at the top of a module under its own name, and {name} is not this class")
    return name


# --- dataclasses and settings ---


def dataclass_parts(value: Any, where: str) -> tuple[Fields, Fields]:
    """A frozen dataclass's constructor fields, and its other fields (`init=False`, set in `__post_init__`)."""
    kind = type(value)
    if not kind.__dataclass_params__.frozen:
        raise UserError(f"{where}: {kind.__name__} must be a frozen dataclass to be stored")
    _check_empty(object, kind, where)
    fields = {field.name: field for field in dataclasses.fields(value)}
    made_of = {name: getattr(value, name) for name, field in fields.items() if field.init}
    beside = {name: getattr(value, name) for name, field in fields.items() if _was_set(value, field)}
    for name, held in getattr(value, "__dict__", {}).items():
        if name not in fields and not _is_cached(kind, name):
            beside[name] = held
    return made_of, beside


def restore_dataclass(name: str, made_of: Fields, beside: Fields | None) -> Any:
    """The dataclass with these fields. `beside`: None in values stored before these were kept.

    Raises:
        UserError: there is no such class any more, or it has other fields.
    """
    kind = load_name(name)
    if not dataclasses.is_dataclass(kind) or not isinstance(kind, type):
        raise UserError(f"a stored {name} no longer fits its class: {name} is no longer a dataclass")
    declared = {field.name: field for field in dataclasses.fields(kind)}
    if gone := sorted(made_of.keys() - declared.keys()):
        raise UserError(f"a stored {name} no longer fits its class: the class has no field {', '.join(gone)} any more")
    held = {**made_of, **(beside or {})}
    unset = [field for field in declared.values() if field.name not in held and not _has_default(field)]
    if missing := [field.name for field in unset if field.init]:
        raise UserError(f"a stored {name} no longer fits its class: it has no {', '.join(missing)}, and no default")
    if unset and beside is None:
        return _constructed(kind, name, made_of)
    made = object.__new__(kind)
    defaults = {field.name: _default(field) for field in declared.values() if _has_default(field)}
    for attribute, item in {**defaults, **held}.items():
        object.__setattr__(made, attribute, item)
    return made


def settings_parts(value: BaseModel, where: str) -> tuple[Fields, Fields, Fields, Fields]:
    """The fields of frozen settings, their extra fields, their private attributes, and what validators put beside."""
    kind = type(value)
    if not value.model_config.get("frozen"):
        raise UserError(f"{where}: {kind.__name__} must be frozen (derive it from infra.config.Settings)")
    fields = {name: getattr(value, name) for name in kind.model_fields}
    beside = {name: held for name, held in vars(value).items() if name not in fields and not _is_cached(kind, name)}
    return fields, dict(value.__pydantic_extra__ or {}), dict(value.__pydantic_private__ or {}), beside


def restore_settings(name: str, fields: Fields, extra: Fields, private: Fields | None, beside: Fields) -> Any:
    """The settings with these fields. `private`: None where none are stored.

    Raises:
        UserError: there is no such class any more, or it has other fields.
    """
    kind = load_name(name)
    if not isinstance(kind, type) or not issubclass(kind, BaseModel):
        raise UserError(f"a stored {name} no longer fits its class: {name} is no longer a settings class")
    rule = kind.model_config.get("extra")
    if rule == "forbid" and (gone := sorted((fields.keys() | extra.keys()) - kind.model_fields.keys())):
        raise UserError(f"a stored {name} no longer fits its class: the class has no field {', '.join(gone)} any more")
    held: Fields = {}
    for field, info in kind.model_fields.items():
        if field not in fields and info.is_required():
            raise UserError(f"a stored {name} no longer fits its class: it has no {field}, and no default")
        default = info.get_default
        held[field] = fields[field] if field in fields else default(call_default_factory=True, validated_data=held)
    more = {**extra, **{field: item for field, item in fields.items() if field not in held}}
    made = kind.__new__(kind)
    made.__setstate__(
        {
            "__dict__": {**held, **beside},
            "__pydantic_fields_set__": {*fields, *extra},
            "__pydantic_extra__": more if rule == "allow" else None,
            "__pydantic_private__": private,
        }
    )
    if private is None and kind.__private_attributes__:
        made.model_post_init(None)
    return made


# --- what derives from a type that JSON has ---


def derived_parts(value: Any, where: str) -> tuple[type, str, Any]:
    """(base, name of the class, what the base holds) of an instance of a class derived from one of BASES.

    Raises:
        UserError: it has attributes of its own, or cannot be rebuilt from the base's value.
    """
    kind = type(value)
    base = _base(kind)
    name = name_of(kind, where)
    _check_empty(base, kind, where)
    check_no_more(value, where)
    return base, name, _held(value, base)


def check_no_more(value: Any, where: str) -> None:
    """Refuse an instance of a derived class that has attributes of its own."""
    kind = type(value)
    slots = {slot for each in kind.__mro__ for slot in _slots(each) if hasattr(value, slot)}
    if more := sorted({*getattr(value, "__dict__", {}), *slots}):
        name = f"{kind.__module__}:{kind.__qualname__}"
        raise UserError(f"{where} is a {name} with attributes of its own ({', '.join(more)}), which cannot be stored")


def restore_derived(name: str, held: Any, factory: Callable[[], Any] | None) -> Any:
    """The inverse of `derived_parts`; for a dict, `held` are its items."""
    kind = load_name(name)
    if name.startswith("numpy:"):
        return kind(held)
    base = _base(kind)
    if not issubclass(base, (dict, list)):
        return base.__new__(kind, held)
    made = base.__new__(kind)
    if isinstance(made, list):
        list.extend(made, held)
        return made
    if isinstance(made, defaultdict):
        made.default_factory = factory
    for key, item in held:
        base.__setitem__(made, key, item)
    return made


def restore_named_tuple(name: str, fields: Fields) -> Any:
    """The named tuple with these fields; new fields take their defaults.

    Raises:
        UserError: the class now has other fields.
    """
    kind = load_name(name)
    known: Iterable[str] = getattr(kind, "_fields", ())
    held = {**getattr(kind, "_field_defaults", {}), **fields}
    if wrong := sorted(held.keys() ^ set(known)):
        raise UserError(f"a stored {name} no longer fits its class: it differs in {', '.join(wrong)}")
    return tuple.__new__(kind, [held[field] for field in known])


def is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(type(value), "_fields")


def numpy_scalar(value: Any) -> tuple[str, Any] | None:
    """(name of its class, the same as Python's own) of a numpy number or text; None for anything else."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.generic) or value.dtype.kind not in "biufU":
        return None
    plain = value.item()
    return (f"numpy:{type(value).__name__}", plain) if type(plain) in (bool, int, float, str) else None


def enum_member(name: str, member: str, value: Any, by_value: bool) -> Any:
    """A member by its name, or by its value if it has no name of its own (several flags together).

    Raises:
        UserError: there is no such member any more.
    """
    kind = load_name(name)
    try:
        return kind(value) if by_value else kind[member]
    except (KeyError, ValueError):
        raise UserError(f"a stored {name} no longer fits its class: it has no member {member}") from None


def is_member(value: Enum) -> bool:
    """Whether its name finds it, which is not so for several flags together."""
    return value.name in type(value).__members__


def _held(value: Any, base: Any) -> Any:
    """The base's value, bypassing the class's own methods."""
    if issubclass(base, dict):
        return list(base.items(value))
    if base in (list, tuple):
        return base(base.__iter__(value))
    return {str: str.__str__, int: int.__int__, float: float.__float__}[base](value)


def _base(kind: type) -> Any:
    return next(base for base in kind.__mro__ if base in BASES)


@functools.cache
def _is_safe(base: Any, kind: type) -> bool:
    try:
        base.__new__(kind)
    except TypeError:  # "object.__new__(X) is not safe": instances are more than Python sees
        return False
    return True


def _check_empty(base: type, kind: type, where: str) -> None:
    """Refuse a class that allows no empty instance."""
    if not _is_safe(base, kind):
        plain = f"a {base.__name__}" if base in BASES else "a plain frozen dataclass"
        raise UserError(f"{where} is a {kind.__module__}.{kind.__qualname__}, which cannot be stored: use {plain}")


def _slots(kind: type) -> Iterable[str]:
    slots = kind.__dict__.get("__slots__", ())
    return [slots] if isinstance(slots, str) else [slot for slot in slots if slot not in ("__dict__", "__weakref__")]


def _was_set(value: Any, field: "dataclasses.Field[Any]") -> bool:
    """Whether a field that is no constructor argument differs from its default."""
    return not field.init and hasattr(value, field.name) and getattr(value, field.name) is not field.default


def _is_cached(kind: type, name: str) -> bool:
    return any(isinstance(each.__dict__.get(name), functools.cached_property) for each in kind.__mro__)


def _has_default(field: "dataclasses.Field[Any]") -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _constructed(kind: Callable[..., Any], name: str, made_of: Fields) -> Any:
    try:
        return kind(**made_of)
    except (TypeError, ValueError) as error:
        raise UserError(f"a stored {name} no longer fits its class: {error}") from error
