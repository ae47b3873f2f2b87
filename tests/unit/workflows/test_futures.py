"""A Future is no value: what would go wrong without a word is refused, and its fields are edges."""

import copy
import io
import json
import operator
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple, cast

import numpy as np
import pytest

from infra.errors import ConfigError, UserError
from workflows.graph.steps import Future, StepOptions, edges_of, resolve_edges, running
from workflows.graph.values import encode


@dataclass(frozen=True)
class Told:
    result: int = 1
    done: str = "d"
    call_id: str = "c"
    fields: float = 0.5


class Pair(NamedTuple):
    mean: float
    n: int


class Given:
    """A Runtime whose calls have ended."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def result(self, call_id: str) -> Any:
        return self.value

    def done(self, call_id: str) -> bool:
        return True


MISUSES: list[Callable[[Any], Any]] = [
    bool,
    operator.not_,
    lambda x: x and 1,
    lambda x: x == 7,
    lambda x: x != x,
    lambda x: x <= x,
    lambda x: x < 7,
    lambda x: sorted([x, x]),
    lambda x: 7 in [x],
    str,
    lambda x: f"{x}",
    lambda x: "%s" % x,  # noqa: UP031
    lambda x: "{:.2f}".format(x),  # noqa: UP032
    list,
    lambda x: [*x],
    lambda x: 1 in x,
    len,
    next,
    reversed,
    int,
    float,
    complex,
    round,
    abs,
    range,
    operator.neg,
    lambda x: x + 1,
    lambda x: 1 + x,
    lambda x: sum([x]),
    lambda x: x * 2,
    lambda x: operator.mod("a%d", x),
    lambda x: x @ 2,
    lambda x: x | {},
    lambda x: [1, 2][x],
    lambda x: x[0],
    lambda x: x[1:],
    lambda x: operator.setitem(x, "a", 1),
    lambda x: x(),
    lambda x: os.path.join("/a", x),
    lambda x: np.mean([x]),
    np.asarray,
    pickle.dumps,
    bytes,
    lambda x: setattr(x, "lr", 0.1),
    lambda x: delattr(x, "lr"),
]


@pytest.mark.parametrize("misuse", MISUSES, ids=range(len(MISUSES)))
def test_what_needs_the_value_says_so(misuse: Callable[[Any], Any]) -> None:
    future: Future[Any] = Future(Given(), "number[0]", None)
    for it, name in ((future, r"number\[0\]"), (future.size, r"Future\(number\[0\]\).size")):
        with pytest.raises(UserError, match=rf"^/.*test_futures.py:\d+: .*{name}.*\.result\(\)"):
            misuse(it)


MISUSED_TYPE = r"^/.*test_futures.py:\d+: .*Future.*: write .result\(\) to wait"


@pytest.mark.parametrize(
    "refused", [json.dumps, "".join, Decimal, lambda x: x in "text", [1].__add__, io.StringIO().write]
)
def test_what_a_type_of_pythons_refuses_says_so_too(refused: Callable[[Any], Any]) -> None:
    future: Any = Future(Given(), "number[0]", None)
    given = [future] if refused == "".join else future
    with pytest.raises(UserError, match=MISUSED_TYPE), running(cast(Any, Given())):
        refused(given)
    with pytest.raises(TypeError, match="unsupported operand"), running(cast(Any, Given())):
        refused(operator.add(1, "a"))


def test_context_managers_and_await_are_refused() -> None:
    future: Any = Future(Given(), "number[0]", None)
    with pytest.raises(UserError, match=r"a with block.*\.result\(\)"), future:
        pass

    async def waits() -> None:
        await future

    with pytest.raises(UserError, match=r"await.*\.result\(\)"):
        waits().send(None)


def test_a_future_is_hashed_by_identity_and_copied_as_itself() -> None:
    first: Any = Future(Given(), "a[0]", None)
    second: Any = Future(Given(), "a[0]", None)
    assert {first: 1, second: 2}[second] == 2 and len({first, second, first.x}) == 3
    assert first in [first] and copy.deepcopy([first])[0] is first and copy.copy(first) is first
    assert repr([first, first.x]) == "[Future(a[0]), Future(a[0]).x]"


FIELDS: list[tuple[Any, dict[str, Any]]] = [
    (Told(), {"result": 1, "done": "d", "call_id": "c", "fields": 0.5}),
    ({"fields": {"a": 1}, "result": 2, "_x": 3, "$t": 4, "a b": 5}, {"fields": {"a": 1}, "_x": 3, "$t": 4, "a b": 5}),
    (Pair(0.5, 3), {"mean": 0.5, "n": 3}),
]


@pytest.mark.parametrize(("value", "fields"), FIELDS, ids=lambda value: type(value).__name__)
def test_every_field_can_be_passed_on(value: Any, fields: dict[str, Any]) -> None:
    runtime: Any = Given(value)
    future: Any = Future(runtime, "told[0]", None)
    for name, expected in fields.items():
        part = future[name]
        tree = encode([part], "argument", edges_of(runtime, []))
        assert resolve_edges(tree, lambda _: encode(value)) == [expected] and part.result() == expected
    for missing in (future.absent, future["absent"]):
        tree = encode([missing], "argument", edges_of(runtime, []))
        with pytest.raises(UserError, match=r"told\[0\]: its result has no field 'absent' \(it has "):
            resolve_edges(tree, lambda _: encode(value))
        with pytest.raises(UserError, match=r"told\[0\]: its result has no field 'absent'"):
            missing.result()


def test_what_was_meant_otherwise_is_told() -> None:
    runtime: Any = Given(Told())
    future: Any = Future(runtime, "told[0]", None)
    for method in (future.result, future.done, future.size.result):
        with pytest.raises(UserError, match=r"is a method: write .\w+\(\) to call it, or \['\w+'\] for a field"):
            encode({"x": method}, "argument", edges_of(runtime, []))
    for wrong in (lambda: future.model.name, lambda: future.model["name"]):
        with pytest.raises(UserError, match=r"Future\(told\[0\]\).model.*name.* write .result\(\)"):
            wrong()


def test_a_name_is_text_that_can_be_written() -> None:
    for name, message in (("caf\udce9", "must be valid Unicode"), (3, "must be text"), ("", "must be non-empty")):
        with pytest.raises(ConfigError, match=rf"name={name!r}: {message}".replace("\\", "\\\\")):
            StepOptions(name=name)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"name=Future\(number\[0\]\): must be text; .* its .result\(\)"):
        StepOptions(name=Future(Given(), "number[0]", None))  # type: ignore[arg-type]
