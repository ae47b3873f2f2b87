"""A new user's mistakes: each ends the real recipe at once, with one clear line that names the setting, exit code 2,
and no run in the store. Nothing here starts Ray: that is the point."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.config import TaskSettings
from infra.config import load
from infra.errors import DataError, ResourceError
from infra.machine import local_resources
from infra.storage import open_store
from models.llama import Llama
from models.presets import scratch_config
from models.tokenizers import train_bpe
from models.weights import save_hf
from workflows.cli import main
from workflows.graph import ArtifactWriter
from workflows.graph.artifacts import Artifact, ArtifactSource
from workflows.recipes.checks import check_capacity
from workflows.recipes.settings import Recipe
from workflows.recipes.text import Limits, fit_texts
from workflows.recipes.training import require_rows

FLOW = "workflows/llama3_posttrain.py"
GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
Refused = Callable[..., str]


@pytest.fixture
def refused(
    repository: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Runs the recipe with the options given; its one line of error, after seeing that it left no run behind."""
    monkeypatch.chdir(repository)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    store = home / "store"

    def run(*arguments: object, code: int = 2) -> str:
        given = [] if "--store" in arguments else ["--store", str(store)]
        began = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            main.main(["run", FLOW, *given, *map(str, arguments)])
        said = capsys.readouterr()
        assert ended.value.code == code, said.err
        assert "Traceback" not in said.err and said.err.count("recua: error: ") == 1, said.err
        assert said.err.startswith("recua: error: ") and not said.out
        assert not (store / "runs").exists() and time.monotonic() - began < 120
        return said.err.removeprefix("recua: error: ").rstrip()

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole model folder of 500 tokens or so, context 64."""
    tokenizer = train_bpe(["user assistant what is 1 + 2? the answer is 3"] * 4, 320)
    config = scratch_config(32, 1, 2, 2, tokenizer.vocab_size, 64)
    save_hf(Llama(config), config, tmp_path / "model", tokenizer)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("stf.batch_size=3", "unknown setting stf; did you mean sft?"),
        ("sft.bach_size=3", "unknown setting sft.bach_size; did you mean sft.batch_size?"),
        ("sft.batch_size=many", "sft.batch_size: Input should be a valid integer"),
        ("ppo.batch_size=0", "ppo.batch_size: Input should be greater than or equal to 1"),
        ("pretrain.tensor_parallel=3", "pretrain: workers 2 must divide by tensor_parallel 3"),
        ("pretrain.pipeline_parallel=3", "pretrain: workers 2 must divide by tensor_parallel 1 x pipeline_parallel 3"),
        ("model.preset=llama9-8b", "model.preset: unknown model preset 'llama9-8b'"),
        ("tasks.kinds={'reasoning/adition'=1.0}", "unknown kind 'reasoning/adition'; did you mean reasoning/addition?"),
        ("sft.max_length=4096", "sft.max_length = 4096 is above model.context = 256"),
        ("pools.engine.max_model_len=512", "pools.engine.max_model_len = 512 is above model.context = 256"),
        ("pools.learners.num_gpus=1000", "pools.learners.workers = 2 with pools.learners.num_gpus = 1000 each"),
        ("pools.learners.num_cpus=1000", "pools.learners.workers = 2 with pools.learners.num_cpus = 1000 each"),
        ("pretrain.workers=100000", "pretrain.workers = 100000 with pretrain.num_cpus = 0.5 each can never start"),
        ("serving.num_cpus=1000", "serving.replicas = 1 with serving.num_cpus = 1000 each can never start"),
        ("pools.engine.kv_cache_gib=100000", "pools.engine.kv_cache_gib, serving.engine.kv_cache_gib: needs"),
        ("model.init_from=/nowhere", "model.init_from: /nowhere: no such folder"),
        ("tokenizer.folder=/nowhere", "tokenizer.folder /nowhere: no such folder"),
        ("corpus.files=['/nowhere.jsonl']", "corpus.files: /nowhere.jsonl: no such file"),
    ],
)
def test_a_setting_that_cannot_work(refused: Refused, setting: str, named: str) -> None:
    assert named in refused("--set", setting)


@pytest.mark.parametrize(
    ("setting", "file", "content", "named"),
    [
        ("problems.instruction_files", "a.jsonl", GOOD + '{"mess\n', "a.jsonl:2: not valid JSON"),
        ("problems.instruction_files", "a.jsonl", GOOD + '{"prompt": "x"}\n', 'a.jsonl:2: "messages" is missing'),
        ("problems.instruction_files", "a.jsonl", "", "a.jsonl: no rows"),
        ("problems.instruction_files", "a.csv", "x", "a.csv: expected a .jsonl or .parquet file"),
        ("corpus.files", "a.parquet", "no parquet", "a.parquet:1: not readable as parquet"),
        ("corpus.files", "a.parquet", [{"txt": "x"}], 'a.parquet:1: "text" is missing (found: txt)'),
    ],
)
def test_a_data_file_that_cannot_work(
    refused: Refused, tmp_path: Path, setting: str, file: str, content: Any, named: str
) -> None:
    if isinstance(content, str):
        (tmp_path / file).write_text(content)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / file)
    error = refused("--set", f"{setting}=['{tmp_path / file}']")
    assert error.startswith(f"{setting}: {tmp_path}/") and named in error


@pytest.mark.parametrize(("text", "named"), [("[sft\n", "not valid TOML"), ("[sft]\nepoch = 1\n", "sft.epochs")])
def test_a_recipe_file_that_cannot_work(refused: Refused, tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    error = refused("--recipe", tmp_path / "mine.toml")
    assert f"{tmp_path}/mine.toml" in error and named in error
    assert "no such file" in refused("--recipe", tmp_path / "other.toml")


def change_config(folder: Path, **changes: Any) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, **changes}))


def change_tensors(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors if tensor is None else {**tensors, name: tensor}, folder / "model.safetensors")


def change_specials(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|start_header_id|>", "<|im_start|>"))


NORM = "model.layers.0.input_layernorm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (lambda folder: change_tensors(folder, NORM, None), f"missing: {NORM}"),
    "wrong shape": (lambda folder: change_tensors(folder, NORM, torch.ones(7)), f"{NORM} is [7]"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights in"),
    "cut short": (lambda folder: os.truncate(folder / "model.safetensors", 1000), "cannot be read (cut short?)"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer in"),
    "other chat format": (change_specials, "no chat format fits"),
    "small context": (lambda folder: None, "is above the context of"),
    "other network": (lambda folder: change_config(folder, attention_bias=True), "attention_bias"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_cannot_work(refused: Refused, model: Path, damage: str) -> None:
    harm, named = DAMAGES[damage]
    harm(model)
    error = refused("--set", f"model.init_from={model}")
    assert str(model) in error and named in error
    assert error.startswith("sft.max_length = " if damage == "small context" else "model.init_from: ")


def test_a_tokenizer_that_cannot_work(refused: Refused, model: Path) -> None:
    assert "the tokenizer 128257" in refused("--set", "model.preset=llama3-8b", "--set", "tokenizer.vocab_size=128257")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    error = refused("--set", f"tokenizer.folder={model}")
    assert error.startswith(f"tokenizer.folder: {model / 'chat_template.jinja'}: its chat template is not the llama3")
    change_specials(model)
    assert "no chat format fits" in refused("--set", f"tokenizer.folder={model}")


@pytest.mark.parametrize("setting", ["serving.grpc_port", "serving.http_port"])
def test_a_port_in_use(refused: Refused, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused("--set", f"{setting}={port}").startswith(f"{setting}: cannot listen on 127.0.0.1:{port}: ")
    assert "one port each" in refused("--set", "serving.grpc_port=50061", "--set", "serving.http_port=50061")


def test_a_store_that_cannot_work(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot use" in refused("--store", tmp_path / "file" / "store", code=1)
    assert "unknown scheme ftp://" in refused("--store", "ftp://host/x")
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert refused("--store", "s3://bucket/x", code=1).startswith("--store s3://bucket/x: unreachable")


@pytest.mark.parametrize("command", ["show", "logs", "resume", "cancel", "report", "serve"])
def test_an_unknown_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main([command, "nope", "--store", str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"recua: error: no run 'nope' in {tmp_path}; known: none\n"


def test_a_script_ends_as_the_command_does(repository: Path, home: Path) -> None:
    command = [sys.executable, FLOW, "--store", str(home), "--set", "sft.bach=3"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean sft.batch_size?" in done.stderr


def test_capacity_is_counted_per_node_and_together(repository: Path) -> None:
    def tiny(*overrides: str) -> Recipe:
        return load(repository / "recipes/tiny.toml", Recipe, overrides)

    check_capacity(tiny(), [{"CPU": 2.0}])
    wide = tiny("pools.learners.workers=3", "pools.learners.num_cpus=2", "pretrain.num_cpus=1")
    check_capacity(wide, [{"CPU": 4.0}, {"CPU": 4.0}])
    with pytest.raises(ResourceError, match=r"pools.learners.workers = 3 .* 6 CPU, at most 3 on one node"):
        check_capacity(wide, [{"CPU": 3.0}, {"CPU": 3.0}])
    with pytest.raises(ResourceError, match=r"run at the same time need 7 CPU \(pools.learners.workers x"):
        check_capacity(wide, [{"CPU": 6.0}])
    with pytest.raises(ResourceError, match="this cluster has 0 GPU"):
        check_capacity(tiny("pools.generators.num_gpus=1"), [{"CPU": 64.0}])


def test_this_machine_is_never_counted_too_small(tmp_path: Path) -> None:
    assert local_resources()["CPU"] == os.cpu_count()
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / "dev" / name).touch()
    assert local_resources(tmp_path)["GPU"] == 2
    (tmp_path / "dev" / "kfd").touch()
    assert local_resources(tmp_path)["GPU"] == float("inf")


@pytest.fixture
def artifact(tmp_path: Path) -> Iterator[Callable[..., Artifact]]:
    """Makes an artifact of a folder, or of rows in a JSONL file."""
    store = open_store(tmp_path / "store")
    source = ArtifactSource(store.url, str(tmp_path / "cache"))

    def make(name: str, content: Path | list[dict[str, Any]], file: str = "problems.jsonl") -> Artifact:
        out = ArtifactWriter(store, source, f"runs/r/attempts/{os.urandom(4).hex()}/{name}", tmp_path, lambda: None)
        if isinstance(content, Path):
            shutil.copytree(content, out.path, dirs_exist_ok=True)
        else:
            (out.path / file).write_text("".join(json.dumps(row) + "\n" for row in content))
        return out.seal()

    yield make


def test_texts_that_do_not_fit_end_the_run_before_training(artifact: Callable[..., Artifact], model: Path) -> None:
    from data.tasks import make_problems, to_instruction_row

    problems = make_problems(None, 20, 0, "train", TaskSettings())
    base = artifact("tokenizer", model)
    asked = artifact("prompts", [problem.to_row() for problem in problems])
    rows = [to_instruction_row(problem) for problem in problems]
    taught = artifact("instructions", rows, "messages.jsonl")
    assert fit_texts.fn(base, taught, asked, asked, Limits(example=200, prompt=200)) is base
    with pytest.raises(
        DataError, match=r"instruction example \d+ \(.*/.*\) has \d+ tokens, 20 fit: raise sft.max_length"
    ):
        fit_texts.fn(base, taught, asked, asked, Limits(example=20, prompt=200))
    with pytest.raises(DataError, match=r"a prompt \(.*/.*\) has \d+ tokens, 10 fit: raise pools.engine.max_model_len"):
        fit_texts.fn(base, taught, asked, asked, Limits(example=200, prompt=10))
    mute = artifact(
        "instructions", [{"messages": [{"role": "user", "content": "a"}], "task_type": "x/y"}], "messages.jsonl"
    )
    with pytest.raises(DataError, match=r"instruction example 1 \(x/y\) does not fit the chat format"):
        fit_texts.fn(base, mute, asked, asked, Limits(example=200, prompt=200))


def test_text_that_fills_no_row_ends_the_run_before_ranks_start() -> None:
    require_rows("anneal", 999, 1000, None)
    require_rows("anneal", 63, 1000, 64)
    with pytest.raises(DataError, match=r"anneal: its text has 64 tokens, .* sequence_length = 64 .*corpus\.files"):
        require_rows("anneal", 64, 64, 1000)
    with pytest.raises(DataError, match=r"anneal: the held-out text has 64 tokens, .* raise corpus\.held_out_share"):
        require_rows("anneal", 64, 1000, 64)


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "no-such-host.invalid:6379"])
def test_bad_addresses_of_ray_are_named_before_a_run_is_made(
    address: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself goes on trying for more than ten minutes."""
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        address = address.format(port=closed.getsockname()[1])
        why = f"--address (or RAY_ADDRESS): no Ray cluster at {address}: nothing answers there"
        assert refused("--recipe", "recipes/tiny.toml", "--address", address) == why
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert refused("--recipe", "recipes/tiny.toml") == why
