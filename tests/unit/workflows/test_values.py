"""Arguments and results as JSON; options and call ids."""

import enum
import functools
import hashlib
import json
import math
import os
import time
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import InitVar, dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, RootModel, field_validator, model_validator

from infra.config import Settings
from infra.errors import ConfigError, NonDeterminismError, UserError
from infra.fault_injection import FaultSchedule
from infra.storage import FolderStore, open_store
from workflows.driver.reuse import ReuseLookup
from workflows.graph import context, steps
from workflows.graph.artifacts import Artifact, ArtifactSource
from workflows.graph.inputs import Identities
from workflows.graph.steps import Step, StepOptions, parse_memory, resolve_edges, step, workflow
from workflows.graph.values import decode, differences, digest, earlier_identity, encode, identity, one_line
from workflows.identity.keys import canonical
from workflows.runs.records import Commit

T = TypeVar("T")


class Colour(Enum):
    RED = 1


class Inner(Settings):
    rate: float = 0.5


class Outer(Settings):
    inner: Inner = Inner()
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Result:
    model: Artifact
    scores: dict[str, float] = field(default_factory=dict)


@dataclass
class Loose:
    x: int = 1


class Score(NamedTuple):
    mean: float
    n: int = 1


class Check(enum.Flag):
    LOSS = 1
    GRAD = 2
    BOTH = 3


class Box(BaseModel, Generic[T]):
    model_config = ConfigDict(frozen=True)
    item: T


class Rights(enum.IntFlag):
    READ = 4
    WRITE = 2


class Word(str):
    """A text of a class of its own."""


class Steps(list[int]):
    def __init__(self, *items: int) -> None:
        super().__init__(items)


class Shape(tuple[int, ...]):
    __slots__ = ()


class Seen(Counter[str]):
    pass


class Suffixed(Settings):
    """Each validation changes it: it must not be validated where it arrives."""

    prefix: str = "run"
    rate: float = Field(default=1.0, alias="lr")

    @field_validator("prefix")
    @classmethod
    def add(cls, value: str) -> str:
        return f"{value}-x"


class Derived(Settings):
    """A validator puts something beside the fields, and something is worked out when it is asked for."""

    size: int = 2

    @model_validator(mode="after")
    def double(self) -> "Derived":
        object.__setattr__(self, "twice", 2 * self.size)
        return self

    @functools.cached_property
    def square(self) -> Any:
        return lambda: self.size**2


def _derived() -> Derived:
    made = Derived(size=3)
    assert made.square() == 9
    return made


