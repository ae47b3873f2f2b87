"""What the page is told of runs: views over small stores whose journals the real Journal wrote."""

import json
import os
import time
from collections import Counter, OrderedDict
from enum import Flag
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner

from infra.errors import StoreError, UserError
from infra.storage import FolderStore, Store, open_store
from infra.telemetry import MetricsWriter
from tests.helpers import page_stores as stores
from tests.helpers.page_stores import artifact, commit, end, failure, full, start
from tests.helpers.stored_records import Json, append
from workflows.cli import main
from workflows.graph import ArtifactWriter
from workflows.graph.artifacts import Artifact, ArtifactSource
from workflows.graph.values import encode
from workflows.identity.keys import index_key, parameters_key
from workflows.runs.journal import Journal
from workflows.views import run_views
from workflows.views.metric_curves import thin
from workflows.views.shortened import shown

TRACE = 'Traceback (most recent call last):\n  File "recipe.py", line 3, in train\nValueError: no\n'


class Remote(FolderStore):
    """A folder that nobody may read in place, as S3 is."""

    def local_path(self, key: str) -> Path | None:
        return None


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def cache() -> run_views.RunCache:
    return run_views.RunCache()


def driver_dies(journal: Journal) -> None:
    """The lease of a process that is no more."""
    assert journal.state.lease is not None
    append(journal, [{**journal.state.lease, "process_start": "0"}])


def statuses(answer: dict[str, Any]) -> dict[str, str]:
    return {row["id"]: row["status"] for row in answer["steps"]}


def sealed(store: Store, location: str, name: str, text: str, folder: Path, file: str = "data.txt") -> Json:
    """A real artifact in the store, as a result names it."""
    writer = ArtifactWriter(store, ArtifactSource(store.url, ""), location, folder, lambda: None)
    (writer.path / file).write_text(text)
    return {"$artifact": {**writer.seal().record(), "name": name}}


def test_steps_are_told_once_and_again_only_where_they_changed(store: Store, cache: run_views.RunCache) -> None:
    journal = stores.open_run(store, "r")
    append(journal, [start("a"), start("b", needs=["a"])])
    first = run_views.steps(cache, store, "r")
    assert statuses(first) == {"a": "running", "b": "running"} and first["live"] and first["reset"]
    assert first["steps"][1]["needs"] == ["a"]

    append(journal, [commit("a", seconds=2.5)])
    second = run_views.steps(cache, store, "r", first["version"])
    assert statuses(second) == {"a": "committed"} and second["steps"][0]["seconds"] == 2.5 and not second["reset"]
    assert run_views.steps(cache, store, "r", second["version"])["steps"] == []
    assert statuses(run_views.steps(cache, store, "r")) == {"a": "committed", "b": "running"}
    assert statuses(run_views.steps(run_views.RunCache(), store, "r")) == statuses(run_views.steps(cache, store, "r"))


def test_a_version_from_another_life_of_the_store_gets_everything(store: Store, cache: run_views.RunCache) -> None:
    append(stores.open_run(store, "r"), [start("a")])
    answer = run_views.steps(cache, store, "r", after=99)
    assert answer["reset"] and statuses(answer) == {"a": "running"}


def test_every_status(store: Store, cache: run_views.RunCache) -> None:
    journal = stores.open_run(store, "r")
    ask = {"type": "wait", "step": "workflows.waits:approval", "message": "Ship it?", "time": 5.0, "deadline": None}
    append(
        journal,
        [
            start("committed"),
            commit("committed"),
            commit("reused", reused_from="earlier", node="", attempt_id=""),
            start("running"),
            start("waiting"),
            failure("waiting", "again", final=False),
            start("failed"),
            failure("failed", "no", final=True),
            {**ask, "call": "approval[ship]", "needs": ["committed"]},
            {**ask, "call": "event[labels]", "step": "workflows.waits:event"},
        ],
    )
    told = {row["id"]: row for row in run_views.steps(cache, store, "r")["steps"]}
    assert {call: row["status"] for call, row in told.items()} == {
        "committed": "committed",
        "reused": "reused",
        "running": "running",
        "waiting": "waiting",
        "failed": "failed",
        "approval[ship]": "waiting-for-approval",
        "event[labels]": "waiting-for-event",
    }
    assert told["failed"]["message"] == "ValueError: no" and told["reused"]["reused_from"] == "earlier"
    assert told["approval[ship]"]["message"] == "Ship it?" and told["approval[ship]"]["needs"] == ["committed"]

    version = run_views.steps(cache, store, "r")["version"]
    driver_dies(journal)
    after = run_views.steps(cache, store, "r", version)
    assert statuses(after) == {"running": "interrupted", "waiting": "interrupted"} and not after["live"]
    assert run_views.run(cache, store, "r")["counts"] == {
        "committed": 1,
        "reused": 1,
        "failed": 1,
        "interrupted": 2,
        "waiting-for-approval": 1,
        "waiting-for-event": 1,
    }


