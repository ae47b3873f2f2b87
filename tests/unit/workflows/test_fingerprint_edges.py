"""Fingerprints at the edges of Python: every way in which one of our names can reach another."""

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from infra.imports import import_standard
from workflows.identity.fingerprint import Fingerprinter

FILES = {
    "ep/__init__.py": "",
    "ep/api/__init__.py": "from ep.api.inner import thing\n",
    "ep/api/inner.py": "def thing(x):\n    return x\n",
    "ep/steps.py": """
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

from ep.api import thing
from ep.deco import logged, with_factor
from ep.defaults import LIMIT
from ep.shape import Shape, make
from ep.table import OPS

try:
    from ep.fast import speed
except ImportError:
    from ep.slow import speed

try:
    from ep.fast import quick
except ImportError:
    def quick():
        return 5

if LIMIT > 1:
    from ep.branch import chosen
else:
    from ep.other import chosen

@logged
def decorated(x):
    return x

@with_factor(3)
def factored(x):
    return x

def uses_factored(x):
    return factored(x)

def with_fallback():
    return quick()

def local_choice():
    try:
        from ep.fast import speed as pace
    except ImportError:
        from ep.slow import speed as pace
    return pace()

def defaulted(x, limit=LIMIT):
    return min(x, limit)

def classattr():
    return Shape.sides

def dclass():
    return make()

def partialled():
    return BOUND()

BOUND = functools.partial(thing, 2)

def dicty(name):
    return OPS[name](1)

def reexport(x):
    return thing(x)

def conditional():
    return speed()

def branched():
    return chosen()

def dispatch(name):
    return getattr(__import__("ep.plug", fromlist=["x"]), name)()

def strtyped():
    return load("ep.plug:alpha")

def load(name):
    import importlib
    m, _, f = name.partition(":")
    return getattr(importlib.import_module(m), f)()

def datafile():
    return (Path(__file__).parent / "data.json").read_text()

def method():
    return Shape().area()

def lam():
    return KEY(3)

KEY = lambda x: thing(x) + 1

def relative():
    return importlib.import_module(".branch", __package__).chosen()

def compreh():
    return [thing(i) for i in range(3)]
""",
    "ep/deco.py": """
import functools
def logged(f):
    @functools.wraps(f)
    def inner(*a):
        return f(*a) + OFFSET
    return inner
OFFSET = 0
def with_factor(n):
    def wrap(f):
        return lambda *a: n * f(*a)
    return wrap
""",
    "ep/defaults.py": "LIMIT = 10\n",
    "ep/shape.py": """
from dataclasses import dataclass, field
from ep.base import Base
def fresh():
    return [1]
@dataclass
class Shape(Base):
    sides = 4
    items: list = field(default_factory=fresh)
    size: int = 1
    def area(self):
        return self.size * self.sides
def make():
    return Shape()
""",
    "ep/base.py": "class Base:\n    def hello(self):\n        return 1\n",
    "ep/table.py": "from ep.ops import inc, dec\nOPS = {'inc': inc, 'dec': dec}\n",
    "ep/ops.py": "def inc(x):\n    return x + 1\ndef dec(x):\n    return x - 1\n",
    "ep/fast.py": "def speed():\n    return 1\ndef quick():\n    return 7\n",
    "ep/slow.py": "def speed():\n    return 2\n",
    "ep/branch.py": "def chosen():\n    return 1\n",
    "ep/other.py": "def chosen():\n    return 2\n",
    "ep/plug.py": "def alpha():\n    return 1\n",
    "ep/data.json": "{}",
}
CASES = [
    ("decorated", "ep/deco.py", "OFFSET = 0", "OFFSET = 1"),
    ("decorated", "ep/deco.py", "f(*a) + OFFSET", "f(*a) - OFFSET"),
    ("uses_factored", "ep/deco.py", "n * f", "n + f"),
    ("uses_factored", "ep/steps.py", "with_factor(3)", "with_factor(4)"),
    ("defaulted", "ep/defaults.py", "10", "11"),
    ("defaulted", "ep/steps.py", "limit=LIMIT", "limit=LIMIT+1"),
    ("classattr", "ep/shape.py", "sides = 4", "sides = 5"),
    ("dclass", "ep/shape.py", "return [1]", "return [2]"),
    ("dclass", "ep/shape.py", "size: int = 1", "size: int = 2"),
    ("dclass", "ep/base.py", "return 1", "return 2"),
    ("partialled", "ep/steps.py", "thing, 2", "thing, 3"),
    ("partialled", "ep/api/inner.py", "return x", "return -x"),
    ("dicty", "ep/ops.py", "x - 1", "x - 2"),
    ("reexport", "ep/api/inner.py", "return x", "return -x"),
    ("reexport", "ep/api/__init__.py", "from ep.api.inner import thing", "from ep.ops import inc as thing"),
    ("conditional", "ep/fast.py", "return 1", "return 3"),
    ("conditional", "ep/slow.py", "return 2", "return 3"),
    ("with_fallback", "ep/fast.py", "return 7", "return 8"),
    ("with_fallback", "ep/steps.py", "return 5", "return 6"),
    ("local_choice", "ep/fast.py", "return 1", "return 8"),
    ("local_choice", "ep/slow.py", "return 2", "return 8"),
    ("branched", "ep/branch.py", "return 1", "return 3"),
    ("branched", "ep/other.py", "return 2", "return 3"),
    ("dispatch", "ep/plug.py", "return 1", "return 2"),
    ("strtyped", "ep/plug.py", "return 1", "return 2"),
    ("datafile", "ep/data.json", "{}", "[]"),
    ("method", "ep/base.py", "return 1", "return 2"),
    ("lam", "ep/api/inner.py", "return x", "return -x"),
    ("lam", "ep/steps.py", "thing(x) + 1", "thing(x) + 2"),
    ("compreh", "ep/api/inner.py", "return x", "return -x"),
    ("relative", "ep/branch.py", "return 1", "return 3"),
]
UNRELATED = [
    ("defaulted", "ep/api/inner.py", "return x", "return -x"),
    ("reexport", "ep/ops.py", "x - 1", "x - 2"),
    ("classattr", "ep/ops.py", "x + 1", "x + 9"),
    ("reexport", "ep/plug.py", "return 1", "return 5"),
    ("conditional", "ep/fast.py", "return 7", "return 8"),
    ("branched", "ep/slow.py", "return 2", "return 3"),
]
Changed = Callable[[str, str, str, str], bool]


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Changed]:
    """Whether replacing text in a file changes the fingerprint of a function of ep.steps."""
    folder = tmp_path_factory.mktemp("edges")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    def check(function: str, file: str, before: str, after: str) -> bool:
        body: Any = getattr(importlib.import_module("ep.steps"), function)
        body = getattr(body, "__wrapped__", body)
        first = Fingerprinter().of(body)
        path = folder / file
        original = path.read_text()
        assert before in original
        path.write_text(original.replace(before, after))
        try:
            return Fingerprinter().of(body).code != first.code
        finally:
            path.write_text(original)

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield check
    for name in [name for name in sys.modules if name.partition(".")[0] == "ep"]:
        del sys.modules[name]


@pytest.mark.parametrize(("function", "file", "before", "after"), CASES)
def test_what_is_reached_counts(changed: Changed, function: str, file: str, before: str, after: str) -> None:
    assert changed(function, file, before, after)


@pytest.mark.parametrize(("function", "file", "before", "after"), UNRELATED)
def test_what_is_not_reached_does_not(changed: Changed, function: str, file: str, before: str, after: str) -> None:
    assert not changed(function, file, before, after)


def test_a_computed_name_of_the_standard_library_brings_in_nothing_of_ours() -> None:
    from workflows.recipes import text

    covered = {name.partition(":")[0] for name in Fingerprinter().of(text.build_corpus.fn).parts}
    assert "data.stdlib_text" in covered and not covered & {"data.loader", "data.packing", "data.mixture"}
    assert import_standard("os.path") is importlib.import_module("os.path")
    with pytest.raises(ValueError, match=r"data\.loader is not a module of Python's standard library"):
        import_standard("data.loader")
