"""Steps and workflows: the surface of the durable graph.

    @step(num_cpus=1, retries=1, timeout=900)
    def train(corpus: Artifact, lr: float) -> Artifact: ...

    @workflow
    def recipe(settings):
        corpus = build_corpus(settings.corpus)              # a Future, at once
        models = [train(corpus, lr) for lr in (1e-3, 1e-4)]  # edges; both run in parallel
        while score(models[0]).result() < 0.5: ...          # plain Python decides on results

Calling a step inside a workflow gives a Future; a Future passed as (or inside) an argument is an edge. A call's id is
its parent, the step's name, and `name=` or its ordinal: `train[0]`, `train[final]`, `round[1]/train[0]`.

    scores = score.map(split(corpus), models[0])            # one call per item; the list may still be to come
    report(scores)                                          # the list of results, in the items' order

    deploy(train(corpus).model)                             # a field of a future result; also train(corpus)["model"]

A map's calls are `score.map[0]/score[3]`. Waiting for people and for the outside world: workflows.runs.signals.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from numbers import Integral, Real
from typing import Any, Generic, NoReturn, ParamSpec, Protocol, TypeVar, overload

from infra.capacity import check_amount, check_number
from infra.errors import ConfigError, UserError, nearest
from infra.machine import parse_size
from workflows.graph.definitions import check_function, users_line, where
from workflows.graph.futures import Future, Part, refuse_method, told_of_type
from workflows.graph.gangs import Gang, resolve_gang
from workflows.graph.values import field_of, mapped, readable
from workflows.identity.names import canonical_name, load_name

P = ParamSpec("P")
R = TypeVar("R")
LONGEST_TIMEOUT_S = 1e9
"""A longer timeout, over thirty years, means no limit: clocks and operating systems cannot all wait that long."""


@dataclass(frozen=True)
class StepOptions:
    """The options of a call. `memory` in bytes and `timeout` in seconds; None is no limit (as is an infinite timeout).
    `retries`: after the user's own errors and timeouts. `reuse=False`: never take the result from another run
    (deployments, measurements). `may_fail=True`: the workflow handles this call's failure itself, at `.result()`.
    `libraries`: distributions that results depend on, besides those that the code imports. `gang`: several bundles of
    resources, all or none (workflows.graph.gangs); a number means that many bundles of the step's own request."""

    num_cpus: float = 1
    num_gpus: float = 0
    memory: int | None = None
    retries: int = 0
    timeout: float | None = None
    name: str | None = None
    may_fail: bool = False
    reuse: bool = True
    libraries: tuple[str, ...] = ()
    gang: Gang | int | None = None

    def __post_init__(self) -> None:
        for setting, resource in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
            object.__setattr__(self, setting, check_amount(setting, resource, getattr(self, setting)))
        for setting in ("retries", "memory"):
            object.__setattr__(self, setting, _whole_number(setting, getattr(self, setting)))
        object.__setattr__(self, "timeout", _timeout(self.timeout))
        if self.name is not None and not isinstance(self.name, str):
            raise ConfigError(f"name={self.name!r}: must be text; of a Future, take its .result()")
        if self.name is not None and (not self.name or any(letter in self.name for letter in "/[]")):
            raise ConfigError(f"name={self.name!r}: must be non-empty and without / [ ]")
        if self.name is not None and readable(self.name) != self.name:
            raise ConfigError(f"name={self.name!r}: must be valid Unicode")
        object.__setattr__(self, "libraries", _names(self.libraries))
        if self.gang is not None:
            resolve_gang(self.gang, self.request)

    @property
    def request(self) -> dict[str, float]:
        """The body's own resources, by Ray's names."""
        asked = {"CPU": float(self.num_cpus), "GPU": float(self.num_gpus), "memory": float(self.memory or 0)}
        return {name: amount for name, amount in asked.items() if amount}

    def whole_gang(self) -> Gang | None:
        """`gang` in full."""
        return None if self.gang is None else resolve_gang(self.gang, self.request)