def test_who_is_asked_sees_what_it_is_about(store: Store, cache: run_views.RunCache) -> None:
    shown = {"model": {"$artifact": full("a")}, "note": "token=abcdefghijkl"}
    ask = {"type": "wait", "call": "approval[ship]", "step": "workflows.waits:approval", "message": "Ship it?"}
    ask |= {"time": 5.0, "needs": ["train"], "deadline": None, "show": shown}
    append(stores.open_run(store, "r"), [commit("train", result=artifact("a", "model")), ask])
    told = run_views.step(cache, store, "r", "approval[ship]")["wait"]
    assert (told["message"], told["since"]) == ("Ship it?", 5.0)
    assert told["show"]["model"] == {"$artifact": {"digest": full("a"), "name": "model"}}
    assert "abcdefghijkl" not in json.dumps(told["show"])


def test_an_error_of_twenty_megabytes_is_shown_by_its_ends(store: Store, cache: run_views.RunCache) -> None:
    """As a store may have it from before errors were cut where they are made."""
    journal = stores.open_run(store, "r")
    huge = failure("a", f"begin {'x' * 20_000_000} end", final=True)
    huge["error"]["traceback"] = f"{TRACE}{huge['error']['message']}\n"
    append(journal, [start("a"), huge, {**end(), "status": "failed", "error": huge["error"]}])
    for command in (["show", "r"], ["show", "r", "a"], ["report", "r", "--output", str(Path(store.url) / "out")]):
        ran = CliRunner().invoke(main.main_group, [*command, "--store", store.url])
        assert ran.exit_code == 0 and len(ran.output) < 210_000
    shown = run_views.step(cache, store, "r", "a")["error"]
    assert (
        shown["message"].startswith("begin x") and shown["message"].endswith(" end") and len(shown["message"]) < 210_000
    )
    assert len(json.dumps(run_views.steps(cache, store, "r"))) < 10_000


def test_a_retried_step_runs_again(store: Store, cache: run_views.RunCache) -> None:
    journal = stores.open_run(store, "r")
    append(journal, [start("a"), failure("a", "once", final=False), start("a", attempt=2, at=stores.ZERO + 9)])
    [row] = run_views.steps(cache, store, "r")["steps"]
    assert (row["status"], row["attempts"], row["started"]) == ("running", 2, stores.ZERO + 9) and "ended" not in row
    tries = run_views.step(cache, store, "r", "a")["tries"]
    assert [(each["number"], each["status"]) for each in tries] == [(1, "failed"), (2, "running")]
    assert tries[0]["error"]["message"] == "once"


def test_edges_of_a_journal_that_names_none_come_from_the_artifacts(store: Store, cache: run_views.RunCache) -> None:
    given = {"args": [{"$artifact": full("c0")}], "kwargs": {}}
    journal = stores.open_run(store, "r")
    append(journal, [commit("corpus", result=artifact("c0", "corpus")), commit("model", arguments=given)])
    rows = {row["id"]: row for row in run_views.steps(cache, store, "r")["steps"]}
    assert rows["model"]["needs"] == ["corpus"] and "needs" not in rows["corpus"]


