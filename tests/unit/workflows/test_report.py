"""The report of a hand-written run: every number on the page and in report.json can be checked by eye."""

import io
import json
import os
import re
import sys
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

from infra.storage import Store, open_store
from infra.telemetry import MetricsWriter
from tests.helpers import page_stores as stores
from tests.helpers.stored_records import append
from workflows.driver.settings import RunSettings
from workflows.graph import Artifact, workflow
from workflows.graph.values import encode
from workflows.launch import script
from workflows.launch.display import PlainDisplay
from workflows.report import page as report_page
from workflows.report import write as report_writer
from workflows.report.record import RunRecord, StepRecord, gather_metrics, plain, read_run
from workflows.report.summary import summarise, table, table_lines
from workflows.report.write import write
from workflows.runs.catalog import load_run


def _evaluation(stage: str, correct: int, versus: dict[str, Any] | None = None) -> dict[str, Any]:
    answer = f"the answer of <{stage}>"
    return {
        "stage": stage,
        "n": 512,
        "accuracy": correct / 512,
        "accuracy_ci": [correct / 512 - 0.04, correct / 512 + 0.04],
        "per_task_type": {
            "reasoning/arithmetic": {"n": 256, "accuracy": 0.25},
            "text/reverse": {"n": 256, "accuracy": 0.5},
        },
        "pass_at_n": {"pass@1": 0.3, "pass@8": 0.75},
        "reward": {"helpfulness": 1.25, "safety": -0.5},
        "samples": [
            {
                "prompt": "12+30=",
                "answer": answer,
                "expected": "42",
                "correct": stage == "dpo",
                "task_type": "reasoning/arithmetic",
            },
            {"prompt": f"only {stage}", "answer": "x", "expected": "y", "correct": False, "task_type": "text/reverse"},
        ],
        "versus": versus or {},
    }


def _record(**changes: Any) -> RunRecord:
    steps = [
        StepRecord("corpus", "build_corpus", "reused", 1000.0, 1002.0),
        StepRecord("sft", "fine_tune", "committed", 1002.0, 1032.5, result={"evaluation": _evaluation("sft", 128)}),
        StepRecord(
            "dpo",
            "optimise_preferences",
            "committed",
            1032.5,
            1060.0,
            attempts=2,
            result=[_evaluation("dpo", 256, {"sft": {"difference": 0.25, "standard_error": 0.02}})],
        ),
        StepRecord(
            "deploy",
            "deploy",
            "committed",
            1060.0,
            1090.0,
            result={"grpc": True, "openai": True, "weight_version": "v9"},
        ),
    ]
    metrics = [
        {
            "stage": "sft",
            "step": step,
            "loss": 3.0 - step / 10,
            "loss/text/reverse": 2.0,
            "loss/reasoning/arithmetic": 1.0,
        }
        for step in range(10)
    ] + [{"stage": "ppo", "step": step, "reward": step / 10, "kl": 0.01 * step} for step in range(10)]
    return RunRecord(
        **{
            "run_id": "demo-1",
            "workflow": "llama3",
            "status": "finished",
            "steps": steps,
            "metrics": metrics,
            **changes,
        }
    )


def test_summary() -> None:
    summary = summarise(_record())
    assert summary["wall_s"] == 90.0
    assert summary["stages"] == [
        {"name": "corpus", "seconds": 2.0, "status": "reused"},
        {"name": "sft", "seconds": 30.5, "status": "committed"},
        {"name": "dpo", "seconds": 27.5, "status": "committed"},
        {"name": "deploy", "seconds": 30.0, "status": "committed"},
    ]
    assert list(summary["eval"]) == ["sft", "dpo"]
    assert summary["eval"]["dpo"]["accuracy"] == 0.5
    assert summary["eval"]["dpo"]["accuracy_ci"] == [0.46, 0.54]
    assert summary["eval"]["dpo"]["versus"] == {"sft": {"difference": 0.25, "standard_error": 0.02}}
    assert "samples" not in summary["eval"]["dpo"]
    assert summary["served"] == {"grpc": True, "openai": True, "weight_version": "v9"}