class Runtime(Protocol):
    """Carries out the calls of a running workflow: the executor or the planner."""

    @property
    def run_id(self) -> str: ...

    def call(self, call_id: str, step: "Step[..., Any]", options: StepOptions, arguments: dict[str, Any]) -> object:
        """Begin a call. Its Future keeps the returned object, so that the result lives as long as the Future."""
        ...

    def map(self, call_id: str, step: "Step[..., Any]", options: StepOptions, items: Any, arguments: Any) -> object: ...

    def result(self, call_id: str) -> Any: ...

    def done(self, call_id: str) -> bool: ...

    def on_end(self, hook: Callable[[], None]) -> None: ...


@dataclass
class _Scope:
    """The place of calls: the runtime, the parent call, the next ordinal of each step, and the names given with `name=`
    (ordinals are not stored: they cannot come twice)."""

    runtime: Runtime
    parent: str = ""
    ordinals: Counter[str] = field(default_factory=Counter)
    names: set[tuple[str, str]] = field(default_factory=set)

    def call_id(self, step_name: str, name: str | None) -> str:
        if name is None:
            name = str(self.ordinals[step_name])
            self.ordinals[step_name] += 1
            taken = bool(self.names) and (step_name, name) in self.names
        else:
            taken = (step_name, name) in self.names or (name.isdecimal() and int(name) < self.ordinals[step_name])
            self.names.add((step_name, name))
        call_id = f"{self.parent}/{step_name}[{name}]".lstrip("/")
        if taken:
            raise UserError(f"two calls are named {call_id}: give each its own name=")
        return call_id


_scope: ContextVar[_Scope] = ContextVar("recua_scope")


class Each(Enum):
    """Stands for the item in the arguments of a map."""

    ITEM = "item"


EACH = Each.ITEM


class Keep(Enum):
    """Stands for an option that is not given; None has a meaning of its own."""

    KEEP = "keep"


KEEP = Keep.KEEP


