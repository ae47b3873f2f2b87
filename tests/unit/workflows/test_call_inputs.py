"""Inputs by value: what artifacts were sealed with counts, older versions' records stay good, and what many calls share
is looked at once."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from infra.errors import NonDeterminismError
from infra.storage import FolderStore
from tests.helpers.stored_records import append, parsed
from workflows.driver import session
from workflows.driver.reuse import ReuseLookup
from workflows.graph import Artifact
from workflows.graph import inputs as identities
from workflows.graph.inputs import Identities
from workflows.graph.mapping import fan_out
from workflows.graph.steps import EACH, Future, edges_of, resolve_edges, step, workflow
from workflows.graph.values import digest, earlier_identity, encode, identity
from workflows.identity.keys import canonical, content_key, index_key
from workflows.runs.journal import Journal
from workflows.runs.records import Commit

DIGEST = "d" * 64


@step
def deploy(model: Artifact, scores: Any = None) -> str:
    return f"threshold {model.meta['threshold']}"


class Score(NamedTuple):
    mean: float
    n: int


@workflow
def flow(recipe: Any) -> None: ...


@step
def train(threshold: float) -> Any: ...


def model(threshold: float | None, run: str = "old") -> dict[str, Any]:
    meta = {} if threshold is None else {"threshold": threshold}
    tree: dict[str, Any] = encode(Artifact(DIGEST, meta, "model", f"runs/{run}/attempts/x/model"))
    return tree


SCORES = {"$dict": [[2, "b"], [1, "a"]]}


def arguments(tree: Any, scores: Any = SCORES) -> dict[str, Any]:
    return {"args": [tree, scores], "kwargs": {}}


def known(store: FolderStore, commits: Any = None) -> ReuseLookup:
    return ReuseLookup(store, commits or {}, True, (), lambda *_: None)


def commit_of_older_version(
    store: FolderStore, call: str, tree: Any, run_id: str = "old", scores: Any = SCORES
) -> dict[str, Any]:
    """A commit as older versions wrote it: inputs by content only, a dict's keys in the order they had."""
    given = arguments(tree, scores)
    inputs = hashlib.sha256(canonical(earlier_identity(given))).hexdigest()
    fingerprint = known(store).fingerprint(deploy, deploy.default)
    key = content_key(deploy.name, inputs, fingerprint)
    record = {"type": "commit", "call": call, "step": deploy.name, "key": key, "code": fingerprint.code}
    record |= {"inputs": inputs, "arguments": None, "needs": ["train[0]"], "result": "as it was", "seconds": 1.0}
    entry = {"format": 1, "run": run_id, "key": key, "call": call, "step": deploy.name, "seconds": 1.0}
    store.put(index_key(key), json.dumps({**entry, "result": record["result"]}).encode())
    return record


def commit(record: dict[str, Any]) -> Commit:
    made = parsed(record)
    assert isinstance(made, Commit)
    return made


def found(store: FolderStore, tree: Any, scores: Any = SCORES) -> Any:
    """What a new run takes from earlier ones for deploy(tree, scores)."""
    given, knows = arguments(tree, scores), known(store)
    record = knows.find(deploy, deploy.default, given, knows.key(deploy, deploy.default, given))
    return None if record is None else record.result


def journal_of_older_version(store: FolderStore, *records: dict[str, Any], run_id: str = "old") -> None:
    append(Journal.acquire(store, run_id), records)


def made(threshold: float | None, call: str = "train[0]") -> dict[str, Any]:
    record = {"type": "commit", "call": call, "step": train.name, "key": "k", "inputs": "i", "code": "c"}
    return {**record, "result": {"model": model(threshold)}, "seconds": 1.0}


def test_metadata_is_part_of_the_key(tmp_path: Path) -> None:
    knows = known(FolderStore(tmp_path))

    def key(tree: Any) -> str:
        return knows.key(deploy, deploy.default, arguments(tree))

    assert key(model(0.5)) == key(model(0.5, "elsewhere")) != key(model(0.9)) != key(model(None))