def test_nothing_served_is_false_and_only_true_is_true() -> None:
    assert summarise(_record(steps=[]))["served"] == {"grpc": False, "openai": False}
    steps = [StepRecord("deploy", "deploy", "committed", result={"grpc": "yes", "openai": 1})]
    assert summarise(_record(steps=steps))["served"] == {"grpc": False, "openai": False}


def test_a_versus_with_its_stage_inside_is_the_same() -> None:
    versus = {"stage": "sft", "difference": 0.25, "standard_error": 0.02}
    steps = [StepRecord("dpo", "s", "committed", result=_evaluation("dpo", 256, versus))]
    assert summarise(_record(steps=steps))["eval"]["dpo"]["versus"] == {
        "sft": {"difference": 0.25, "standard_error": 0.02}
    }


def test_a_stage_evaluated_again_counts_once_with_its_last_numbers() -> None:
    steps = [
        StepRecord("a", "evaluate", "committed", result=[_evaluation("sft", 128), _evaluation("dpo", 256)]),
        StepRecord("b", "evaluate", "committed", result=_evaluation("sft", 192)),
    ]
    assert {stage: item["accuracy"] for stage, item in summarise(_record(steps=steps))["eval"].items()} == {
        "dpo": 0.5,
        "sft": 0.375,
    }


def test_table_marks_what_is_beyond_two_standard_errors() -> None:
    header, sft, dpo = table(summarise(_record()))
    assert header[:4] == ["stage", "accuracy", "95% interval", "vs before"]
    assert header[-2:] == ["reasoning/arithmetic", "text/reverse"]
    assert sft[:4] == ["sft", "25.0%", "21.0% to 29.0%", ""]
    assert dpo[:4] == ["dpo", "50.0%", "46.0% to 54.0%", "+25.0*"]
    shown = dict(zip(header, dpo, strict=True))
    assert shown["pass@8"] == "0.75" and shown["safety reward"] == "-0.5"
    weak = _evaluation("dpo", 256, {"sft": {"difference": 0.03, "standard_error": 0.02}})
    steps = [*_record().steps[:2], StepRecord("dpo", "s", "committed", result=weak)]
    assert table(summarise(_record(steps=steps)))[2][3] == "+3.0"


class Pair(NamedTuple):
    first: int
    second: int


@dataclass(frozen=True)
class Outcome:
    model: dict[str, Any]
    pair: tuple[int, int]
    worst: float
    odd: Any = None


def test_plain_reads_encoded_results_without_their_classes() -> None:
    artifact = Artifact("d" * 64)
    odd = [Pair(1, 2), OrderedDict(b=1), Counter("a"), np.float64(0.5), os.fsdecode(b"\xe9"), {(1,): 2}]
    encoded = encode(Outcome({"weights": artifact}, (1, 2), float("inf"), odd))
    encoded["$dataclass"] = "no.such.module:Outcome"
    told = [{"first": 1, "second": 2}, {"b": 1}, {"a": 1}, 0.5, r"\udce9", {"[1]": 2}]
    assert plain(encoded) == {"model": {"weights": artifact}, "pair": [1, 2], "worst": float("inf"), "odd": told}