class Step(Generic[P, R]):
    """A plain function that a workflow can call durably. `fn` is the function itself, for tests and other code."""

    def __init__(self, fn: Callable[P, R], options: StepOptions) -> None:
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.default = options
        self.short_name = fn.__name__

    @functools.cached_property
    def name(self) -> str:
        """Canonical `module:function`, under which workers find the function.

        Raises:
            UserError: workers would find another function under that name.
        """
        name = canonical_name(self.fn)
        if (found := function_behind(load_name(name))) is not self.fn:
            raise UserError(
                f"{where(self.fn)}: workers would not find step {self.short_name}, for {name} is {found!r}: put @step "
                "above other decorators, or use functools.wraps in them, and define each name once"
            )
        return name

    def __call__(self, *args: Any, **kwargs: Any) -> Future[R]:
        """Call the step durably; any argument, or part of one, may be a Future or a field of one."""
        return self.submit(self.default, args, kwargs)

    def map(self, items: Any, *args: Any, **kwargs: Any) -> Future[list[R]]:
        """One call per item, which becomes the step's first argument; the other arguments are the same for all.

        `items`: a list, or a Future (or field of one) whose result is a list. `map` returns at once; the calls are made
        when the list is there. The result is the list of results in the items' order. A failed call fails the map (with
        `may_fail=True` once all calls have ended, with the first failure in the items' order).

        Raises:
            UserError: `items` is no list.
        """
        if not isinstance(items, (list, tuple, range, Future, Part)):
            hint = "; write list(...) around it" if isinstance(items, Iterable) else ""
            raise UserError(
                f"{self.short_name}.map: the items must be a list or the Future of one, not a "
                f"{type(items).__name__}{hint}"
            )
        scope = self._scope()
        arguments = self._bind((EACH, *args), kwargs)
        call_id = scope.call_id(f"{self.short_name}.map", self.default.name)
        items = items if isinstance(items, (Future, Part)) else list(items)
        kept = scope.runtime.map(call_id, self, replace(self.default, name=None), items, arguments)
        return Future(scope.runtime, call_id, kept)

    def options(
        self,
        *,
        num_cpus: float | None = None,
        num_gpus: float | None = None,
        memory: str | int | Keep | None = KEEP,
        retries: int | None = None,
        timeout: float | Keep | None = KEEP,
        name: str | Keep | None = KEEP,
        may_fail: bool | None = None,
        gang: Gang | int | Keep | None = KEEP,
    ) -> "Step[P, R]":
        """The step with other options: `train.options(num_gpus=8, name="final")(corpus)`, and so for `map`. Options
        that are not given stay as they are; None removes the step's own `memory`, `timeout`, `name` or `gang`."""
        amounts = {"num_cpus": num_cpus, "num_gpus": num_gpus, "retries": retries, "may_fail": may_fail}
        changes: dict[str, Any] = {key: value for key, value in amounts.items() if value is not None}
        limits = {"memory": memory, "timeout": timeout, "name": name, "gang": gang}
        changes |= {key: value for key, value in limits.items() if value is not KEEP}
        with _named(self.short_name):
            if isinstance(memory, (str, int)):
                changes["memory"] = parse_memory(memory)
            return type(self)(self.fn, replace(self.default, **changes))

    def submit(self, options: StepOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[R]:
        """Call the step with these options, as `__call__` does with its own."""
        scope = self._scope()
        arguments = self._bind(args, kwargs)
        call_id = scope.call_id(self.short_name, options.name)
        kept = scope.runtime.call(call_id, self, options, arguments)
        return Future(scope.runtime, call_id, kept)

    def _scope(self) -> _Scope:
        try:
            scope = _scope.get()
        except LookupError:
            raise UserError(
                f"step {self.short_name} was called outside a @workflow; for a plain call use {self.short_name}.fn(...)"
            ) from None
        assert self.name  # raises here if workers would not find the function, instead of on a worker
        return scope

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            bound = _signature(self.fn).bind(*args, **kwargs)
        except TypeError as error:
            raise UserError(f"step {self.short_name} ({where(self.fn)}): {error}") from None
        bound.apply_defaults()
        return {"args": list(bound.args), "kwargs": dict(bound.kwargs)}


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def step_behind(found: Any) -> Step[..., Any] | None:
    """The step that a name stands for, given the object `found` under it: the step itself, a step below decorators, or
    the plain function that was passed to `step(...)` if the step has another name."""
    inner = found
    while inner is not None and not isinstance(inner, Step):
        inner = getattr(inner, "__wrapped__", None)
    if inner is None and inspect.isfunction(found):
        return Step(found, StepOptions())
    return inner


def function_behind(found: Any) -> Any:
    """The function of the step that a name stands for; `found` itself if it is no step."""
    step = step_behind(found)
    return found if step is None else step.fn


class Workflow(Generic[P, R]):
    """A function that calls steps. Inside another workflow it runs in place, its calls named below its own name."""

    def __init__(self, fn: Callable[P, R]) -> None:
        check_function(fn, "workflow")
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.short_name = fn.__name__

    @functools.cached_property
    def name(self) -> str:
        """Canonical `module:function`."""
        return canonical_name(self.fn)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            scope = _scope.get()
        except LookupError:
            raise UserError(
                f"workflow {self.short_name}: start it with `recua run` or workflows.driver.session.run"
            ) from None
        inner = _Scope(scope.runtime, scope.call_id(self.short_name, None))
        token = _scope.set(inner)
        try:
            return self.fn(*args, **kwargs)
        finally:
            _scope.reset(token)


@overload
def step(fn: Callable[P, R], /) -> Step[P, R]: ...


@overload
def step(
    *,
    num_cpus: float = 1,
    num_gpus: float = 0,
    memory: str | int | None = None,
    retries: int = 0,
    timeout: float | None = None,
    reuse: bool = True,
    libraries: tuple[str, ...] = (),
    gang: Gang | int | None = None,
) -> Callable[[Callable[P, R]], Step[P, R]]: ...


def step(fn: Callable[..., Any] | None = None, /, *, memory: str | int | None = None, **options: Any) -> Any:
    """Make a function a step. `memory` in bytes or as text ("2GiB"), `timeout` in seconds; see StepOptions.

    Raises:
        UserError: the function (with file and line) or an option is wrong.
    """
    known = [each.name for each in fields(StepOptions)]
    for name in options.keys() - set(known):
        raise ConfigError(f"{users_line()}: @step has no option {name}{nearest(name, known)}")

    def make(function: Callable[..., Any]) -> Step[..., Any]:
        with _named(getattr(function, "__name__", repr(function))):
            settings = StepOptions(memory=None if memory is None else parse_memory(memory), **options)
        check_function(function, "step")
        return Step(function, settings)

    return make if fn is None else make(fn)


@overload
def workflow(fn: Callable[P, R], /) -> Workflow[P, R]: ...


@overload
def workflow(*nothing: NoReturn, **options: NoReturn) -> NoReturn: ...


def workflow(*functions: Any, **options: Any) -> Any:
    """Make a function a workflow: run it with `recua run` or `workflows.driver.session.run`. It takes no options.

    Raises:
        UserError: the function or its decorator is wrong; the message has file and line.
    """
    if len(functions) != 1 or options:
        given = ", ".join([*map(repr, functions[1:]), *(f"{name}=" for name in options)])
        raise UserError(f"{users_line()}: @workflow takes no options: write it without ({given})")
    return Workflow(functions[0])


def on_end(hook: Callable[[], None]) -> None:
    """Inside a workflow: call `hook()` on the driver when the run ends, however it ends (this releases pools)."""
    _scope.get().runtime.on_end(hook)


def run_id() -> str:
    """Inside a workflow: the run's id, e.g. to name resources that `on_end` releases. No decision may depend on it."""
    return _scope.get().runtime.run_id


@contextmanager
def running(runtime: Runtime) -> Iterator[None]:
    """Route the calls made in this block to `runtime`.

    Raises:
        UserError: a Future was passed to code that takes only values, or a workflow calls itself without end.
    """
    token = _scope.set(_Scope(runtime))
    try:
        yield
    except TypeError as error:
        raise (told_of_type(error) or error) from error.__cause__
    except RecursionError as error:
        raise UserError(f"{users_line(error)}: {error}: a workflow that calls itself needs an end; or loop") from None
    finally:
        _scope.reset(token)


def edges_of(runtime: Runtime, needs: list[str]) -> Callable[[Any], Any]:
    """For `values.encode`: futures become {"$edge": call id, "field": name or None}; `needs` collects the call ids."""

    def replace_future(value: Any) -> Any:
        refuse_method(value)
        future = value.future if isinstance(value, Part) else value
        if not isinstance(future, Future):
            return None
        if future._runtime is not runtime:
            raise UserError(f"{value!r} belongs to another run")
        needs.append(future.call_id)
        return {"$edge": future.call_id, "field": value.field if isinstance(value, Part) else None}

    return replace_future


def resolve_edges(tree: Any, result_of: Callable[[str], Any]) -> Any:
    """Replace edges by the encoded results that they stand for. Parts without edges are not copied."""
    if isinstance(tree, dict) and "$edge" in tree:
        return field_of(result_of(tree["$edge"]), tree["field"], tree["$edge"])
    return mapped(tree, lambda item: resolve_edges(item, result_of))


def parse_memory(text: str | int) -> int:
    """Bytes from 1024, "512MiB", "2GiB", "1.5GB".

    Raises:
        ConfigError: anything else.
    """
    return parse_size(text, "memory") if isinstance(text, str) else text


@contextmanager
def _named(step_name: str) -> Iterator[None]:
    """Put the step's name before the message of a refused option."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"step {step_name}: {error}") from None


def _whole_number(setting: str, value: Any) -> int | None:
    if value is None and setting == "memory":
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"{setting}={value!r}: must be a whole number")
    if value < 0:
        raise ConfigError(f"{setting}={value}: must not be negative")
    return int(value)


def _names(libraries: Any) -> tuple[str, ...]:
    listed = isinstance(libraries, (list, tuple))
    if not listed or not all(isinstance(name, str) for name in libraries):
        raise ConfigError(f"libraries={libraries!r}: must be names of distributions, as in libraries=('numpy',)")
    return tuple(libraries)


def _timeout(value: Any) -> float | None:
    """Seconds, or None for no limit."""
    number = isinstance(value, Real)
    if value is None or (number and value > LONGEST_TIMEOUT_S):
        return None
    seconds = check_number("timeout", value)
    if seconds <= 0:
        raise ConfigError(f"timeout={value}: must be positive seconds, or None")
    return seconds
