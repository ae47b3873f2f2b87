"""The arguments of a workflow without a RECIPE: a recipe's top-level keys, checked against the function's annotations.

    @workflow
    def flow(dry_run: bool = True, version: str = "", rates: tuple[float, ...] = (), **more): ...

`--set dry_run=False` is False, `--set version=1.10` the text "1.10", `--set rates=high` an error that names `rates`. A
parameter without an annotation has its default's type if that is `bool` or `str`. Any other takes TOML's value, else
the text, and `none` is None if that is its default. `**more` takes all other keys, with the type of its annotation.
"""

import inspect
import math
import typing
from collections import abc
from collections.abc import Collection, Sequence
from datetime import date, time
from inspect import Parameter
from types import SimpleNamespace
from typing import Any, get_args, get_origin

from pydantic import Field, TypeAdapter, create_model
from pydantic.errors import PydanticUserError

from infra.config import Settings, build, split_override
from infra.errors import ConfigError, UserError
from workflows.graph.steps import Workflow
from workflows.graph.values import encode


def arguments_of(
    workflow: Workflow[..., Any], tree: dict[str, Any], source: str, overrides: Sequence[str] = ()
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments of `workflow` from a recipe that was read from `source`, and overrides.

    Raises:
        ConfigError: a key without a parameter, a value of another type, a value that cannot be stored, or a parameter
            without a value.
    """
    given = [*tree, *(split_override(override)[0][0] for override in overrides)]
    parameters = inspect.signature(workflow.fn).parameters.values()
    for parameter in parameters:
        if parameter.kind is Parameter.VAR_POSITIONAL and parameter.name in given:
            hint = "a recipe gives values by name: use a named parameter"
            raise ConfigError(f"{source}: workflow {workflow.short_name} takes *{parameter.name}; {hint}")
    schema, from_file = schema_of(workflow, given), set(tree)
    settings = build(tree, schema, source, overrides)
    checked = {str(schema.model_fields[field].alias): getattr(settings, field) for field in settings.model_fields_set}
    values = {name: _kept(tree[name], checked[name]) for name in tree}
    for name, value in values.items():
        _check_kept(value, f"{'--set' if name not in from_file else source}: {name}")
    first = [parameter for parameter in parameters if parameter.kind is Parameter.POSITIONAL_ONLY]
    while first and first[-1].name not in values:
        first.pop()
    return tuple(values.pop(parameter.name, parameter.default) for parameter in first), values


def schema_of(workflow: Workflow[..., Any], given: Collection[str]) -> type[Settings]:
    """Settings whose keys are the workflow's parameters; `given` are the keys that `**more` may have to take."""
    fields: dict[str, Any] = {}
    parameters = inspect.signature(workflow.fn).parameters
    for parameter in parameters.values():
        kind, default = _kind(workflow, parameter), _default(parameter)
        names = [parameter.name]
        if parameter.kind is Parameter.VAR_KEYWORD:
            names, default = [name for name in given if name == parameter.name or name not in parameters], None
        elif parameter.kind is Parameter.VAR_POSITIONAL:
            continue
        for name in names:  # under aliases, because pydantic keeps some names to itself
            fields[f"p{len(fields)}"] = (kind, Field(default, alias=name, validate_default=False))
    return create_model(workflow.short_name, __base__=Settings, **fields)


def _default(parameter: Parameter) -> Any:
    """The default that Settings see: None for any value that is not a number, because only its presence counts."""
    if isinstance(parameter.default, float) and not math.isfinite(parameter.default):
        return parameter.default
    return ... if parameter.default is Parameter.empty else None


def _kind(workflow: Workflow[..., Any], parameter: Parameter) -> Any:
    """A parameter's type; Any if it has none, or one that values cannot be checked against."""
    if parameter.annotation is Parameter.empty:
        known = {bool: bool, str: str, type(None): Any | None}
        return known.get(type(parameter.default), Any)
    spelled = SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        kind = typing.get_type_hints(spelled, workflow.fn.__globals__, include_extras=True)[parameter.name]
        if get_origin(kind) in (abc.Iterable, abc.Iterator):
            kind = list[get_args(kind)]  # type: ignore[misc]
        TypeAdapter(kind)
    except (PydanticUserError, NameError, TypeError, AttributeError, SyntaxError):
        return Any
    return kind


def _kept(given: Any, checked: Any) -> Any:
    """The checked value. 1 for a float stays 1, because it is equal to 1.0 but has another content key."""
    if type(given) is int and type(checked) is float:
        return given if given == checked else checked
    if type(given) is list and type(checked) is list:
        return [_kept(*pair) for pair in zip(given, checked, strict=True)]
    if type(given) is dict and type(checked) is dict and given.keys() == checked.keys():
        return {name: _kept(given[name], item) for name, item in checked.items()}
    return checked


def _check_kept(value: Any, where: str) -> None:
    """Refuse a value that a run cannot store (a date, a set), naming its parameter."""
    try:
        encode(value, where)
    except UserError as error:
        hint = "; annotate it as str, and write it in quotes" if isinstance(value, (date, time)) else ""
        raise ConfigError(f"{error}{hint}") from None
