"""What cannot be a step says so where it is defined, with file, line and what to write."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from infra.errors import ConfigError, UserError
from workflows.graph import steps
from workflows.graph.steps import Step, function_behind, step, step_behind, workflow
from workflows.identity.fingerprint import Fingerprinter
from workflows.identity.names import load_name


def train(x: int) -> int:
    return x + 1


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


def careless(function: Callable[..., Any]) -> Callable[..., Any]:
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


train_big = step(num_cpus=2)(train)
train_small = train_big.options(num_cpus=1)
other_train = step(wrapped(train))


@wrapped
@step
def above(x: int) -> int:
    return x + 1


@functools.cache
@step
def cached_above(x: int) -> int:
    return x + 1


@step
@wrapped
def below(x: int) -> int:
    return x + 1


@careless
@step
def careless_above(x: int) -> int:
    return x + 1


@step
def twice(x: int) -> int:
    return x


first_twice = twice


@step  # type: ignore[no-redef]
def twice(x: int) -> int:
    return 2 * x


class Steps:
    @step
    def inside(x: int) -> int:  # type: ignore[misc]
        return x

    @staticmethod
    @step
    def static(x: int) -> int:
        return x


class Runtime:
    """Takes every call."""

    run_id = "r"

    def call(self, call_id: str, called: Step[..., Any], options: Any, arguments: Any) -> str:
        return called.name


@pytest.mark.parametrize(
    "made", [train_big, train_small, above, cached_above, below, twice, Steps.inside, Steps.static]
)
def test_workers_find_the_function_of_a_step(made: Any) -> None:
    with steps.running(Runtime()):  # type: ignore[arg-type]
        name = made(1)._kept
    found = step_behind(load_name(name))
    assert found is not None and found.fn is function_behind(made), name


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (careless_above, r"step careless_above, for .*:careless_above is <function careless.<locals>.inner"),
        (first_twice, r"step twice, for .*:twice is <function twice"),
        (other_train, r"step train, for .*:train is <function train"),
    ],
)
def test_a_name_that_leads_elsewhere_is_refused_before_anything_runs(made: Any, what: str) -> None:
    with (
        steps.running(Runtime()),  # type: ignore[arg-type]
        pytest.raises(UserError, match=rf"test_definitions.py:\d+: workers would not find {what}.*functools.wraps"),
    ):
        made(1)


async def asynchronous() -> None: ...


async def asynchronous_items() -> Any:
    yield 1


def items() -> Iterator[int]:
    yield 1


class Callee:
    def __call__(self) -> int:
        return 1

    def method(self) -> int:
        return 1


def nested() -> Any:
    def inner() -> None: ...

    return inner


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (functools.partial(train, 1), "a functools.partial: write a def"),
        (functools.cache(train), "a function behind functools.cache: remove the cache"),
        (functools.lru_cache(maxsize=1)(train), "a function behind functools.cache"),
        (len, "the built-in len"),
        (asynchronous, r"the async function asynchronous: .*asyncio.run"),
        (asynchronous_items, "the async function"),
        (items, "items, which yields: return a list"),
        (Callee, "the class Callee"),
        (Callee(), "an object of class Callee"),
        (Callee().method, "the method Callee.method of an object"),
        (staticmethod(train), "a staticmethod: write @staticmethod above it"),
        (train_big, "the step train, which is already one"),
        (2, "2, which is not a function: give options by name"),
    ],
)
@pytest.mark.parametrize(("make", "word"), [(step, "step"), (workflow, "workflow")])
def test_what_is_no_plain_function_is_refused_where_it_is_defined(
    make: Any, word: str, thing: Any, message: str
) -> None:
    with pytest.raises(UserError, match=rf"test_definitions.py:\d+: @{word} was given {message}"):
        make(thing)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (lambda x: x, "a lambda: define it with def at the top of a module"),
        (nested(), "nested.<locals>.inner, a function inside another one: define it .*top of a module"),
        (careless(train), "careless.<locals>.inner, .*add functools.wraps"),
        (Callee.method, "the method Callee.method: define it"),
    ],
)
def test_what_no_worker_would_find_is_refused_where_it_is_defined(thing: Any, message: str) -> None:
    for make in (step, step(num_cpus=2)):
        with pytest.raises(UserError, match=rf"test_definitions.py:\d+: @step was given {message}"):
            make(thing)


def test_unknown_options_and_wrong_arguments_name_the_step() -> None:
    with pytest.raises(ConfigError, match=r"@step has no option num_cpu; did you mean num_cpus\?"):
        step(num_cpu=2)  # type: ignore[call-overload]
    with (
        steps.running(Runtime()),  # type: ignore[arg-type]
        pytest.raises(UserError, match=r"step train \(.*test_definitions.py:\d+\): missing a required .*'x'"),
    ):
        train_big()  # type: ignore[call-arg]


def test_options_that_are_none_are_refused_where_they_are_given() -> None:
    for given in ({}, {"name": "x"}):
        with pytest.raises(UserError, match=r"test_definitions.py:\d+: @workflow takes no options: write it with"):
            workflow(**given)
    with pytest.raises(UserError, match=r"test_definitions.py:\d+: @step has no option cpus; did you mean num_cpus"):
        step(cpus=2)  # type: ignore[call-overload]
    assert step(libraries=["numpy"])(train).default.libraries == ("numpy",)  # type: ignore[call-overload]
    for wrong in ("numpy", 3, [None]):
        with pytest.raises(ConfigError, match=r"step train: libraries=.*: must be names of distributions"):
            step(libraries=wrong)(train)  # type: ignore[call-overload]


def test_a_library_that_is_not_installed_is_named() -> None:
    for name in ("no-such-library", ""):
        with pytest.raises(ConfigError, match=rf"libraries: '{name}' is not installed"):
            Fingerprinter().of(train, (name,))


@workflow
def endless() -> Any:
    return endless()


def test_a_workflow_that_calls_itself_without_end_is_told_of() -> None:
    message = r"test_definitions.py:\d+: maximum recursion depth .*: a workflow that calls itself needs an end"
    with pytest.raises(UserError, match=message), steps.running(Runtime()):  # type: ignore[arg-type]
        endless.fn()
