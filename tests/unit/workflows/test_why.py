"""`recua show RUN --why STEP`: what changed, by name, in plain sentences."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.storage import FolderStore
from tests.helpers.stored_records import append
from workflows.cli import main
from workflows.driver.reuse import ReuseLookup
from workflows.graph import Step, StepOptions
from workflows.graph.inputs import Identities
from workflows.identity.keys import index_key
from workflows.identity.names import load_name
from workflows.runs.catalog import find_steps, load_run
from workflows.runs.journal import Journal
from workflows.runs.why import Reasons, Why

FILES = {
    "whyflow/__init__.py": "",
    "whyflow/steps.py": """
from whyflow import helper
from workflows.graph import step

@step
def train(corpus, lr):
    return helper.scale(lr)

@step(reuse=False)
def deploy(model):
    return model
""",
    "whyflow/helper.py": "def scale(x):\n    return x\n",
}
CORPUS = {"digest": "a" * 64, "name": "corpus", "location": "runs/r1/attempts/x/corpus", "meta": {}}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "whyflow"]:
        del sys.modules[name]


class Bench:
    """Commits calls as an executor would, without running them."""

    def __init__(self, folder: Path) -> None:
        self.store = FolderStore(folder / "store")
        self._clock = time.time() - 4 * 3600
        self.store.put(f"{CORPUS['location']}/manifest.json", b"{}")

    def run(self, run_id: str, calls: list[dict[str, Any]], **metadata: Any) -> None:
        tree = {"workflow": "whyflow.steps:w", "recipe": {"args": []}, "created": self._clock, "reuse": True}
        self.store.put(f"runs/{run_id}/run.json", json.dumps({**tree, "rerun": [], **metadata}).encode())
        journal = Journal.acquire(self.store, run_id)
        for call in calls:
            append(journal, [self._commit(run_id, **call)])
        append(journal, [{"type": "end", "status": "finished", "time": self._clock, "result": None}])

    def _commit(self, run_id: str, call: str, args: Any, result: Any = 1, **more: Any) -> dict[str, Any]:
        known = ReuseLookup(self.store, {}, True, (), lambda call, text: None)
        step = load_name(f"whyflow.steps:{call.partition('[')[0]}")
        assert isinstance(step, Step)
        arguments = {"args": args, "kwargs": {}}
        key, code = known.key(step, StepOptions(), arguments), known.fingerprint(step, StepOptions()).code
        self._clock += 10
        record = {"type": "commit", "call": call, "step": step.name, "key": key, "code": code, "result": result}
        record |= {"libraries": known.libraries_of(code), "inputs": Identities().digest(arguments), "seconds": 1.0}
        record |= {"arguments": Identities().shown(arguments), "started": self._clock - 1, "ended": self._clock}
        entry = {"format": 1, "run": run_id, "key": key, "result": result}
        self.store.put(index_key(key), json.dumps(entry).encode())
        return {**record, "node": "", "attempt": 1, "attempt_id": call, **more}

    def why(self, run_id: str, call: str, load: Any = load_name) -> Why:
        return Reasons(self.store, run_id, load).of(find_steps(load_run(self.store, run_id), call)[0])


@pytest.fixture
def bench(project: Path) -> Bench:
    return Bench(project)


def train(args: Any = 1, **more: Any) -> dict[str, Any]:
    return {"call": "train[0]", "args": [{"$artifact": CORPUS}, args], **more}


def test_the_first_of_its_kind(bench: Bench) -> None:
    bench.run("r1", [train()])
    why = bench.why("r1", "train")
    assert why.happened == "train[0] ran because no earlier run in this store had committed whyflow.steps:train"
    assert why.again is False and "its result is in the store" in why.because[0]


def test_a_changed_function_is_named(bench: Bench, project: Path) -> None:
    bench.run("r1", [train()])
    (project / "whyflow/helper.py").write_text("def scale(x):\n    return 2 * x\n")
    assert bench.why("r1", "train").sentences()[1] == (
        "would run again in a new run: yes, because whyflow.helper:scale changed since it was committed"
    )
    bench.run("r2", [train()])
    assert bench.why("r2", "train").happened == (
        "train[0] ran because whyflow.helper:scale changed since run r1, 4 h ago; its inputs and libraries are equal"
    )


def test_a_changed_data_file_is_named_and_what_the_step_writes_is_none(bench: Bench, project: Path) -> None:
    (project / "whyflow/words.txt").write_text("one")
    body = "def scale(x):\n    open('seen.log', 'a').write('x')\n    return open('words.txt').read()\n"
    (project / "whyflow/helper.py").write_text(body)
    bench.run("r1", [train()])
    (project / "whyflow/seen.log").write_text("x")
    assert bench.why("r1", "train").sentences()[1:] == [
        "would run again in a new run: no: inputs, code and libraries are unchanged, and its result is in the store",
        "data files that its code names, which count: whyflow/words.txt",
        "files that its code writes, which do not count: whyflow/seen.log",
    ]
    (project / "whyflow/words.txt").write_text("two")
    assert bench.why("r1", "train").because == ["data file whyflow/words.txt changed since it was committed"]
    bench.run("r2", [train()])
    happened = "train[0] ran because data file whyflow/words.txt changed since run r1"
    assert bench.why("r2", "train").happened.startswith(happened)


def test_a_changed_input_is_named_leaf_by_leaf_with_who_made_it(bench: Bench) -> None:
    bench.run("r1", [train({"lr": 1, "steps": 5})])
    bench.run("r2", [train({"lr": 2, "steps": 5})])
    assert "because input lr.lr 1, now 2 since run r1" in bench.why("r2", "train").happened
    other = {**CORPUS, "digest": "b" * 64}
    maker = {"call": "deploy[0]", "args": [1], "result": {"$artifact": other}}
    changed = {"call": "train[0]", "args": [{"$artifact": other}, {"lr": 2, "steps": 5}], "needs": ["deploy[0]"]}
    bench.run("r3", [maker, changed])
    why = bench.why("r3", "train")
    assert why.differs is not None and why.differs.inputs == [
        f"input corpus artifact {'a' * 12}, now artifact {'b' * 12} (made by deploy[0])"
    ]
    assert why.again is None and why.because == ["because deploy[0] would run again: only if its result differs"]


def test_a_changed_library_is_named(bench: Bench) -> None:
    old = {"python": "3.10"}
    bench.store.put("code/libraries-old.json", json.dumps(old).encode())
    bench.run("r1", [train(libraries="libraries-old", key="other")])
    bench.run("r2", [train()])
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"library python went from 3.10 to {version}" in bench.why("r2", "train").happened
    assert bench.why("r1", "train").again is True


def test_reused_rerun_new_and_never_reused(bench: Bench) -> None:
    bench.run("r1", [train(), {"call": "deploy[0]", "args": [1]}])
    bench.run("r2", [train(reused_from="r1")])
    bench.run("r3", [train()], rerun=["train"])
    bench.run("r4", [train()], reuse=False)
    bench.run("r5", [{"call": "deploy[0]", "args": [1]}])
    assert bench.why("r2", "train").happened.startswith("train[0] was reused from run r1: its inputs, its code and")
    assert "--rerun train" in bench.why("r3", "train").happened
    assert "(--new)" in bench.why("r4", "train").happened
    assert "never reused (reuse=False)" in bench.why("r5", "deploy").happened
    assert bench.why("r5", "deploy").again is True


def test_a_result_whose_artifact_is_gone_runs_again(bench: Bench) -> None:
    bench.run("r1", [train(result={"$artifact": CORPUS})])
    assert bench.why("r1", "train").again is False
    bench.store.delete(f"{CORPUS['location']}/manifest.json")
    assert bench.why("r1", "train").because == [f"artifact corpus {'a' * 12} of its result is gone"]


def test_without_the_code_the_store_still_answers(bench: Bench, project: Path) -> None:
    bench.run("r1", [train()])
    (project / "whyflow/helper.py").write_text("def scale(x):\n    return 2 * x\n")
    bench.run("r2", [train(3)])

    def load(name: str) -> Any:
        raise ImportError(f"No module named {name.partition(':')[0]!r}")

    why = bench.why("r2", "train", load)
    assert "whyflow.helper:scale changed; input args[1] 1, now 3 since run r1" in why.happened
    assert why.again is None and "cannot be imported here (No module named 'whyflow.steps')" in why.because[0]


def test_a_call_without_a_result_says_so(bench: Bench) -> None:
    bench.run("r1", [])
    journal = Journal.acquire(bench.store, "r1")
    start = {"type": "start", "call": "train[0]", "step": "whyflow.steps:train", "attempt": 1, "attempt_id": "x"}
    failed = {**start, "type": "attempt-failed", "final": True, "time": 2.0}
    error = {"type": "ValueError", "message": "no\nmore"}
    append(journal, [{**start, "time": 1.0}, {**failed, "error": error}])
    assert bench.why("r1", "train").happened == "train[0] failed: it has no result yet (ValueError: no)"


def test_the_command_prints_sentences_and_json(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.run("r1", [train()])

    def call(*more: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main.main(["show", "r1", "--why", "train", "--store", bench.store.url, *more])
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert call().splitlines()[0].startswith("train[0] ran because no earlier run")
    [answer] = json.loads(call("--json"))
    assert answer["call_id"] == "train[0]" and answer["again"] is False