class Open(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")
    name: str
    _rank: int = PrivateAttr(default=0)


class One(RootModel[int]):
    model_config = ConfigDict(frozen=True)


@dataclass(frozen=True)
class Scaled:
    lr: float
    label: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lr", self.lr * 0.1)
        object.__setattr__(self, "label", f"lr {self.lr}")


@dataclass(frozen=True, slots=True)
class Slotted(Generic[T]):
    item: T
    given: InitVar[int] = 0
    twice: int = field(init=False, default=0)

    def __post_init__(self, given: int) -> None:
        object.__setattr__(self, "twice", 2 * given)


@dataclass(frozen=True)
class Named(Scaled):
    """Fields called like what a Future has, and like the keys of an encoded value."""

    result: int = 1
    fields: str = "f"


def _rank(value: int) -> Open:
    made = Open(name="a", more=[1])  # type: ignore[call-arg]
    made.__pydantic_private__ = {"_rank": value}
    return made


VALUES: list[Any] = [
    None,
    True,
    3,
    1.5,
    "text",
    [1, [2]],
    (1, ("a",)),
    {"a": {"b": 1}},
    {1: "one", ("a", 2): None},
    {"$tuple": "a key that looks like a tag"},
    Path("/a/b"),
    Colour.RED,
    float("inf"),
    Outer(inner=Inner(rate=0.25)),
    Result(Artifact("abc", {"rows": 1}, "model", "runs/r/attempts/x/model"), {"a": 1.0}),
    Score(0.5, 3),
    [Score(0.5), (Score(1.0),)],
    Check.BOTH,
    Check.LOSS | Check.GRAD,
    Check(0),
    Rights.READ | Rights.WRITE,
    Word("w"),
    {Word("w"): Word("v")},
    Steps(1, 2),
    Shape((2, 3)),
    Seen("aab"),
    Counter("aab"),
    OrderedDict([("b", 1), ("a", [2])]),
    OrderedDict([(2, 1), (1, 2)]),
    defaultdict(list, {"a": [1]}),
    np.float64(0.5),
    np.float32(0.1),
    np.int64(3),
    np.bool_(True),
    np.str_("s"),
    {np.int64(3): np.float64("inf")},
    Suffixed(prefix="a", lr=0.5),  # type: ignore[call-arg]
    _rank(3),
    One(3),
    Derived(size=3),
    Scaled(1.0),
    Slotted("a", 2),
    Named(2.0, result=3),
    os.fsdecode(b"caf\xe9.txt"),
    {os.fsdecode(b"caf\xe9"): 1},
    Path(os.fsdecode(b"caf\xe9.txt")),
    "\ud83d\ude00 as two halves, and a \\ud83d",
    10**4299,
    {True: "yes", 0: "no", 2.5: None},
    {"fields": 1, "value": 2, "items": 3},
    -0.0,
    Artifact("abc", {"range": (1, 2), "at": Path("/a")}, "model", "runs/r/attempts/x/model"),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__} {encode(value)}"[:60])
def test_values_come_back_equal_through_json(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    assert back == value and type(back) is type(value)
    canonical(encode(back)).decode()
    assert digest(encode(back)) == digest(encode(value)) and repr(type(back)) == repr(type(value))


def test_what_a_class_made_of_its_fields_comes_back_with_them() -> None:
    scaled = decode(encode(Scaled(1.0)))
    assert (scaled.lr, scaled.label) == (0.1, "lr 0.1")
    assert decode(encode(Slotted("a", 2))).twice == 4
    assert decode(encode(_derived())).twice == 6 and decode(encode(_derived())).square() == 9
    assert decode(encode(_rank(3)))._rank == 3 and decode(encode(_rank(3))).more == [1]
    made = decode(encode(defaultdict(list, {"a": [1]})))
    assert made["new"] == []
    artifact = decode(encode(Artifact("abc", {"range": (1, 2)}, "m", "l")))
    assert artifact.meta == {"range": (1, 2)}


STORED: list[tuple[Any, Any]] = [
    ({"$enum": f"{__name__}:Colour", "name": "RED"}, Colour.RED),
    ({"$settings": f"{__name__}:Inner", "fields": {"rate": 0.25}}, Inner(rate=0.25)),
    ({"$settings": f"{__name__}:Outer", "fields": {"names": {"$tuple": []}}}, Outer(names=())),
    ({"$dataclass": f"{__name__}:Scaled", "fields": {"lr": 1.0}}, Scaled(1.0)),
    ({"$namedtuple": f"{__name__}:Score", "fields": {"mean": 1.0}}, Score(1.0)),
    ({"$dict": [[{"$tuple": [1]}, 2]]}, {(1,): 2}),
]


@pytest.mark.parametrize(("tree", "value"), STORED, ids=repr)
def test_what_is_stored_is_read_and_new_fields_take_their_defaults(tree: Any, value: Any) -> None:
    assert decode(tree) == value


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"$enum": f"{__name__}:Colour", "name": "BLUE"}, "Colour no longer fits its class: it has no member BLUE"),
        ({"$settings": f"{__name__}:Inner", "fields": {"speed": 1}}, "no field speed any more"),
        ({"$settings": f"{__name__}:Open", "fields": {}}, "it has no name, and no default"),
        ({"$dataclass": f"{__name__}:Scaled", "fields": {"rate": 1}}, "no field rate any more"),
        ({"$dataclass": f"{__name__}:Result", "fields": {"scores": {}}}, "it has no model, and no default"),
        ({"$dataclass": f"{__name__}:Gone", "fields": {}}, "cannot find .*:Gone"),
        ({"$dataclass": f"{__name__}:Inner", "fields": {}}, "is no longer a dataclass"),
        ({"$namedtuple": f"{__name__}:Score", "fields": {"mean": 1.0, "old": 2}}, "differs in old"),
        ({"$later": 1}, r"a \$later, which this version of recua does not know"),
    ],
    ids=repr,
)
def test_a_stored_value_whose_class_changed_is_named(tree: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode(tree)


def test_nan_comes_back() -> None:
    assert math.isnan(decode(json.loads(json.dumps(encode(float("nan")), allow_nan=False))))


class Extra(str):
    note: str


def _extra() -> Extra:
    made = Extra("x")
    made.note = "lost"
    return made


def _local() -> Any:
    @dataclass(frozen=True)
    class Inside:
        x: int = 1

    return Inside()


def _generic() -> Any:
    return Box[int](item=1)


Renamed = namedtuple("Hidden", "x")


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        frozenset([1]),
        b"bytes",
        1j,
        10**5000,
        {(1, -(10**4400)): "a key"},
        Decimal("1.5"),
        datetime(2026, 1, 1),
        deque([1]),
        PurePosixPath("/a"),
        np.zeros(2),
        np.datetime64("2026-01-01"),
        time.gmtime(0),
        Loose(),
        lambda: None,
        _extra(),
        _local(),
        Renamed(1),
        defaultdict(lambda: 0),
        _generic(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_kept_is_refused_with_the_way_to_it(value: Any) -> None:
    with pytest.raises(UserError, match=r"sft\[0\]: the result\['list'\]\[1\]"):
        encode({"list": [1, value]}, "sft[0]: the result")


def test_what_is_too_deep_or_contains_itself_is_refused() -> None:
    deep: Any = []
    for _ in range(240):
        deep = [deep]
    assert decode(encode(deep)) == deep and digest(encode(deep))
    circle: list[Any] = []
    circle.append({"again": circle})
    for value in ([[deep] * 20], circle):
        for _ in range(20):
            value = [value]
        with pytest.raises(UserError, match=r"f\[0\]: the result.* is nested more than 250 deep, or contains itself"):
            encode(value, "f[0]: the result")


def test_numbers_of_numpy_look_like_others_in_a_terminal() -> None:
    value = {"loss": np.float64(0.5), "seen": Counter("a"), "at": OrderedDict(a=[np.int64(1)])}
    assert one_line(encode(value)) == '{"loss": 0.5, "seen": {"a": 1}, "at": {"$dict": [["a", [1]]]}}'


def test_the_order_of_keys_does_not_count_of_any_dict_but_an_ordered_one() -> None:
    pairs: list[tuple[Any, Any]] = [((1, "a"), 1), (2, Colour.RED), ("text", None), (Word("w"), 3)]
    for kind in (dict, Seen):
        assert digest(encode(kind(pairs))) == digest(encode(kind(reversed(pairs))))
    assert digest(encode(OrderedDict(pairs))) != digest(encode(OrderedDict(reversed(pairs))))
    assert digest(encode({1: "a"})) != digest(encode({True: "a"}))


def test_what_needs_no_change_is_no_copy() -> None:
    tree = encode({"args": [[1, 2, {"a": [3]}]], "kwargs": {}})
    assert identity(tree) is tree and steps.resolve_edges(tree, lambda _: None) is tree


def test_earlier_digests_are_those_of_older_versions() -> None:
    """What older versions made of a value: they knew neither metadata nor classes of their own."""
    given: list[tuple[Any, Any]] = [
        (Artifact("abc", {"rows": 1}), {"$artifact": "abc"}),
        (Score(0.5, 3), {"$tuple": [0.5, 3]}),
        ([np.float64(0.5), Word("w"), Steps(1, 2)], [0.5, "w", [1, 2]]),
        (OrderedDict(b=1, a=2), {"a": 2, "b": 1}),
        (OrderedDict({2: 1, 1: 2}), {"$dict": [[2, 1], [1, 2]]}),
        ({2: 1, 1: 2}, {"$dict": [[2, 1], [1, 2]]}),
        (Scaled(1.0), {"$dataclass": f"{__name__}:Scaled", "fields": {"lr": 0.1}}),
        ({"extra": 1, "beside": 2}, {"extra": 1, "beside": 2}),
    ]
    for value, tree in given:
        assert earlier_identity(encode(value)) == tree, value


def test_an_artifact_counts_by_content_and_metadata_wherever_it_lies() -> None:
    here = Artifact("abc", {"rows": 1}, "model", "runs/a/attempts/x/model", ArtifactSource("/s", "/c"))
    there = Artifact("abc", {"rows": 1}, "weights", "runs/b/attempts/y/weights")
    assert here == there and digest(encode([here])) == digest(encode([there]))
    assert digest(encode([here])) != digest(encode([Artifact("abd", {"rows": 1})]))
    assert digest(encode([here])) != digest(encode([Artifact("abc", {"rows": 2})])), "a step may read .meta"
    bare = b'[{"$artifact":"abc"}]'
    assert digest(encode([Artifact("abc")])) == hashlib.sha256(bare).hexdigest(), "keys without metadata stay"
    assert digest(encode({"a": 1, "b": 2})) == digest(encode({"b": 2, "a": 1}))


@step(memory="1.5GiB", timeout=3)
def double(x: int, by: int = 2) -> int:
    return x * by


@workflow
def inner(x: int) -> Any:
    return double(x)


class Recorder:
    """A Runtime that writes down the calls it gets."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[StepOptions, Any]] = {}

    def call(self, call_id: str, step: Step[..., Any], options: StepOptions, arguments: dict[str, Any]) -> None:
        self.calls[call_id] = (options, arguments)

    def result(self, call_id: str) -> Any:
        return None

    def done(self, call_id: str) -> bool:
        return True

    def on_end(self, hook: Any) -> None: ...


def test_options_change_what_is_given_and_none_takes_a_limit_away() -> None:
    limited = Step(double.fn, StepOptions(num_cpus=2, memory=5, retries=1, timeout=9, name="own", gang=2))
    assert limited.options().default == limited.default
    assert limited.options(timeout=7, memory="1KiB").default == replace(limited.default, timeout=7, memory=1024)
    cleared = limited.options(timeout=None, memory=None, name=None, gang=None).default
    assert cleared == StepOptions(num_cpus=2, retries=1)
    assert limited.options(num_cpus=0, retries=0, may_fail=True).default == replace(
        limited.default, num_cpus=0, retries=0, may_fail=True
    )


def test_call_ids_are_parent_step_and_name_or_ordinal() -> None:
    runtime = Recorder()
    with steps.running(runtime):
        double(1)
        double.options(name="final", num_cpus=2)(2)
        double(3)
        inner(4)
        inner(5)
        with pytest.raises(UserError, match=r"two calls are named double\[final\]"):
            double.options(name="final")(2)
    assert list(runtime.calls) == [
        "double[0]",
        "double[final]",
        "double[1]",
        "inner[0]/double[0]",
        "inner[1]/double[0]",
    ]
    options, _ = runtime.calls["double[final]"]
    assert (options.num_cpus, options.memory, options.timeout) == (2, 3 << 29, 3)


def test_equal_calls_have_equal_arguments_however_they_are_written() -> None:
    runtime = Recorder()
    with steps.running(runtime):
        double(1)
        double(x=1)
        double(1, by=2)
    assert len({json.dumps(arguments) for _, arguments in runtime.calls.values()}) == 1


def test_misuse_is_named() -> None:
    with pytest.raises(UserError, match=r"outside a @workflow.*double\.fn"):
        double(1)
    assert double.fn(3) == 6
    with pytest.raises(UserError, match="recua run"):
        inner(1)
    with pytest.raises(UserError, match=r"context\(\) works only inside"):
        context()
    with pytest.raises(ConfigError, match="timeout=0"):
        step(timeout=0)(double.fn)

    def nested() -> None: ...

    with pytest.raises(UserError, match="top of a module"):
        _ = step(nested).name


def test_memory_texts() -> None:
    assert [parse_memory(text) for text in ("1GiB", "1.5 MiB", "2GB", 7, "12")] == [1 << 30, 3 << 19, 2 * 10**9, 7, 12]
    for text in ("", "GiB", "1TiB?", "one GiB"):
        with pytest.raises(ConfigError, match="memory="):
            parse_memory(text)


def test_fault_schedules() -> None:
    schedule = FaultSchedule.parse("executor.body:2=kill, a.b:1=error")
    assert [schedule.take("executor.body") for _ in range(3)] == [None, "kill", None]
    with pytest.raises(RuntimeError, match=r"injected at a\.b"):
        schedule.reach("a.b")
    for text in ("x", "x=kill", "x:0=kill", "x:1=explode"):
        with pytest.raises(ConfigError, match="point:hit=action"):
            FaultSchedule.parse(text)


def test_an_artifact_survives_only_whole(tmp_path: Path) -> None:
    from workflows.graph import ArtifactWriter

    store = FolderStore(tmp_path)
    source = ArtifactSource(store.url, str(tmp_path / "cache"))

    def write(attempt: str, text: str) -> Artifact:
        out = ArtifactWriter(store, source, f"runs/r/attempts/{attempt}/model", tmp_path / "scratch", lambda: None)
        (out.path / "sub").mkdir()
        (out.path / "sub" / "weights.bin").write_text(text)
        (out.path / "config.json").write_text("{}")
        (out.path / "link").symlink_to(out.path / "config.json")
        return out.seal(rows=3)

    first, again, other = write("1", "w"), write("2", "w"), write("3", "v")
    assert first == again and first != other and first.meta == {"rows": 3}
    assert (first.path() / "link").read_text() == "{}" and not (first.path() / "link").is_symlink()
    assert first.path() == tmp_path / "runs/r/attempts/1/model/data", "nothing is copied on a folder store"


@step
def learn(section: dict[str, Any], seed: int) -> int:
    return seed


def test_changed_inputs_are_named_with_both_values(tmp_path: Path) -> None:
    """Also where the inputs are long: neither whole sections nor mere digests are shown."""
    known = ReuseLookup(open_store(tmp_path), {}, True, (), lambda call_id, message: None)
    kinds = [f"kind-{number}" for number in range(3000)]

    def arguments(rate: float, seed: int, last: str) -> Any:
        return encode(
            {"args": [{"optimizer": {"rate": rate}, "kinds": [*kinds, last], "text": "x" * 9000}, seed], "kwargs": {}}
        )

    before = arguments(0.5, 1, "a")
    given = {"inputs": Identities().digest(before), "arguments": Identities().shown(before)}
    record = Commit("learn[0]", learn.name, **given)
    known.commits["learn[0]"] = record
    with pytest.raises(NonDeterminismError) as changed:
        known.committed("learn[0]", learn, learn.default, arguments(0.25, 2, "a"))
    assert "other inputs (section.optimizer.rate 0.5, now 0.25; seed 1, now 2); start another run" in str(changed.value)
    with pytest.raises(NonDeterminismError, match=r"section.kinds\[20\] '... 3001 in all, sha256 \w+', now "):
        known.committed("learn[0]", learn, learn.default, arguments(0.5, 1, "b"))
    known.commits["learn[0]"] = replace(record, arguments=None)
    with pytest.raises(NonDeterminismError, match=r"\(digest \w{12}, now \w{12}\)"):
        known.committed("learn[0]", learn, learn.default, arguments(0.5, 1, "b"))


def test_differences_of_every_kind() -> None:
    before = {"model": {"$artifact": "a" * 64}, "rest": {"$tuple": [1, 2]}, "off": None}
    now = {"model": {"$artifact": "b" * 64}, "rest": {"$tuple": [1]}, "off": True, "new": []}
    assert differences(before, now) == [
        f"model artifact {'a' * 12}, now artifact {'b' * 12}", "rest[1] 2, now not there", "off None, now True",
        "new not there, now []",
    ]  # fmt: skip
    assert differences({"k": 0} | {str(n): n for n in range(9)}, {"k": 0}, most=2)[1:] == [
        "1 1, now not there",
        "and 7 more",
    ]


def test_a_key_that_came_to_be_a_list_is_told_of() -> None:
    tree = resolve_edges({"$dict": [[{"$edge": "f[0]", "field": None}, 1]]}, lambda _: encode([1]))
    with pytest.raises(UserError, match=r"a dict's key came to be what cannot be one \(unhashable type: 'list'\)"):
        decode(tree)


class Labelled(NamedTuple):
    n: int


class Extended(Labelled):
    """Has a __dict__, unlike the named tuple itself."""


def test_a_named_tuple_with_attributes_of_its_own_is_refused() -> None:
    value = Extended(1)
    assert decode(encode(value)) == value and type(decode(encode(value))) is Extended
    value.label = "x"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"the result is a .*:Extended with attributes of its own \(label\)"):
        encode(value, "the result")
