"""The base class of all settings, and the reading of recipe files.

A recipe is TOML; its shape is a tree of frozen pydantic models. The docstring under a field is its documentation.
This module imports neither torch nor ray nor vllm, so that `recua --help` stays fast.
"""

import json
import math
import re
import tomllib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic.errors import PydanticUserError

from infra.capacity import check_amount
from infra.errors import ConfigError, nearest

LONGEST_S = 1e9
"""About thirty years; clocks overflow beyond it."""
Seconds = Annotated[float, Field(gt=0, le=LONGEST_S)]
"""A duration above 0."""
Pause = Annotated[float, Field(ge=0, le=LONGEST_S)]
"""A duration that may be 0."""


def _counted(resource: str) -> AfterValidator:
    def check(amount: float) -> float:
        try:
            return check_amount("amount", resource, amount)
        except ConfigError as error:
            raise ValueError(str(error).partition(": ")[2]) from None

    return AfterValidator(check)


Cpus = Annotated[float, _counted("CPU")]
"""CPUs that Ray books."""
Gpus = Annotated[float, _counted("GPU")]
"""GPUs that Ray books: a whole number, or a part of one."""
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
"""A seed that numpy, torch and vLLM all accept."""


class Settings(BaseModel):
    """Frozen; refuses unknown keys; keeps field docstrings. A number must fit 64 bits and must not be a boolean. It
    must be finite unless its field says `allow_inf_nan=True` or has an infinite default."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        kinds = [vars(each).get("__annotations__", {}) for each in reversed(cls.__mro__)]
        declared = {name: kind for annotations in kinds for name, kind in annotations.items()}
        # pydantic allows no such validator on a Literal that chooses among the classes of a union
        checked = [name for name, kind in declared.items() if not name.startswith("_") and not _is_literal(kind)]
        if checked:
            check = field_validator(*checked, mode="wrap", check_fields=False)
            cls._numbers = check(classmethod(_numbers))  # type: ignore[attr-defined]


def _numbers(cls: type[Settings], value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    field = cls.model_fields[info.field_name or ""]
    if isinstance(value, float) and not math.isfinite(value) and repr(value) == repr(field.default):
        return value
    kinds = set(_members(field.annotation))
    if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
        raise ValueError(f"must be a number, not {json.dumps(value)}")
    checked = check(value)
    if type(checked) is int and not -(1 << 63) <= checked < 1 << 63:
        raise ValueError("does not fit 64 bits")
    return checked


def _is_literal(kind: Any) -> bool:
    """Whether an annotation, which may still be text, is a Literal."""
    return "Literal[" in kind if isinstance(kind, str) else get_origin(kind) is Literal


S = TypeVar("S", bound=Settings)


def load(path: str | Path | None, schema: type[S], overrides: Sequence[str] = ()) -> S:
    """Read `path` (None: an empty recipe), apply `--set section.key=value` overrides, validate.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown (the message names the nearest known one), or a
            value has the wrong type. One line per problem.
    """
    return build(read_tree(path), schema, "recipe" if path is None else str(path), overrides)


def build(tree: dict[str, Any], schema: type[S], source: str, overrides: Sequence[str] = ()) -> S:
    """`schema` from a recipe's tree; writes the overrides into the tree. An override's value is read by its setting's
    type: `version=1.10` is text if `version` is a `str`, and a number if it is a `float`.

    Raises:
        ConfigError: as `load`.
    """
    given: set[str] = set()
    for override in overrides:
        location, text = split_override(override)
        _put(tree, location, read_value(text, kind_at(schema, location)), override)
        given.add(".".join(location))
    return validate(tree, schema, source, given)


def read_tree(path: str | Path | None) -> dict[str, Any]:
    """The tree of a recipe file, not validated.

    Raises:
        ConfigError: the file is missing or not TOML.
    """
    return {} if path is None else parse_tree(read_text(path), str(path))


def read_text(path: str | Path) -> str:
    """The text of a recipe file, without the byte order mark that some editors add.

    Raises:
        ConfigError: the file is missing or not text.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"recipe {path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path}: not valid TOML: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def parse_tree(text: str, source: str) -> dict[str, Any]:
    """A recipe's text as a tree, not validated; errors call it `source`."""
    try:
        return tomllib.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:  # also for a number of thousands of digits, or very deep brackets
        raise ConfigError(f"recipe {source}: not valid TOML: {error}") from None


_PART = re.compile(r"""\s*("(?:[^"\\]|\\.)*"\s*|'[^']*'\s*|[^."'=][^.=]*)([.=])""")


