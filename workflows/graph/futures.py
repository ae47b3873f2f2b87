"""Futures: results that a workflow will have later.

A Future stands for a value but is not the value. Using it as one (in a condition, a comparison, a text, a sum) is
refused, because it would silently go wrong. `.result()` gives the value.
"""

import re
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from infra.errors import UserError
from workflows.graph.definitions import users_line

R = TypeVar("R")
NEEDS_THE_VALUE = {
    "a condition (if, while, and, or, not)": "bool",
    "a comparison": "eq ne lt le gt ge",
    "text (str, print, an f-string)": "str format",
    "a loop, unpacking, `in` or len": "iter next reversed contains len aiter anext length_hint",
    "a number": "int float complex index round trunc floor ceil abs neg pos invert",
    "arithmetic": "add sub mul truediv floordiv mod divmod pow matmul lshift rshift and or xor radd rsub rmul rtruediv "
    "rfloordiv rmod rdivmod rpow rmatmul rlshift rrshift rand ror rxor",
    "an assignment": "setitem delitem setattr delattr",
    "a call": "call",
    "await": "await",
    "a with block": "enter exit aenter aexit",
    "a path": "fspath",
    "bytes": "bytes",
    "an array": "array",
    "a pickle": "reduce_ex",
}
"""Uses that need the value, with the names of Python's special methods."""


class Results(Protocol):
    """The source of calls' results."""

    def result(self, call_id: str) -> Any: ...

    def done(self, call_id: str) -> bool: ...


class ToCome:
    """The base of Futures and their fields, which refuses every use as a value. Compared and hashed by identity."""

    __slots__ = ()

    def __repr__(self) -> str:
        raise NotImplementedError

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def _refusal(purpose: str) -> Callable[..., NoReturn]:
    def refuse(self: ToCome, *_: Any, **__: Any) -> NoReturn:
        raise UserError(
            f"{users_line()}: {self!r} was used for {purpose} before it has a value: write .result() to wait for it"
        )

    return refuse


for _purpose, _names in NEEDS_THE_VALUE.items():
    for _name in _names.split():
        setattr(ToCome, f"__{_name}__", _refusal(_purpose))


def _set(it: ToCome, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(it, name, value)


class Future(ToCome, Generic[R]):
    """A call's result, which may still be to come. Pass it to other steps; `result()` waits for it.

    A field of the result (of a dataclass, settings, a named tuple or a dict) can be passed on before it is there:
    `sft.model`, or `sft["model"]` for any name, also one that a Future has itself (`result`, `done`, `call_id`).
    """

    __slots__ = ("__weakref__", "_kept", "_runtime", "call_id")
    _runtime: Results
    call_id: str

    def __init__(self, runtime: Results, call_id: str, kept: object) -> None:
        _set(self, _runtime=runtime, _kept=kept, call_id=call_id)

    def result(self) -> R:
        """Wait, and return the step's result.

        Raises:
            StepError, UserError, SystemFault: this call failed, or one that it depends on, or any other call of the run
                that was made without `may_fail=True`.
        """
        value: R = self._runtime.result(self.call_id)
        return value

    def done(self) -> bool:
        """Whether `result()` returns (or raises) without waiting. A resume may see another answer: decide
        nothing by it that must stay the same."""
        return self._runtime.done(self.call_id)

    def __getattr__(self, name: str) -> Any:
        """A field of the result to come, as an edge: `sft.model` for a Future `sft`."""
        if name.startswith("_"):
            raise AttributeError(f"{self!r} has no {name}; for a field of its result write [{name!r}]")
        return Part(self, name)

    def __getitem__(self, name: str) -> Any:
        """The same for a field of any name: `sft["result"]`."""
        if not isinstance(name, str):
            raise UserError(f"{users_line()}: {self!r}[{name!r}]: it has no value yet; write .result()[{name!r}]")
        return Part(self, name)

    def __repr__(self) -> str:
        return f"Future({self.call_id})"


class Part(ToCome):
    """One field of a Future's result: an edge like the Future itself."""

    __slots__ = ("field", "future")
    future: Future[Any]
    field: str

    def __init__(self, future: Future[Any], field: str) -> None:
        _set(self, future=future, field=field)

    def result(self) -> Any:
        """Wait for the call, and return the field. Raises as `Future.result`, and UserError if the field is missing."""
        value = self.future.result()
        try:
            return value[self.field] if isinstance(value, Mapping) else getattr(value, self.field)
        except (KeyError, AttributeError):
            raise UserError(f"{self.future.call_id}: its result has no field {self.field!r}") from None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        only = "only a field of the result itself can be passed on"
        raise UserError(f"{users_line()}: {self!r}.{name}: {only}; write .result().{name}")

    def __getitem__(self, key: Any) -> Any:
        only = "only a field of the result itself can be passed on"
        raise UserError(f"{users_line()}: {self!r}[{key!r}]: {only}; write .result()[{key!r}]")

    def __repr__(self) -> str:
        return f"{self.future!r}.{self.field}"


def refuse_method(value: Any) -> None:
    """Raises UserError for `sft.result` instead of `sft.result()` or a field of that name."""
    if isinstance(value, MethodType) and isinstance(value.__self__, ToCome):
        owner, name = value.__self__, value.__name__
        raise UserError(
            f"{owner!r}.{name} is a method: write .{name}() to call it, or [{name!r}] for a field of that name"
        )


def told_of_type(error: TypeError) -> UserError | None:
    """The error for a Future whose type a function of Python or a library refused, as json.dumps does; None for other
    errors."""
    if not re.search(r"\b(Future|Part)\b", str(error)):
        return None
    return UserError(f"{users_line(error)}: {error}: write .result() to wait for the value")