def test_the_summary_of_a_run(store: Store, cache: run_views.RunCache) -> None:
    recipe = {"$settings": "recipes:Recipe", "fields": {"seed": 3, "api_token": "abcdefgh", "note": "token=abcdefgh"}}
    journal = stores.open_run(store, "r", recipe)
    assert run_views.run(cache, store, "r")["can"]["cancel"]
    error = {"kind": "user", "type": "ValueError", "message": "password: hunter22", "traceback": TRACE}
    append(journal, [end("failed", error=error, at=stores.ZERO + 60)])
    told = run_views.run(cache, store, "r")
    assert (told["status"], told["ended"], told["drivers"]) == ("failed", stores.ZERO + 60, 1)
    assert told["recipe"][0]["value"] == {"seed": 3, "api_token": "[redacted]", "note": "token=[redacted]"}
    assert told["error"]["message"] == "password: [redacted]" and told["error"]["traceback"] == TRACE
    assert not told["can"]["cancel"]
    [head] = run_views.runs(store)
    assert (head["run_id"], head["status"], head["workflow"]) == ("r", "failed", "recipes.demo:demo")


def test_names_that_are_not_there(store: Store, cache: run_views.RunCache) -> None:
    append(stores.open_run(store, "run-1"), [start("train[0]")])
    with pytest.raises(UserError, match="did you mean run-1"):
        run_views.steps(cache, store, "run-2")
    with pytest.raises(UserError, match="no run"):
        run_views.run(cache, store, "../run-1")
    with pytest.raises(UserError, match=r"did you mean train\[0\]"):
        run_views.step(cache, store, "run-1", "train[1]")
    with pytest.raises(UserError, match="no attempt"):
        run_views.log(cache, store, "run-1", "train[0]", attempt="../../secret")


def test_a_damaged_slot_is_named(store: Store, cache: run_views.RunCache) -> None:
    append(stores.open_run(store, "r"), [start("a")])
    store.put("runs/r/journal/00000003.json", b'{"format": 1')
    with pytest.raises(StoreError, match="slot 3 is damaged"):
        run_views.steps(cache, store, "r")


def test_one_call_with_everything(store: Store, cache: run_views.RunCache, tmp_path: Path) -> None:
    made = sealed(store, "runs/r/attempts/train[0]-1/model", "model", "weights", tmp_path)
    given = {
        "args": [{"$artifact": full("c0")}, {"$settings": "r:Sft", "fields": {"lr": 0.1, "rate": {"$float": "nan"}}}],
        "kwargs": {"hf_token": "swordfish"},
    }
    result = {"$dataclass": "r:Trained", "fields": {"model": made, "loss": 0.5, "best": {"$tuple": [1, 2]}}}
    store.put(parameters_key(stores.CODE, "recipes.demo:train"), b'["corpus", "sft", "hf_token"]')
    store.put(f"code/{stores.CODE}.json", json.dumps({"recipes.demo:train": "a" * 64}).encode())
    journal = stores.open_run(store, "r")
    append(journal, [commit("corpus", result=artifact("c0", "corpus")), start("train[0]", at=1.0)])
    append(journal, [commit("train[0]", at=2.0, seconds=3.0, arguments=given, result=result)])
    told = run_views.step(cache, store, "r", "train[0]")
    assert told["arguments"] == [
        {"name": "corpus", "value": {"$artifact": {"digest": full("c0"), "name": "corpus"}}},
        {"name": "sft", "value": {"lr": 0.1, "rate": "nan"}},
        {"name": "hf_token", "value": "[redacted]"},
    ]
    digest = made["$artifact"]["digest"]
    assert told["result"] == {"model": {"$artifact": {"digest": digest, "name": "model"}}, "loss": 0.5, "best": [1, 2]}
    assert told["code"] == {"digest": stores.CODE, "parts": {"recipes.demo:train": "a" * 64}}
    [shown] = told["artifacts"]
    assert (shown["digest"], shown["bytes"], shown["files"]) == (digest, 7, [{"path": "data.txt", "size": 7}])
    [attempt] = told["tries"]
    assert (attempt["status"], attempt["started"], attempt["ended"]) == ("committed", 2.0, 5.0)
    assert told["error"] is None and told["needs"] == ["corpus"]


class Pair(NamedTuple):
    first: int
    second: int