def split_override(override: str) -> tuple[list[str], str]:
    """The parts of the key in `section.key=value`, and the text of the value. A quoted part may contain any character.

    Raises:
        ConfigError: the override has another form.
    """
    location: list[str] = []
    at = 0
    while found := _PART.match(override, at):
        name, at = found[1].strip(), found.end()
        if name[:1] in ("'", '"'):
            try:
                name = next(iter(tomllib.loads(f"{name} = 0")))
            except tomllib.TOMLDecodeError:
                break
        location.append(name)
        if found[2] == "=":
            return location, override[at:]
    raise ConfigError(f"--set {override!r}: write it as section.key=value")


def read_value(text: str, kind: Any) -> Any:
    """The value of `text` for a setting of type `kind` (as in an annotation; Any if unknown), not validated.

    It is TOML's value of the text if `kind` accepts that; else the text itself if `kind` accepts that. `True` and
    `False` count as TOML's booleans. `none` is None if `kind` allows None; in quotes it is text.
    """
    value = _toml(text)
    if kind is Any or (isinstance(value, str) and value is not text):
        return value
    if text.lower() in ("none", "null") and NoneType in _members(kind):
        return None
    try:
        adapter = TypeAdapter(kind)
    except (PydanticUserError, NameError, TypeError):  # values cannot be checked against this type
        return value
    if _takes(adapter, value, strict=True):
        return value
    if _takes(adapter, text, strict=False):
        return text
    return value


def kind_at(kind: Any, location: Sequence[str]) -> Any:
    """The type of the setting at `location` inside a type; Any if it does not exist or is unknown."""
    for part in location:
        kind = _inside(kind, part)
    return kind


def validate(tree: dict[str, Any], schema: type[S], source: str = "recipe", overridden: Collection[str] = ()) -> S:
    """Build `schema` from a parsed tree. Every problem becomes one line that names the setting and where its value came
    from: --set for the `overridden` settings, else `source`."""

    def line(problem: Any) -> str:
        name = ".".join(str(part) for part in problem["loc"])
        given = any(f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.") for key in overridden)
        return f"{'--set' if name and given else source}: {_explain(problem, schema)}"

    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(line(problem) for problem in error.errors())) from None


def _put(tree: dict[str, Any], location: Sequence[str], value: Any, override: str) -> None:
    node = tree
    *parents, leaf = location
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
    node[leaf] = value


def _toml(text: str) -> Any:
    """TOML's value of the text, or of Python's True and False; the same text if TOML cannot read it."""
    if text in ("True", "False"):
        return text == "True"
    try:
        tree = tomllib.loads(f"v = {text}")
    except (ValueError, RecursionError):
        return text
    return tree["v"] if len(tree) == 1 else text


def _takes(adapter: TypeAdapter[Any], value: Any, strict: bool) -> bool:
    try:
        adapter.validate_python(value, strict=strict)
    except ValidationError:
        return False
    return True


def _members(kind: Any) -> Iterator[Any]:
    """The members of a union, or the type itself, without annotations."""
    if get_origin(kind) is Annotated:
        yield from _members(get_args(kind)[0])
    elif get_origin(kind) in (Union, UnionType):
        for one in get_args(kind):
            yield from _members(one)
    else:
        yield kind


def _fields(kind: type[BaseModel]) -> dict[str, Any]:
    """The types of a section's settings, by their names in a recipe."""
    return {field.alias or name: field.annotation for name, field in kind.model_fields.items()}


def _inside(kind: Any, part: str) -> Any:
    """The type of the part `part` of `kind`, which may be a section, a table, or a list of sections."""
    for one in _members(kind):
        if isinstance(one, type) and issubclass(one, BaseModel):
            if part in (fields := _fields(one)):
                return fields[part]
        elif inner := [each for each in get_args(one) if each is not Ellipsis]:
            return inner[-1]
    return Any


def _explain(problem: Any, schema: type[Settings]) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        *section, key = location
        prefix = "".join(f"{part}." for part in section)
        return f"unknown setting {name}{nearest(key, _keys_at(schema, section), prefix)}"
    if problem["type"] == "missing":
        return f"{name} is missing: give --recipe FILE or --set {name}=VALUE"
    if problem["type"] == "value_error":  # our own validators say what is wrong, and with which values
        return f"{name or 'recipe'}: {str(problem['msg']).removeprefix('Value error, ')}"
    given = problem.get("input")
    quotes = "; write it in quotes" if problem["type"] == "string_type" and not isinstance(given, (list, dict)) else ""
    if problem["type"] in ("tuple_type", "list_type") and isinstance(given, str):
        quotes = f"; write a list: [{json.dumps(given)}]"
    shown = json.dumps(given, default=str)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return f"{name or 'recipe'}: {problem['msg']}{quotes} (got {shown})"


def _keys_at(schema: type[BaseModel], location: list[str]) -> list[str]:
    """The settings of the section at `location`, which may be inside a table or a list of sections."""
    sections = [
        one for one in _members(kind_at(schema, location)) if isinstance(one, type) and issubclass(one, BaseModel)
    ]
    return sorted(_fields(sections[0])) if sections else []