def test_a_result_of_an_older_version_is_reused_where_the_metadata_is_the_same(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    journal_of_older_version(store, made(0.5), commit_of_older_version(store, "deploy[0]", model(0.5)))
    assert found(store, model(0.5, "new")) == "as it was"
    assert found(store, model(0.9, "new")) is None and found(store, model(None, "new")) is None


def test_what_an_older_version_made_of_sealed_metadata_is_not_taken_where_there_is_none(tmp_path: Path) -> None:
    """Its key is that of today's artifact without metadata."""
    store = FolderStore(tmp_path)
    old = commit_of_older_version(store, "deploy[0]", model(0.5), scores=1)
    journal_of_older_version(store, made(0.5), old)
    assert found(store, model(0.5), scores=1) == "as it was" and found(store, model(None), scores=1) is None


def test_two_calls_of_an_older_version_that_differed_in_metadata_are_not_reused(tmp_path: Path) -> None:
    """They had one key: which of them the result is of, nobody knows."""
    store = FolderStore(tmp_path)
    second = {**commit_of_older_version(store, "deploy[1]", model(0.9)), "needs": ["train[1]"]}
    first = commit_of_older_version(store, "deploy[0]", model(0.5))
    journal_of_older_version(store, made(0.5), made(0.9, "train[1]"), first, second)
    assert found(store, model(0.5)) is None and found(store, model(0.9)) is None


def test_a_result_of_this_version_is_never_taken_for_another_class(tmp_path: Path) -> None:
    """What earlier versions took for equal, a tuple and a named tuple, is so in their records only."""
    store = FolderStore(tmp_path)
    plain, named = encode((0.5, 3)), encode(Score(0.5, 3))
    entry = commit_of_older_version(store, "deploy[0]", plain)
    assert found(store, plain) == found(store, named) == "as it was"
    knows, mine, other = known(store), {"args": [plain], "kwargs": {}}, {"args": [named], "kwargs": {}}
    key, other_key = (knows.key(deploy, deploy.default, each) for each in (mine, other))
    store.put(index_key(key), json.dumps({**entry, "format": 1, "run": "r", "identity": 2}).encode())
    assert knows.find(deploy, deploy.default, mine, key) is not None
    assert knows.find(deploy, deploy.default, other, other_key) is None
    for record, same in ((entry, True), ({**entry, "identity": 2}, False)):
        assert known(store).same_inputs(commit(record), arguments(named)) is same


def test_a_run_of_an_older_version_is_found_under_its_name(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    tree = encode({"args": [{2: "b", 1: "a"}], "kwargs": {}})
    older = f"flow-{session._earlier_hash(flow, tree)}"
    metadata = {
        "run_id": older,
        "created": 1.0,
        "workflow": flow.name,
        "recipe": tree,
        "recipe_hash": older.removeprefix("flow-"),
    }
    assert session.find_run(store, flow, tree, fresh=False) != older
    store.put(f"runs/{older}/run.json", json.dumps({**metadata, "identity": 2}).encode())
    assert session.find_run(store, flow, tree, fresh=False) != older
    store.put(f"runs/{older}/run.json", json.dumps(metadata).encode())
    assert session.find_run(store, flow, tree, fresh=False) == older
    assert session.find_run(store, flow, tree, fresh=True) == f"{older}-2"
    session.check_same_recipe(metadata, flow, tree)
    with pytest.raises(NonDeterminismError):
        session.check_same_recipe({**metadata, "identity": 2}, flow, tree)


def test_without_its_journal_an_older_result_is_not_reused(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    commit_of_older_version(store, "deploy[0]", model(0.5))
    assert found(store, model(0.5)) is None
    store.put("runs/old/journal/00000001.json", b"half of a sl")
    assert found(store, model(0.5)) is None


def test_a_commit_of_an_older_version_is_resumed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    record = commit_of_older_version(store, "deploy[0]", model(0.5))
    knows = known(store, {"deploy[0]": commit(record)})
    assert knows.committed("deploy[0]", deploy, deploy.default, arguments(model(0.5))) == commit(record)
    with pytest.raises(NonDeterminismError):
        knows.committed("deploy[0]", deploy, deploy.default, {"args": [model(0.5), 1], "kwargs": {}})
    new = {**record, "inputs": Identities().digest(arguments(model(0.5)))}
    with pytest.raises(NonDeterminismError):
        known(store, {"deploy[0]": commit(new)}).committed("deploy[0]", deploy, deploy.default, arguments(model(0.9)))


GIVEN: list[dict[str, Any]] = [
    {"args": [], "kwargs": {}},
    {"args": [1, "té", {"b": 1, "a": [model(0.5), 1.5]}], "kwargs": {"z": None, "a": {"$dict": [[2, 1], [1, 2]]}}},
    {"args": [list(range(30_000)), 1], "kwargs": {"b": list(range(30_000))}},
    {"args": list(range(40)), "kwargs": {}},
]


@pytest.mark.parametrize("given", GIVEN, ids=range(len(GIVEN)))
def test_digests_from_parts_are_those_of_the_whole(given: Any) -> None:
    together = Identities()
    for _ in range(2):
        assert together.digest(given) == Identities().digest(given) == digest(given)
        assert together.shown(given) == Identities().shown(given)
    earlier = hashlib.sha256(canonical(earlier_identity(given))).hexdigest()
    assert together.earlier_digest(given) == earlier


def test_calls_of_a_map_share_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime: Any = object()
    big, other = list(range(30_000)), {"rows": ["text"] * 10_000}
    given = {"args": [EACH, big, Future(runtime, "table[0]", None)], "kwargs": {"other": other}}
    plan = fan_out(runtime, "score.map[0]", list(range(50)), given)
    children = plan.children("score.map[0]", "score", plan.items)
    assert [child.arguments["args"][0] for child in children] == list(range(50))
    table = encode({"rows": list(range(20_000))})
    resolved = [resolve_edges(child.arguments, lambda _: table) for child in children]
    assert all(each["args"][1] is resolved[0]["args"][1] for each in resolved)
    assert all(each["args"][2] is table for each in resolved)
    assert all(each["kwargs"]["other"] is resolved[0]["kwargs"]["other"] for each in resolved)

    looked_at: list[int] = []

    def counted(tree: Any) -> Any:
        if isinstance(tree, (list, dict)):
            looked_at.append(id(tree))
        return identity(tree)

    monkeypatch.setattr(identities, "identity", counted)
    together = Identities()
    digests = {together.digest(each) for each in resolved}
    assert len(digests) == 50 and digests == {digest(each) for each in resolved}
    assert len(looked_at) == 3, "each shared argument once, and not once per call"


def test_edges_in_shared_arguments_are_needs_of_every_call() -> None:
    runtime: Any = object()
    table: Any = Future(runtime, "table[0]", None)
    needs: list[str] = []
    assert encode(table["rows"], "x", edges_of(runtime, needs)) == {"$edge": "table[0]", "field": "rows"}
    plan = fan_out(runtime, "m", [1, 2], {"args": [EACH], "kwargs": {"rows": table["rows"]}})
    assert [child.needs for child in plan.children("m", "score", plan.items)] == [("table[0]",)] * 2 and needs