def test_metrics_are_read_once_per_artifact(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with MetricsWriter(tmp_path / "runs/r/one/data/metrics.jsonl") as writer:
        writer.write("sft", 1, loss=2.0)
    one, none = Artifact("1", location="runs/r/one"), Artifact("2", location="runs/r/none")
    steps = [
        StepRecord("sft", "fine_tune", "committed", result={"model": one}),
        StepRecord("pick", "pick", "committed", result=[one, {"other": none}]),
    ]
    assert gather_metrics(store, steps) == [{"stage": "sft", "step": 1, "loss": 2.0}]


def test_files_and_results_that_only_look_like_ours_cost_no_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    files = {
        "blank": b'{"loss": 1}\n\n',
        "lists": b"[1, 0.5]\n",
        "latin": '{"n": "caf\xe9"}\n'.encode("latin-1"),
        "mixed": b'{"step": 1, "loss": 2.0, "note": "x"}\n\nhello\n{"step": 2, "loss": "high"}\n',
    }
    for name, data in files.items():
        store.put(f"runs/r/{name}/data/metrics.jsonl", data)
    results: list[Any] = [Artifact(name, location=f"runs/r/{name}") for name in files]
    results += [
        {"stage": "dev", "n": 3, "accuracy": None},
        {"stage": "dev", "n": 3, "accuracy": {"top1": 0.5}},
        {"stage": ["dev"], "n": 3, "accuracy": 0.5},
        {"stage": "nan", "n": 3, "accuracy": float("nan")},
        {
            "stage": "test",
            "n": 3,
            "accuracy": 0.5,
            "accuracy_ci": 0.1,
            "per_task_type": {"a": 0.5, "b": {"accuracy": 1}},
        }
        | {
            "pass_at_n": [1],
            "safety": {"refused": None},
            "reward": 3,
            "samples": ["x", {"prompt": 1}],
            "versus": "dev",
        },
        {
            "stage": "more",
            "n": 3,
            "accuracy": 1,
            "versus": {"test": {"difference": 0.5}, "x": None},
            "samples": {"a": 1},
        },
        {"grpc": [1], "openai": None, "weight_version": {}},
    ]
    steps = [StepRecord(f"s{place}", "s", "committed", result=result) for place, result in enumerate(results)]
    metrics = gather_metrics(store, steps)
    assert metrics == [{"stage": "s3", "step": 1, "loss": 2.0}, {"stage": "s3", "step": 2}]
    warned = [record.message for record in caplog.records]
    assert len(warned) == 1 and warned[0].endswith("skipped 2 lines that are not metrics (objects with a `step`)")
    record = _record(steps=steps, metrics=metrics)
    assert summarise(record)["eval"] == {
        "test": {"n": 3, "accuracy": 0.5, "per_task_type": {"b": {"accuracy": 1}}, "pass_at_n": {}, "safety": {}}
        | {"reward": {}, "versus": {}},
        "more": {"n": 3, "accuracy": 1, "versus": {}},
    }
    assert table_lines(summarise(record))[1].split() == ["accuracy", "50.0%", "100.0%"]
    sections = _answers(write(record, tmp_path / "out").read_text())["results"]["sections"]
    assert [section["title"] for section in sections] == ["Evaluation"]


@workflow
def stepless() -> int:
    """Nothing that needs Ray."""
    return 7


def test_what_fails_after_the_end_changes_nothing_of_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ModuleType("flows")
    monkeypatch.setattr(module, "on_finish", lambda result: sys.exit(3), raising=False)
    monkeypatch.setattr(report_writer, "write", lambda *_: {}["gone"])
    settings = RunSettings(store=str(tmp_path / "store"), run_id="r")
    monkeypatch.setitem(sys.modules, "flows", module)
    shown = io.StringIO()
    page = script.run(script.Launch(module, stepless, (), {}), settings, tmp_path / "reports", PlainDisplay(shown))
    assert page is None and load_run(open_store(tmp_path / "store"), "r").status == "finished"
    assert "warning: the run has finished, but on_finish of flows failed: SystemExit: 3" in shown.getvalue()
    assert "the report (write it with `recua report r`) failed: KeyError: 'gone'" in shown.getvalue()
    assert "Traceback" in capsys.readouterr().err


def test_table_for_the_terminal_has_a_column_per_stage() -> None:
    lines = table_lines(summarise(_record()))
    assert lines[0].split() == ["stage", "sft", "dpo"]
    assert lines[1].split() == ["accuracy", "25.0%", "50.0%"]
    assert len({len(line) for line in lines}) == 1
    assert table_lines(summarise(_record(steps=[]))) == []


def test_page_is_self_contained_and_has_the_data(tmp_path: Path) -> None:
    page = write(_record(), tmp_path / "runs" / "demo-1").read_text()
    assert json.loads((tmp_path / "runs" / "demo-1" / "report.json").read_text())["run"] == "demo-1"
    assert not re.search(r"""(?:src|href)=["']?(?:(?:https?:)?//|assets)""", page) and "default-src 'none'" in page
    answers = _answers(page)
    assert [row["id"] for row in answers["steps"]["steps"]] == ["corpus", "sft", "dpo", "deploy"]
    assert {(curve["call"], curve["name"]) for curve in answers["metrics"]["curves"]} == {
        ("sft", "loss"),
        ("sft", "loss/text/reverse"),
        ("sft", "loss/reasoning/arithmetic"),
        ("ppo", "reward"),
        ("ppo", "kl"),
    }
    sections = {section["title"]: section["rows"] for section in answers["results"]["sections"]}
    assert list(sections) == ["Evaluation", "Sample answers, first and last stage"]
    assert sections["Evaluation"][2][:4] == ["dpo", "50.0%", "46.0% to 54.0%", "+25.0*"]
    header, *asked = sections["Sample answers, first and last stage"]
    assert header[-2:] == ["sft", "dpo"] and len(asked) == 1, "the others were not answered by both"
    wrong, right = {"text": "the answer of <sft>", "correct": False}, {"text": "the answer of <dpo>", "correct": True}
    assert asked[0] == ["reasoning/arithmetic", "12+30=", "42", wrong, right]
    assert answers["results"]["endpoints"] == ["grpc", "openai"] and "<dpo>" not in page


def _answers(page: str) -> dict[str, Any]:
    """What is in a page, of all that a service would be asked for."""
    found = re.search(r'<script type="application/json" id="saved-run">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    answers: dict[str, Any] = json.loads(found[1])
    return answers


def test_page_of_a_run_that_failed_early_says_why_without_secrets(tmp_path: Path) -> None:
    steps = [StepRecord("corpus", "c", "failed", 1.0, 2.0, error="DataError: x.jsonl:3 password=hunter2222")]
    page = write(_record(steps=steps, metrics=[], status="failed"), tmp_path).read_text()
    said = {"id": "corpus", "message": "DataError: x.jsonl:3 password=[redacted]"}
    assert _answers(page)["results"]["errors"] == [said] and "hunter2222" not in page
    assert _answers(page)["results"]["sections"] == []


def test_page_of_a_stored_run_has_its_steps_in_full_with_the_ends_of_their_logs(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    page = _stored_page(store, tmp_path)
    answers, secret = _answers(page), "hunter2222"
    assert answers["run"]["recipe"] == [{"name": "[0]", "value": {"seed": 3}}]
    assert [row.get("needs", []) for row in answers["steps"]["steps"]] == [[], ["corpus[0]"]]
    train = answers["step"]["train[0]"]
    assert train["result"]["api_token"] == "[redacted]" and [each["status"] for each in train["tries"]] == ["committed"]
    (log,) = [log for log in answers["log"] if log["id"] == "train[0]"]
    assert "bytes before; recua logs r train[0]]" in log["text"] and log["text"].endswith("password=[redacted]\n")
    assert len(log["text"]) < 40_000 and log["ended"] and secret not in page
    assert [(curve["name"], curve["y"]) for curve in answers["metrics"]["curves"]] == [("loss", [2.0, 1.0])]


def test_page_of_a_run_with_huge_results_stays_small_and_has_the_failed_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "MOST_LETTERS", 300_000)
    store = open_store(tmp_path / "store")
    large = [stores.commit(f"large[{number}]", result="x" * 100_000) for number in range(9)]
    failed = [stores.start("check[0]"), stores.failure("check[0]", "no", final=True)]
    append(stores.open_run(store, "r"), [*large, *failed, stores.end("failed")])
    answers = _answers(write(read_run(store, load_run(store, "r")), tmp_path).read_text())
    assert "check[0]" in answers["step"] and 2 <= len(answers["step"]) < 5 and len(answers["steps"]["steps"]) == 10


def _stored_page(store: Store, folder: Path) -> str:
    journal = stores.open_run(store, "r", {"seed": 3})
    store.put("somewhere/m/data/metrics.jsonl", b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    result = {"model": stores.artifact("m", "model"), "api_token": "hunter2222"}
    corpus = stores.commit("corpus[0]", "demo:corpus")
    train = stores.commit("train[0]", result=result, needs=["corpus[0]"])
    append(journal, [corpus, stores.start("train[0]"), train, stores.end(result=None)])
    store.put("runs/r/attempts/train[0]-1/log.txt", b"step\n" * 10_000 + b"password=hunter2222\n")
    record = read_run(store, load_run(store, "r"))
    return write(record, folder / "page").read_text()
