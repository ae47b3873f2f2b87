"""Arguments and results as JSON; options and call ids."""

import json
import math
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from infra.config import Settings
from infra.errors import ConfigError, NonDeterminismError, UserError
from infra.faults import FaultSchedule
from infra.storage import FolderStore, open_store
from workflows import graph
from workflows.artifacts import Artifact, ArtifactSource
from workflows.graph import Step, StepOptions, parse_memory, step, workflow
from workflows.known import Known, inputs_digest, shown_arguments
from workflows.values import decode, differences, digest, encode


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
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_equal_through_json(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    assert back == value and type(back) is type(value)


def test_nan_comes_back() -> None:
    assert math.isnan(decode(json.loads(json.dumps(encode(float("nan")), allow_nan=False))))


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", Loose(), lambda: None], ids=repr)
def test_what_cannot_be_kept_is_refused_with_the_way_to_it(value: Any) -> None:
    with pytest.raises(UserError, match=r"sft\[0\]: the result\['list'\]\[1\]"):
        encode({"list": [1, value]}, "sft[0]: the result")


def test_an_artifact_counts_by_content_only() -> None:
    here = Artifact("abc", {"rows": 1}, "model", "runs/a/attempts/x/model", ArtifactSource("/s", "/c"))
    there = Artifact("abc", {"rows": 2}, "weights", "runs/b/attempts/y/weights")
    assert here == there and digest(encode([here])) == digest(encode([there]))
    assert digest(encode([here])) != digest(encode([Artifact("abd")]))
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
    with graph.running(runtime):
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
    with graph.running(runtime):
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
        graph.context()
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
    from workflows.artifacts import ArtifactWriter

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
    known = Known(open_store(tmp_path), {}, True, (), lambda call_id, message: None)
    kinds = [f"kind-{number}" for number in range(3000)]

    def arguments(rate: float, seed: int, last: str) -> Any:
        return encode(
            {"args": [{"optimizer": {"rate": rate}, "kinds": [*kinds, last], "text": "x" * 9000}, seed], "kwargs": {}}
        )

    before = arguments(0.5, 1, "a")
    record = {"step": learn.name, "inputs": inputs_digest(before), "arguments": shown_arguments(before)}
    known.commits["learn[0]"] = record
    with pytest.raises(NonDeterminismError) as changed:
        known.committed("learn[0]", learn, learn.default, arguments(0.25, 2, "a"))
    assert "other inputs (section.optimizer.rate 0.5, now 0.25; seed 1, now 2); start another run" in str(changed.value)
    with pytest.raises(NonDeterminismError, match=r"section.kinds\[20\] '... 3001 in all, sha256 \w+', now "):
        known.committed("learn[0]", learn, learn.default, arguments(0.5, 1, "b"))
    record["arguments"] = None
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
