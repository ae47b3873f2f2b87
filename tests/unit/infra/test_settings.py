"""What recipes and --set say becomes what the settings' types ask for, or one line that names the setting."""

import math
from collections.abc import Iterable, Iterator
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, Field

from actors.pools.config import GeneratorPoolSettings, LearnerPoolSettings
from actors.pretrain.config import PretrainSettings
from cluster.config import ElasticSettings
from data.config import BatchSettings, CorpusSettings, TaskSettings
from engines.config import LearnerSettings
from infra.config import Settings, load, read_text, split_override
from infra.errors import ConfigError
from serving.config import ServingSettings
from workflows.driver.settings import RunSettings
from workflows.graph import workflow
from workflows.launch.keywords import arguments_of
from workflows.recipes.settings import PretrainRecipe, Recipe


class Colour(Enum):
    RED = "red"


class Kinds(Settings):
    """A field of every kind that a recipe may have."""

    flag: bool = True
    maybe: bool | None = None
    text: str = ""
    name: str | None = "x"
    count: int = 1
    rate: float = 0.5
    cap: float | None = 1.0
    either: int | str = 0
    free: Any = None
    mode: Literal["a", "b", 1] = "a"
    colour: Colour = Colour.RED
    path: Path = Path("/x")
    names: tuple[str, ...] = ()
    table: dict[str, float] = Field(default={})
    labels: dict[str, str] = Field(default={})


READ: list[tuple[str, Any]] = [
    *((f"flag={text}", False) for text in ("False", "false", "no", "off", "0", "FALSE", '"no"')),
    *((f"flag={text}", True) for text in ("True", "true", "yes", "on", "1")),
    ("maybe=False", False),
    ("maybe=none", None),
    ("text=1.10", "1.10"),
    ("text=nan", "nan"),
    ("text=007", "007"),
    ("text=True", "True"),
    ("text=2026-01-01", "2026-01-01"),
    ("text=[1]", "[1]"),
    ("text=1 # one", "1 # one"),
    ('text="1.10"', "1.10"),
    ("text=", ""),
    ("text=none", "none"),
    ("name=none", None),
    ("name='none'", "none"),
    ("text=a=b", "a=b"),
    ("name=1.10", "1.10"),
    ("count=1_000", 1000),
    ("count=1e3", 1000),
    ("rate=1", 1.0),
    ("rate=.5", 0.5),
    ("rate=1e-5", 1e-5),
    ("cap=none", None),
    ("either=3", 3),
    ("either=1.10", "1.10"),
    ("free=1.10", 1.1),
    ("free=False", False),
    ("free=word", "word"),
    ("mode=b", "b"),
    ("mode=1", 1),
    ("colour=red", Colour.RED),
    ("path=1.10", Path("1.10")),
    ("names=['1.10']", ("1.10",)),
]


