"""The base of every settings class, and the one way to read a recipe file.

A recipe is TOML; its shape is a tree of frozen pydantic models. The docstring under a field is its documentation.
This module imports neither torch nor ray nor vllm, so that `recua --help` stays fast.
"""

import difflib
import json
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.errors import ConfigError


class Settings(BaseModel):
    """Frozen, unknown keys refused, field docstrings kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


S = TypeVar("S", bound=Settings)


def load(path: str | Path | None, schema: type[S], overrides: Sequence[str] = ()) -> S:
    """Read `path` (None: an empty recipe), apply `--set section.key=value` overrides, validate.

    Raises:
        ConfigError: the file is missing or is no TOML, a key is unknown (the nearest known one is named), a value has
            the wrong type. One line per problem.
    """
    source = "recipe" if path is None else str(path)
    return validate(read_tree(path, overrides), schema, source, {override.partition("=")[0] for override in overrides})


def read_tree(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe as TOML says it, overrides applied, not validated.

    Raises:
        ConfigError: the file is missing or is no TOML, or an override is malformed.
    """
    return parse_tree("" if path is None else read_text(path), str(path), overrides)


def read_text(path: str | Path) -> str:
    """The text of a recipe file.

    Raises:
        ConfigError: the file is missing or is no text.
    """
    try:
        return Path(path).read_text()
    except FileNotFoundError:
        raise ConfigError(f"recipe {path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path}: not valid TOML: {error}") from None


def parse_tree(text: str, source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe's text as a tree, overrides applied, not validated; errors call it `source`."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {source}: not valid TOML: {error}") from None
    return override_tree(tree, overrides)


def override_tree(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `--set section.key=value` to a tree, in place.

    Raises:
        ConfigError: an override is malformed.
    """
    for override in overrides:
        _apply_override(tree, override)
    return tree


def validate(tree: dict[str, Any], schema: type[S], source: str = "recipe", overridden: Collection[str] = ()) -> S:
    """Build `schema` from a parsed tree; every problem becomes one line that names the setting, and `source` or, for
    the `overridden` settings, --set as where it was given."""

    def line(problem: Any) -> str:
        name = ".".join(str(part) for part in problem["loc"])
        given = any(f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.") for key in overridden)
        return f"{'--set' if name and given else source}: {_explain(problem, schema)}"

    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(line(problem) for problem in error.errors())) from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: write it as section.key=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
    node[leaf] = value


def _explain(problem: Any, schema: type[Settings]) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _keys_at(schema, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.4)
        hint = f"; did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"; known: {', '.join(known)}"
        return f"unknown setting {name}{hint}"
    if problem["type"] == "value_error":  # our own validators say what is wrong, and with which values
        return f"{name or 'recipe'}: {str(problem['msg']).removeprefix('Value error, ')}"
    shown = json.dumps(problem.get("input"), default=str)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return f"{name or 'recipe'}: {problem['msg']} (got {shown})"


def _keys_at(schema: type[BaseModel], location: list[str]) -> list[str]:
    """The settings of the section at `location`, which may lie in a table or a list of sections."""
    here: Any = schema
    for part in location:
        if isinstance(here, type) and issubclass(here, BaseModel):
            field = here.model_fields.get(part)
            here = field.annotation if field else None
        else:
            inner = [one for one in get_args(here) if one is not Ellipsis]
            here = inner[-1] if inner else None
        if get_origin(here) in (Union, UnionType):  # a section that may be left out
            here = next((one for one in get_args(here) if one is not NoneType), None)
    return sorted(here.model_fields) if isinstance(here, type) and issubclass(here, BaseModel) else []