class Level(Flag):
    LOW = 1
    HIGH = 2


def test_values_of_any_class_are_shown_as_what_they_hold() -> None:
    odd = [Pair(1, 2), OrderedDict(b=1), Counter("a"), np.float64(0.5), os.fsdecode(b"\xe9"), Level.LOW | Level.HIGH]
    told = shown(encode(odd))
    assert told == [{"first": 1, "second": 2}, {"b": 1}, {"a": 1}, 0.5, r"\udce9", "LOW|HIGH"]
    json.dumps(told, ensure_ascii=False).encode()


def test_a_very_long_result_is_shown_by_its_beginning(store: Store, cache: run_views.RunCache) -> None:
    append(stores.open_run(store, "r"), [commit("a", result=["x" * 100] * 10_000)])
    told = run_views.step(cache, store, "r", "a")
    assert len(told["result"]) == 21 and told["result"][-1].startswith("... 10000 in all")


def test_answers_are_json_even_where_a_result_is_not_finite(store: Store, cache: run_views.RunCache) -> None:
    values = [
        {"$float": "inf"},
        {"$artifact": {"digest": "d", "name": "n", "location": "l", "meta": {"x": float("nan")}}},
    ]
    journal = stores.open_run(store, "r")
    append(journal, [commit("a", result=values), end(result=values)])
    for answer in (run_views.step(cache, store, "r", "a"), run_views.run(cache, store, "r")):
        json.dumps(answer, allow_nan=False)
    assert run_views.run(cache, store, "r")["result"][0] == "inf"


@pytest.mark.parametrize("kind", [FolderStore, Remote])
def test_a_log_is_read_from_where_one_left_off(
    tmp_path: Path, cache: run_views.RunCache, kind: type[FolderStore]
) -> None:
    store = kind(tmp_path / "store")
    journal = stores.open_run(store, "r")
    append(journal, [start("a"), start("b"), failure("b", "no", final=False), start("b", attempt=2)])
    key = "runs/r/attempts/a-1/log.txt"
    empty = run_views.log(cache, store, "r", "a")
    assert (empty["text"], empty["offset"], empty["ended"], empty["attempts"]) == ("", 0, False, ["a-1"])
    store.put(key, "grün\nthe password=hunter22 is\nhalf a li".encode())
    first = run_views.log(cache, store, "r", "a")
    assert first["text"] == "grün\nthe password=[redacted] is\n" and not first["ended"]
    store.put(key, "grün\nthe password=hunter22 is\nhalf a line\nand the last".encode())
    assert run_views.log(cache, store, "r", "a", offset=first["offset"])["text"] == "half a line\n"
    assert run_views.log(cache, store, "r", "a", offset=-35)["text"] == "half a line\n"
    append(journal, [commit("a")])
    last = run_views.log(cache, store, "r", "a", offset=first["offset"])
    assert last["text"] == "half a line\nand the last" and last["ended"]

    store.put("runs/r/attempts/b-1/log.txt", b"first attempt")
    old = run_views.log(cache, store, "r", "b", attempt="b-1")
    assert old["text"] == "first attempt" and old["ended"] and old["attempts"] == ["b-1", "b-2"]


def test_a_long_log_comes_in_pieces_that_lose_nothing(store: Store, cache: run_views.RunCache) -> None:
    text = "".join(f"line {number} is ünïcödé\n" for number in range(30_000))
    append(stores.open_run(store, "r"), [start("a"), commit("a")])
    store.put("runs/r/attempts/a-1/log.txt", text.encode())
    found, offset, ended = "", 0, False
    while not ended:
        piece = run_views.log(cache, store, "r", "a", offset=offset)
        found, offset, ended = found + piece["text"], piece["offset"], piece["ended"]
    assert found == text


def test_the_drivers_log(store: Store, cache: run_views.RunCache) -> None:
    append(stores.open_run(store, "r"), [end()])
    assert run_views.log(cache, store, "r")["text"] == ""
    store.put("runs/r/driver/000001.log", b"first driver\n")
    store.put("runs/r/driver/000002.log", b"second driver\n")
    assert run_views.log(cache, store, "r")["text"] == "second driver\n"