@pytest.mark.parametrize(("override", "expected"), READ)
def test_an_override_is_read_as_its_setting_asks(override: str, expected: Any) -> None:
    value = getattr(load(None, Kinds, [override]), override.partition("=")[0])
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("flag=maybe", "--set: flag: Input should be a valid boolean"),
        ("flag=2", "--set: flag: "),
        ("count=three", "--set: count: Input should be a valid integer"),
        ("count=1.5", "--set: count: Input should be a valid integer"),
        ("count=true", "--set: count: must be a number, not true"),
        ("count=nan", "--set: count: "),
        ("count=none", "--set: count: "),
        (f"count={2**64}", "--set: count: does not fit 64 bits"),
        ("rate=True", "--set: rate: must be a number, not true"),
        ("rate=nan", "--set: rate: Input should be a finite number"),
        ("rate=-inf", "--set: rate: Input should be a finite number"),
        ("rate=Infinity", "--set: rate: Input should be a finite number"),
        ("cap=inf", "--set: cap: Input should be a finite number"),
        ("table.a=nan", "--set: table.a: Input should be a finite number"),
        ("colour=blue", "--set: colour: Input should be 'red'"),
        ("names=[1]", "--set: names.0: Input should be a valid string"),
    ],
)
def test_what_its_type_cannot_have_is_refused_by_name(override: str, named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(None, Kinds, [override])
    assert str(refused.value).startswith(named) and "\n" not in str(refused.value)


class Patient(Settings):
    """Where infinity is meant."""

    wait_s: float = math.inf
    worst: float = Field(default=0.0, allow_inf_nan=True)


def test_infinity_is_taken_where_it_is_meant() -> None:
    assert Patient().wait_s == math.inf == load(None, Patient, ["wait_s=inf"]).wait_s
    assert load(None, Patient, ["worst=-inf", "wait_s=3"]) == Patient(wait_s=3, worst=-math.inf)
    for override in ("wait_s=-inf", "wait_s=nan"):
        with pytest.raises(ConfigError, match=r"^--set: wait_s: Input should be a finite number"):
            load(None, Patient, [override])


def test_numbers_of_thousands_of_digits_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("count = " + "9" * 5000)
    for recipe, override in ((tmp_path / "r.toml", "text=a"), (None, "count=" + "9" * 5000)):
        with pytest.raises(ConfigError) as refused:
            load(recipe, Kinds, [override])
        assert str(refused.value).count("\n") == 0 and len(str(refused.value)) < 300
    with pytest.raises(ConfigError, match="count: does not fit 64 bits"):
        load(None, Kinds, [f"count='{2**64}'"])


def test_keys_in_quotes_may_hold_anything() -> None:
    assert split_override('a."b.c"=1') == (["a", "b.c"], "1")
    assert split_override("'x=y'.b=c=d") == (["x=y", "b"], "c=d")
    assert split_override('"\\u00e9" . b = 2') == (["é", "b"], " 2")
    assert split_override("tasks.kinds.reasoning/addition=2") == (["tasks", "kinds", "reasoning/addition"], "2")
    assert load(None, Kinds, ['labels."v1.2"=1.10', "table.it's=2"]).model_dump(include={"labels", "table"}) == {
        "labels": {"v1.2": "1.10"},
        "table": {"it's": 2.0},
    }
    for wrong in ("a", "=1", "a..b=1", '"a=1', 'a."b"c=1', ".a=1", "a.=1", ""):
        with pytest.raises(ConfigError, match=r"write it as section\.key=value"):
            split_override(wrong)


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_bytes('\ufefftext = "é"\n'.encode())
    assert read_text(file) == 'text = "é"\n' and load(file, Kinds).text == "é"
    file.write_bytes('text = "é"\n'.encode("utf-16"))
    with pytest.raises(ConfigError, match=r"r.toml: not valid TOML: not UTF-8 at byte 0; save it as UTF-8"):
        load(file, Kinds)
    file.write_text("version = 1.10\ntext = 1.10\n")
    with pytest.raises(ConfigError, match=r"text: Input should be a valid string; write it in quotes \(got 1.1\)"):
        load(file, Kinds)


def sections(kind: Any) -> Iterator[type[Settings]]:
    """All classes of settings inside a type."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        assert issubclass(kind, Settings), kind
        yield kind
        for field in kind.model_fields.values():
            yield from sections(field.annotation)
    for inner in get_args(kind):
        yield from sections(inner)


def numbers(kind: Any) -> set[Any]:
    """Whether a field takes int or float."""
    if get_origin(kind) in (Union, type(int | str), Annotated):
        return {each for inner in get_args(kind) for each in numbers(inner)}
    return {kind} & {int, float}


EVERY = dict.fromkeys(each for root in (Recipe, PretrainRecipe, RunSettings) for each in sections(root))


@pytest.mark.parametrize("section", EVERY, ids=lambda section: section.__name__)
def test_no_number_of_any_section_takes_what_is_no_number(section: type[Settings]) -> None:
    fields = {name: numbers(field.annotation) for name, field in section.model_fields.items()}
    for name, kinds in fields.items():
        beyond = (2**64, -(2**64), str(2**64)) if kinds == {int} else (10**400,)
        for value in (math.nan, math.inf, -math.inf, True, *beyond) if kinds else ():
            with pytest.raises(ConfigError, match=rf"(^|\n)recipe: {name}: "):
                load_fields(section, {name: value})
        if name.endswith(("_s", "timeout", "epochs")) and kinds:
            with pytest.raises(ConfigError, match=rf"(^|\n)recipe: {name}: "):
                load_fields(section, {name: 1e10})


def load_fields(section: type[Settings], fields: dict[str, Any]) -> Settings:
    from infra.config import validate

    return validate(fields, section)


@pytest.mark.parametrize(
    ("section", "override", "named"),
    [
        (LearnerSettings, "betas=[0.9, 1.5]", "betas.1: Input should be less than 1"),
        (LearnerSettings, "betas=[1.0, 0.9]", "betas.0: Input should be less than 1"),
        (LearnerSettings, "betas=[-0.1, 0.9]", "betas.0: "),
        (LearnerSettings, "betas=[0.9, nan]", "betas.1: Input should be a finite number"),
        (LearnerSettings, "seed=-1", "seed: "),
        (Recipe, f"seed={2**64}", "seed: "),
        (Recipe, "sft.epochs=inf", "sft.epochs: "),
        (Recipe, "rejection.threshold=nan", "rejection.threshold: "),
        (Recipe, "ppo.policy.betas=[2, 0.9]", "ppo.policy.betas.0: "),
        (TaskSettings, "kinds={'strings/sort'=-1}", "kinds.strings/sort: "),
        (TaskSettings, "kinds={'strings/sort'=nan}", "kinds.strings/sort: "),
        (TaskSettings, "kinds={'strings/sort'=1e308, 'strings/upper'=1e308}", "kinds.strings/sort: "),
        (TaskSettings, "letters_alphabet='aa'", "letters_alphabet: 'aa' must consist of letters"),
        (TaskSettings, "letters_alphabet='ab '", "letters_alphabet: 'ab ' must consist of letters"),
        (Recipe, "dpo.label_smoothing=0.1", 'dpo: label_smoothing 0.1 is not read by loss "dpo": set loss = "cdpo"'),
        (Recipe, "model.init_from=''", "model.init_from: String should have at least 1 character"),
        (Recipe, "tokenizer.folder=''", "tokenizer.folder: String should have at least 1 character"),
        (CorpusSettings, "files=a.jsonl", 'files: Input should be a valid tuple; write a list: ["a.jsonl"]'),
        (TaskSettings, "kinds={'strings/sort'=0}", "kinds: no kind has a positive weight"),
        (BatchSettings, "growth=[[5, 8], [5, 9]]", "growth: windows must rise"),
        (PretrainSettings, "batch_growth=[[0, 8]]", "batch_growth: windows must rise"),
        (PretrainSettings, "snapshot_store=s3:/bucket/x", "snapshot_store: s3:/bucket/x: this would create"),
        (CorpusSettings, "held_out_share=1", "held_out_share: "),
        (LearnerPoolSettings, "num_cpus=0.00001", "num_cpus: Ray counts in steps of 0.0001"),
        (GeneratorPoolSettings, "num_gpus=1.5", "num_gpus: more than one GPU must be a whole number of them"),
        (PretrainSettings, "num_gpus=-1", "num_gpus: must not be negative"),
        (ServingSettings, "num_cpus=0.00001", "num_cpus: Ray counts in steps of 0.0001"),
        (ServingSettings, "request_timeout_s=inf", "request_timeout_s: "),
        (ElasticSettings, "orphan_s=1e300", "orphan_s: "),
    ],
)
def test_ranges(section: type[Settings], override: str, named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(None, section, [override])
    assert str(refused.value).startswith(f"--set: {named}")


KINDS = Kinds()


@workflow
def flow(
    dry_run: bool = True,
    tag: str = "",
    version: "str | None" = None,
    count: int = 1,
    rate: float = 0.5,
    sizes: tuple[int, ...] = (),
    part: Annotated[float, Field(gt=0, lt=1)] = 0.5,
    inner: Kinds = KINDS,
    later: "Unknown | None" = None,  # type: ignore[name-defined]  # noqa: F821
    loud=False,
    name="",
    anything=None,
    copy: str = "",
) -> None: ...


def given(*overrides: str, tree: dict[str, Any] | None = None) -> Any:
    return arguments_of(flow, {} if tree is None else tree, "recipe", overrides)[1]


def test_a_workflow_without_a_recipe_gets_what_its_annotations_say() -> None:
    assert given("dry_run=False", "tag=nan", "version=1.10", "count=3", "copy=2026-01-01") == {
        "dry_run": False, "tag": "nan", "version": "1.10", "count": 3, "copy": "2026-01-01",
    }  # fmt: skip
    assert given("loud=False", "name=1.10", "anything=1.10", "later=1.10") == {
        "loud": False, "name": "1.10", "anything": 1.1, "later": 1.1,
    }  # fmt: skip
    assert given("inner.text=1.10", "sizes=[1]") == {"inner": Kinds(text="1.10"), "sizes": (1,)}
    assert given(tree={"dry_run": "no", "count": "3"}) == {"dry_run": False, "count": 3}
    assert given() == {}, "a default is the function's own, and part of no key"
    for kept in ({"rate": 1}, {"rate": 0.25}, {"anything": [1, {"a": None}]}):
        assert repr(given(tree=dict(kept))) == repr(kept), "a valid value keeps its key"


@pytest.mark.parametrize(
    ("tree", "override", "named"),
    [
        ({}, "count=three", "--set: count: Input should be a valid integer"),
        ({"count": "three"}, "rate=1", "recipe: count: Input should be a valid integer"),
        ({"version": 1.1}, "rate=1", "recipe: version: Input should be a valid string; write it in quotes"),
        ({}, "dry_run=maybe", "--set: dry_run: Input should be a valid boolean"),
        ({}, "loud=maybe", "--set: loud: Input should be a valid boolean"),
        ({}, "rate=nan", "--set: rate: Input should be a finite number"),
        ({}, "part=1", "--set: part: Input should be less than 1"),
        ({}, "inner.txt=a", "--set: unknown setting inner.txt; did you mean inner.text?"),
        ({}, "cuont=1", "--set: unknown setting cuont; did you mean count?"),
        ({}, "p0=1", "--set: unknown setting p0; "),
        ({}, "count.x=1", "--set: count: "),
    ],
)
def test_a_workflow_without_a_recipe_refuses_by_name(tree: dict[str, Any], override: str, named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        given(override, tree=tree)
    assert str(refused.value).startswith(named)


@workflow
def open_flow(first: int, /, second: int = 2, *rest: int, third: str, **more: str) -> None: ...


def test_every_kind_of_parameter_has_its_place() -> None:
    overrides = ("first=1", "third=3", "more=1.10", "x=2")
    assert arguments_of(open_flow, {}, "recipe", overrides) == ((1,), {"third": "3", "more": "1.10", "x": "2"})
    with pytest.raises(ConfigError, match=r"third is missing: give --recipe FILE or --set third=VALUE"):
        arguments_of(open_flow, {"first": 1}, "recipe")
    with pytest.raises(ConfigError, match=r"workflow open_flow takes \*rest; .* use a named parameter"):
        arguments_of(open_flow, {"first": 1, "third": "a", "rest": [1]}, "recipe")


@workflow
def typed_flow(
    colour: Colour = Colour.RED,
    count: int = 1,
    rates: list[float] = [],  # noqa: B006
    counts: list[int] = [],  # noqa: B006
    items: Iterable[int] = (),
    wait_s: float = math.inf,
    limit=None,  # type: ignore[no-untyped-def]
    day: date | None = None,
    kinds: set[str] | None = None,
) -> None: ...


def test_values_have_the_type_of_their_parameter_from_a_file_too() -> None:
    tree = {"colour": "red", "count": 3.0, "rates": [1, 0.5], "counts": [2.0], "items": [1, 2]}
    values = arguments_of(typed_flow, dict(tree), "r.toml", ("wait_s=inf", "limit=none"))[1]
    assert values["colour"] is Colour.RED and repr(values["count"]) == "3" and values["items"] == [1, 2]
    assert repr(values["rates"]) == "[1, 0.5]", "1 for a float stays 1: runs that have it keep their names"
    assert repr(values["counts"]) == "[2]" and values["wait_s"] == math.inf and values["limit"] is None
    with pytest.raises(ConfigError, match=r"^--set: count: "):
        arguments_of(typed_flow, {}, "r.toml", ("count=nan",))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("day=2026-01-01", r"^--set: day is a datetime.date, which .*; annotate it as str, and write it in quotes$"),
        (
            "limit=2026-01-01",
            r"^--set: limit is a datetime.date, which .*; annotate it as str, and write it in quotes$",
        ),
        ("kinds=['a']", r"^--set: kinds is a builtins.set, which cannot be stored"),
    ],
)
def test_what_no_run_can_keep_is_refused_by_its_parameter(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        arguments_of(typed_flow, {}, "recipe", (override,))


def test_a_recipe_may_lie_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.toml").write_text("count = 3")
    assert load("~/r.toml", Kinds).count == 3


class Adam(Settings):
    kind: Literal["adam"] = "adam"
    beta: float = 0.9


class Sgd(Settings):
    kind: Literal["sgd"] = "sgd"
    patience_s: float = math.inf
    steps: int = 1


class Nesterov(Sgd):
    kind: Literal["nesterov"] = "nesterov"  # type: ignore[assignment]


class Chosen(Settings):
    optimizer: Annotated[Adam | Sgd | Nesterov, Field(discriminator="kind")] = Adam()


def test_a_setting_may_choose_among_sections_and_their_numbers_are_checked() -> None:
    chosen = load(None, Chosen, ["optimizer.kind=nesterov", "optimizer.patience_s=inf", "optimizer.steps=2"])
    assert chosen.optimizer == Nesterov(steps=2)
    for override in ("patience_s=nan", "steps=true", f"steps={2**64}"):
        with pytest.raises(ConfigError, match=rf"optimizer.nesterov.{override.partition('=')[0]}: "):
            load(None, Chosen, ["optimizer.kind=nesterov", f"optimizer.{override}"])
    with pytest.raises(ConfigError, match=r"^--set: optimizer: Input tag 'cow' .* does not match any of the expected"):
        load(None, Chosen, ["optimizer.kind=cow"])
