"""Checks whether a function can be a step or a workflow, at its definition instead of later on a worker."""

import functools
import inspect
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.errors import UserError

OURS = {str(Path(__file__).with_name(name)) for name in ("definitions.py", "futures.py", "steps.py")}
TOP = "define it with def at the top of a module, so that workers find it"


def check_function(thing: Any, what: str) -> None:
    """Refuse anything but a plain function; for a `what` of "step", also a function that workers cannot import.

    Raises:
        UserError: with file and line of the definition, the problem, and what to write.
    """
    problem = _no_function(thing) if not inspect.isfunction(thing) else _kind_of_body(thing)
    if problem is None and what == "step":
        problem = _out_of_reach(thing)
    if problem is not None:
        raise UserError(f"{users_line()}: @{what} was given {problem}")


def where(function: Callable[..., Any]) -> str:
    """file:line of a function."""
    code = inspect.unwrap(function).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def _no_function(thing: Any) -> str:
    """The problem in words, and what to write."""
    own = "write a def that calls it"
    if isinstance(thing, functools.partial):
        return f"a functools.partial: {own}"
    if isinstance(thing, functools._lru_cache_wrapper):
        return "a function behind functools.cache: remove the cache, results of steps are kept anyway"
    if isinstance(thing, (staticmethod, classmethod)):
        return f"a {type(thing).__name__}: write @{type(thing).__name__} above it, or {TOP}"
    if inspect.isclass(thing):
        return f"the class {thing.__name__}: {own}"
    if inspect.ismethod(thing):
        return f"the method {thing.__qualname__} of an object: {own}"
    if inspect.isroutine(thing):
        return f"the built-in {thing.__name__}: {own}"
    if hasattr(thing, "short_name"):  # a Step or a Workflow
        return f"the {type(thing).__name__.lower()} {thing.short_name}, which is already one"
    if callable(thing):
        return f"an object of class {type(thing).__name__}: {own}"
    return f"{thing!r}, which is not a function: give options by name, as in num_cpus=1"


def _kind_of_body(function: Any) -> str | None:
    name = function.__name__
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return f"the async function {name}: write a plain def, with asyncio.run(...) inside"
    if inspect.isgeneratorfunction(function):
        return f"{name}, which yields: return a list"
    return None


def _out_of_reach(function: Any) -> str | None:
    name: str = function.__qualname__
    if name.endswith("<lambda>"):
        return f"a lambda: {TOP}"
    if "<locals>" in name:
        return f"{name}, a function inside another one: {TOP}; if a decorator made it, add functools.wraps to that"
    if "." in name and next(iter(inspect.signature(function).parameters), "") in ("self", "cls"):
        return f"the method {name}: {TOP}"
    return None


def users_line(error: BaseException | None = None) -> str:
    """file:line of the user's code that led here, or to an error; code of recua, Python and libraries is skipped."""
    python = sysconfig.get_path("stdlib")
    found = traceback.extract_stack() if error is None else traceback.extract_tb(error.__traceback__)
    stack = [frame for frame in found if frame.filename not in OURS]
    users = [frame for frame in stack if not frame.filename.startswith((python, "<"))]
    users = [frame for frame in users if "site-packages" not in frame.filename]
    frame = (users or stack)[-1]
    return f"{frame.filename}:{frame.lineno}"