def test_curves_of_results_and_of_the_history(store: Store, cache: run_views.RunCache, tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as rows:
        for number in range(3):
            rows.write("sft", number + 1, loss=[2.0, float("nan"), 1.0][number])
    text = (tmp_path / "metrics.jsonl").read_text()
    made = sealed(store, "runs/r/attempts/a-1/metrics", "metrics", text, tmp_path, "metrics.jsonl")
    journal = stores.open_run(store, "r")
    append(journal, [start("a"), start("b")])
    row = [7, 1.0, 1, 10, {"loss": 3.0}]
    history = {"format": 1, "curves": [{"call": "b", "rows": [row]}], "texts": []}
    store.put("runs/r/history/00000001-0000000007.json", json.dumps(history).encode())
    first = run_views.metrics(cache, store, "r")
    assert first["curves"] == [] and [(e["call"], e["done"], e["metrics"]) for e in first["events"]] == [
        ("b", 1, {"loss": 3.0})
    ]

    append(journal, [commit("a", result={"metrics": made})])
    second = run_views.metrics(cache, store, "r", after=first["version"])
    assert second["events"] == []
    assert second["curves"] == [{"call": "a", "name": "loss", "x": [1, 3], "y": [2.0, 1.0]}]
    assert run_views.metrics(cache, store, "r", after=second["version"])["curves"] == []
    assert len(run_views.metrics(cache, store, "r", "a")["curves"]) == 1
    assert run_views.metrics(cache, store, "r", "b")["curves"] == []


def test_curves_of_several_stages_in_one_file_stay_apart(store: Store, cache: run_views.RunCache) -> None:
    rows = [{"stage": stage, "step": 1, "loss": value} for stage, value in (("warm-up", 2.0), ("main", 1.0))]
    store.put("somewhere/m/data/metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    append(stores.open_run(store, "r"), [commit("a", result=artifact("m", "metrics"))])
    curves = run_views.metrics(cache, store, "r")["curves"]
    assert {curve["name"]: curve["y"] for curve in curves} == {"warm-up loss": [2.0], "main loss": [1.0]}


def test_a_thinned_curve_keeps_its_ends_and_its_peaks() -> None:
    points: list[tuple[float, float]] = [
        (x, 100.0 if x == 4321 else -50.0 if x == 77 else x % 7) for x in range(10_000)
    ]
    kept = thin(points, 100)
    assert kept[0] == points[0] and kept[-1] == points[-1] and (4321, 100.0) in kept and (77, -50.0) in kept
    assert len(kept) <= 104 and kept == sorted(kept)
    assert thin(points[:50], 100) == points[:50]


def lineage_stores(store: Store) -> None:
    """Two runs: the first makes corpus and model, the second reuses both and tunes the model."""
    files = {"books.txt": "b" * 64}
    corpus = commit(
        "corpus", "recipes.demo:corpus", result=artifact("c0", "corpus"), arguments={"args": [files, 3], "kwargs": {}}
    )
    model = commit("train[0]", result=artifact("a0", "model"), needs=["corpus", "rate[0]"])
    model["arguments"] = {
        "args": [{"$artifact": full("c0")}, {"$settings": "r:S", "fields": {"lr": 0.1}}],
        "kwargs": {},
    }
    first = stores.open_run(store, "first")
    append(first, [corpus, commit("rate[0]", "recipes.demo:rate", result=0.1), model, end()])
    store.put(f"code/{stores.CODE}.json", b'{"recipes.demo:train": "1234"}')
    store.put(parameters_key(stores.CODE, "recipes.demo:corpus"), b'["files", "seed"]')

    again = {**model, "call": "train[base]", "reused_from": "first", "node": "", "attempt_id": "", "needs": ["corpus"]}
    store.put(index_key(model["key"]), json.dumps({"run": "first", "call": "train[0]"}).encode())
    tuned = commit("tune[0]", "recipes.demo:tune", result=artifact("d0", "model"), needs=["train[base]"])
    tuned["arguments"] = {"args": [{"$artifact": full("a0")}], "kwargs": {}}
    second = stores.open_run(store, "second")
    append(second, [{**corpus, "reused_from": "first", "node": "", "attempt_id": ""}, again, tuned, end()])


def test_lineage_goes_through_reuse_up_to_the_data(store: Store, cache: run_views.RunCache) -> None:
    lineage_stores(store)
    told = run_views.lineage(cache, store, "second", full("d0"))
    nodes = {node["id"]: node for node in told["nodes"]}
    wanted = [
        ("data:books.txt", "call:first/corpus"),
        ("call:first/corpus", f"artifact:{full('c0')}"),
        (f"artifact:{full('c0')}", "call:first/train[0]"),
        ("call:first/rate[0]", "call:first/train[0]"),
        ("call:first/train[0]", f"artifact:{full('a0')}"),
        (f"artifact:{full('a0')}", "call:second/tune[0]"),
        ("call:second/tune[0]", f"artifact:{full('d0')}"),
    ]
    assert sorted(map(tuple, told["edges"])) == sorted(wanted) and not told["truncated"]
    assert nodes.keys() == {name for edge in wanted for name in edge}
    assert nodes[f"artifact:{full('a0')}"]["name"] == "model" and nodes["data:books.txt"]["digest"] == "b" * 64
    trained = nodes["call:first/train[0]"]
    assert trained["reused_in"] == ["second"] and trained["recipe"] == [{"name": "[1]", "value": {"lr": 0.1}}]
    assert trained["code"]["parts"] == {"recipes.demo:train": "1234"}
    assert nodes["call:first/corpus"]["recipe"] == [{"name": "seed", "value": 3}]


def test_a_reused_step_has_the_log_of_the_run_that_made_it(store: Store, cache: run_views.RunCache) -> None:
    lineage_stores(store)
    store.put("runs/first/attempts/train[0]-1/log.txt", b"trained\n")
    assert (
        run_views.log(cache, store, "second", "train[base]")["text"] == ""
    )  # the first run has no record of its start
    told = run_views.step(cache, store, "second", "train[base]")
    assert told["origin"] == {"run_id": "first", "id": "train[0]"} and told["reused_from"] == "first"
    store.delete("runs/first/run.json")
    gone = run_views.step(run_views.RunCache(), store, "second", "train[base]")
    assert gone["origin"] is None and gone["reused_from"] == "first"
    alone = run_views.lineage(run_views.RunCache(), store, "second", full("d0"))
    assert "call:second/train[base]" in {node["id"] for node in alone["nodes"]}


def test_an_artifact_that_nobody_made(store: Store, cache: run_views.RunCache) -> None:
    append(stores.open_run(store, "r"), [end()])
    told = run_views.lineage(cache, store, "r", full("ee"))
    assert [node["kind"] for node in told["nodes"]] == ["artifact"] and told["edges"] == []


@pytest.mark.parametrize("kind", [FolderStore, Remote])
def test_ten_thousand_steps(tmp_path: Path, kind: type[FolderStore]) -> None:
    """Figures are printed, not asserted: the machine may be loaded."""
    store = kind(tmp_path / "store")
    journal = stores.chains(store, "big", finished=False)
    cache = run_views.RunCache()
    clock = time.perf_counter()
    first = run_views.steps(cache, store, "big")
    loaded = time.perf_counter() - clock
    size = len(json.dumps(first, separators=(",", ":")))
    assert len(first["steps"]) == 10_000 and size < 2_500_000
    append(journal, [start("extra[0]", needs=["chain[99]/link[99]"])])
    clock = time.perf_counter()
    second = run_views.steps(cache, store, "big", first["version"])
    assert [row["id"] for row in second["steps"]] == ["extra[0]"]
    print(f"{kind.__name__}: first {loaded:.3f} s, {size} bytes; then {time.perf_counter() - clock:.4f} s")
    told = run_views.lineage(cache, store, "big", full("00"))
    assert told["nodes"] == [{"id": f"artifact:{full('00')}", "kind": "artifact", "digest": full("00"), "name": ""}]


def test_an_artifact_and_its_record_agree() -> None:
    """The stores of these tests use the record that Artifact writes."""
    record = artifact("ab", "model")["$artifact"]
    assert Artifact.from_record(record, None).record() == record
