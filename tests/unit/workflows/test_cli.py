"""The command line without Ray: what it imports, how it refuses, how it finds workflow files."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workflows.cli import main
from workflows.cli.options import local_folder
from workflows.driver.session import plain_name
from workflows.identity.names import canonical_name, load_name, module_of_file

FLOW = '''
from infra.config import Settings
from infra.machine import require_memory, require_port
from workflows.cli import run_script
from workflows.graph import step, workflow


class Inner(Settings):
    beta: float = 0.1
    """Beta."""
    port: int = 0
    """Port."""
    cache: int = 0
    """Bytes."""


class Toy(Settings):
    seed: int = 0
    """Seed."""
    dpo: Inner = Inner()
    """DPO."""


RECIPE = Toy


def preflight(recipe: Toy) -> None:
    require_port(recipe.dpo.port, "dpo.port")
    require_memory(recipe.dpo.cache, "dpo.cache")


@step
def first(seed: int) -> int:
    return seed


@workflow
def toy(recipe: Toy) -> int:
    return first(recipe.seed).result()


if __name__ == "__main__":
    run_script(__file__)
'''


@pytest.fixture
def flow(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A workflow file under a name of its own, in a folder of its own, which is the working folder too."""
    file = tmp_path / f"flow_{tmp_path.name.replace('-', '_')}.py"
    file.write_text(FLOW)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RECUA_STORE", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield file
    sys.modules.pop(file.stem, None)


Recua = Callable[..., tuple[int, str, str]]


@pytest.fixture
def recua(capsys: pytest.CaptureFixture[str]) -> Recua:
    """Runs a command in this process; (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return call


def _loaded(statement: str, repository: Path) -> set[str]:
    """Top-level modules that a fresh Python has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_help_teaches_and_imports_next_to_nothing(repository: Path) -> None:
    statement = (
        "from workflows.cli.main import main\ntry: main(['--help'])\nexcept SystemExit as end: assert end.code == 0"
    )
    loaded = _loaded(statement, repository)
    heavy = {"torch", "ray", "vllm", "transformers", "pydantic", "rich", "plotly", "boto3", "grpc", "numpy", "asyncio"}
    assert not loaded & heavy
    assert {"click", "recua"} & loaded >= {"click"}


def test_infra_and_config_modules_import_neither_torch_nor_ray_nor_vllm(repository: Path) -> None:
    files = [
        *repository.glob("infra/*.py"),
        *repository.glob("*/config.py"),
        *repository.glob("*/*/config.py"),
        *repository.glob("workflows/*/settings.py"),
    ]
    names = [".".join(file.relative_to(repository).with_suffix("").parts) for file in files if file.exists()]
    assert {"infra.telemetry", "workflows.driver.settings"} <= set(names)
    check = "\n".join(
        f"import {name}\nassert not sys.modules.keys() & {{'torch', 'ray', 'vllm'}}, '{name}'" for name in sorted(names)
    )
    _loaded(check, repository)


def test_commands_and_examples(recua: Recua) -> None:
    code, out, _ = recua("--help")
    assert code == 0
    for command in ("run", "runs", "show", "resume", "cancel", "logs", "report", "serve", "chat"):
        assert f"\n  {command} " in out
    assert "recua run workflows/llama3_posttrain.py --recipe recipes/tiny.toml" in out
    code, out, _ = recua("run", "--help")
    assert code == 0 and "--set seed=2" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "sed=1"], "--set: unknown setting sed; did you mean seed?"),
        (["--set", "dpo.beat=1"], "--set: unknown setting dpo.beat; did you mean dpo.beta?"),
        (["--set", "seed=many"], '--set: seed: Input should be a valid integer'),
        (["--set", "seed"], "--set 'seed': write it as section.key=value"),
        (["--set", "seed=1", "--set", "seed.x=1"], "--set 'seed.x=1': seed is a value, not a section"),
        (["--recipe", "nowhere.toml"], "recipe nowhere.toml: no such file"),
        (["--recipe", "."], "recipe .: Is a directory"),
        (["--recipe", "broken.toml"], "recipe broken.toml: not valid TOML"),
        (["--recipe", "wrong.toml"], "wrong.toml: unknown setting dpo.betta; did you mean dpo.beta?"),
        (["--store", "ftp://host/x"], "--store ftp://host/x: unknown scheme ftp://"),
        (["--reports", "s3://bucket/x"], "--reports s3://bucket/x: name a path on this machine"),
        (["--reports", "s3:/bucket/x"], "--reports s3:/bucket/x: this would create a folder of that name"),
        (["--store", ""], "--store is empty: name a folder or s3://bucket/prefix"),
        (["--store", "s3:/bucket/runs"], "--store s3:/bucket/runs: this would create a folder of that name; write it as s3://"),
        (["--run", "a/b"], "run id 'a/b': use letters"),
        (["--run", ""], "run id '': use letters"),
        (["--set", "dpo.port=70000"], "dpo.port: 70000 is not a port"),
        (["--set", f"dpo.cache={2**62}"], "dpo.cache: needs 4194304.0 TiB of memory, this machine has"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    flow: Path, recua: Recua, arguments: list[str], message: str
) -> None:
    Path("broken.toml").write_text("seed = = 1")
    Path("wrong.toml").write_text("[dpo]\nbetta = 1")
    before = sorted(Path().rglob("*"))
    code, out, err = recua("run", flow, *arguments)
    assert code == 2 and not out
    assert err.startswith(f"recua: error: {message}") and err.count("\n") == 1
    assert "Traceback" not in err
    left = {path for path in Path().rglob("*") if path not in before and path.is_file() and path.suffix != ".pyc"}
    assert not left


def test_several_problems_are_a_line_each(flow: Path, recua: Recua) -> None:
    code, _, err = recua("run", flow, "--set", "sed=1", "--set", "dpo.beta=x")
    assert code == 2 and len(err.splitlines()) == 2


def test_an_unreachable_store_is_refused(flow: Path, recua: Recua, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    code, _, err = recua("run", flow, "--store", tmp_path / "file" / "store")
    assert code != 0 and f"--store {tmp_path}/file/store: cannot use" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "option", ["--grace=nan", "--grace=-1", "--keep-days=inf", "--keep-days=nan", "--keep-runs=-1"]
)
def test_numbers_of_options_are_in_their_range(recua: Recua, home: Path, option: str) -> None:
    code, out, err = recua("gc", option)
    assert code == 2 and not out and option.partition("=")[0] in err


def test_unknown_command_option_and_missing_argument(recua: Recua) -> None:
    assert recua("rum")[0] == 2
    assert recua("run")[0] == 2
    assert recua("runs", "--nope")[0] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such Python file"),
        ("x = 1\n", "expected one @workflow function, found none"),
        ("import nothing_like_this\n", "No module named 'nothing_like_this'"),
        (
            "from workflows.graph import workflow\n@workflow\ndef a(): ...\n@workflow\ndef b(): ...\n",
            "expected one @workflow function, found a, b; name one: ",
        ),
        ("from workflows import stepp\n", "cannot import name 'stepp' from 'workflows'"),
        ("def f(:\n", ".py:1: invalid syntax"),
        ("x = 1\nint('a b')\n", ".py:2: ValueError: invalid literal for int() with base 10: 'a b'\n"),
        ("import json\njson.loads('{')\n", ".py:2: JSONDecodeError: "),
        ("import sys\nsys.exit(0)\n", ".py:2: it calls sys.exit(0) on import: put that under "),
        ("exit('bye')\n", ".py:1: it calls sys.exit('bye') on import"),
        ("x = 1\0\n", ".py:1: source code string cannot contain null bytes"),
        (
            "from workflows.llama3_pretrain import llama3_pretrain\n",
            "found none; it imports llama3_pretrain of workflows",
        ),
        (
            "from workflows import workflow\nRECIPE = 3\n@workflow\ndef a(): ...\n",
            "RECIPE must be a class derived from",
        ),
        (
            "from workflows import Settings, workflow\nRECIPE = Settings\n@workflow\ndef a(): ...\n",
            "RECIPE is set, so a must take only the recipe: too many positional arguments",
        ),
        (
            "from workflows import run_script\nrun_script(__file__)\n",
            'write `if __name__ == "__main__":` above run_script',
        ),
    ],
)
def test_files_that_are_no_workflow(flow: Path, recua: Recua, content: str | None, message: str) -> None:
    other = flow.with_name("other_" + flow.name)
    if content is not None:
        other.write_text(content)
    code, _, err = recua("run", other)
    sys.modules.pop(other.stem, None)
    assert code == 2 and err.startswith(f"recua: error: workflow {other}: ") and message in err


def test_a_file_of_another_copy_is_refused(flow: Path, recua: Recua, tmp_path: Path) -> None:
    package = tmp_path / "clone" / "workflows"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "graph.py").write_text(FLOW)
    code, _, err = recua("run", package / "graph.py")
    assert code == 2 and "is already loaded from" in err


def test_a_script_of_another_copy_is_refused_or_runs_with_its_own_package(flow: Path, tmp_path: Path) -> None:
    package = tmp_path / "clone" / "workflows"
    shutil.copytree(Path(main.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    script = package / "toy_flow.py"
    script.write_text(FLOW)
    mixed = subprocess.run([sys.executable, script, "--plan"], capture_output=True, text=True)
    assert mixed.returncode == 2 and "recua: error: " in mixed.stderr and "package workflows came from" in mixed.stderr
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "clone")}  # as in a Ray job with --working-dir
    own = subprocess.run([sys.executable, script, "--set", "sed=1"], capture_output=True, text=True, env=environment)
    assert own.returncode == 2 and own.stderr == "recua: error: --set: unknown setting sed; did you mean seed?\n"


def test_plan_runs_nothing(flow: Path, recua: Recua) -> None:
    code, out, err = recua("run", flow, "--plan")
    assert code == 0, err
    assert "first[0]" in out and "would run" in out and "depend on the result of first[0]" in out
    assert recua("runs") == (0, "no runs yet; start one with `recua run WORKFLOW_FILE --recipe FILE`\n", "")


def test_keyword_workflows_take_the_top_level_keys(flow: Path, recua: Recua) -> None:
    flow.write_text(
        "from workflows.graph import step, workflow\n@step\ndef first(n: int) -> int: return n\n"
        "@workflow\ndef toy(count: int, width: int = 2) -> int: return first(count * width).result()\n"
    )
    assert recua("run", flow, "--plan", "--set", "count=3")[0] == 0
    code, _, err = recua("run", flow, "--plan", "--set", "cuont=3")
    assert code == 2 and "unknown setting cuont; did you mean count?" in err
    code, _, err = recua("run", flow, "--plan")
    assert code == 2 and "count is missing: give --recipe FILE or --set count=VALUE" in err


TWO = """
import sys
from workflows import run_script, step, workflow
import helper
@step
def one(x: int) -> int:
    return helper.two() + x
@workflow
def inner(x: int = 1):
    return one(x)
@workflow
def outer(x: int = 1):
    return inner(x)
@workflow
def entraîner():
    return one(1)
@workflow
def _nightly():
    return one(1)
again = inner
if __name__ == "__main__":
    run_script(f"{__file__}:outer")
"""


def test_a_workflow_of_several_is_named(flow: Path, recua: Recua) -> None:
    flow.write_text(TWO.replace("import helper\n", ""))
    code, out, err = recua("run", f"{flow}:outer", "--plan", "--set", "x=3")
    assert code == 0 and out.startswith("run outer-") and "inner[0]/one[0]" in out, err
    assert recua("run", f"{flow}:inner", "--plan")[1].startswith("run inner-")
    code, _, err = recua("run", f"{flow}:nope", "--plan")
    assert code == 2 and err == (
        f"recua: error: workflow {flow}:nope: the file defines no @workflow function of that name; it has inner, outer,"
        " entraîner, _nightly\n"
    )
    code, _, err = recua("run", flow, "--plan")
    assert code == 2 and err.endswith(f"found inner, outer, entraîner, _nightly; name one: {flow}:inner\n")
    code, _, err = recua("run", f"{flow}x:outer", "--plan")
    assert code == 2 and err == f"recua: error: workflow {flow}x: no such Python file\n"


def test_every_function_name_gives_a_run_id(flow: Path, recua: Recua) -> None:
    flow.write_text(TWO.replace("import helper\n", ""))
    for name, start in (("entraîner", "run entrainer-"), ("_nightly", "run nightly-")):
        code, out, err = recua("run", f"{flow}:{name}", "--plan")
        run_id = out.split()[1]
        assert code == 0 and out.startswith(start) and recua("run", f"{flow}:{name}", "--plan", "--run", run_id)[0] == 0
    code, _, err = recua("run", f"{flow}:inner", "--plan", "--run", "a/b")
    assert code == 2 and err.startswith("recua: error: run id 'a/b': use letters")
    assert [plain_name(name) for name in ("a_B9", "__x_", "训练", "x" * 200)] == ["a_B9", "x_", "workflow", "x" * 100]


SCRIPTS = ["llama3.1_sft.py", "my script-2.py", "3d.py", "训练.py", "50%:a.py", "__main__.py", "random.py", "queue.py"]
SCRIPTS += ["test.py", "torch.py", "workflows.py", "data.py", "beside.py", "caf\udce9.py", "two\nlines.py"]


@pytest.fixture
def place(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of scripts, and the paths and modules of this process put back afterwards."""
    loaded = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper.py").write_text("def two() -> int:\n    return 2\n")
    yield tmp_path
    for name in set(sys.modules) - loaded:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_may_have_any_name(place: Path, recua: Recua, name: str) -> None:
    (place / "beside").mkdir()
    (place / "beside" / "__init__.py").touch()
    (place / name).write_text(TWO)
    code, out, err = recua("run", f"{name}:outer", "--plan")
    assert code == 0 and "inner[0]/one[0]" in out, err
    module, root = module_of_file(place / name)
    loaded = load_name(f"{module}:one")
    assert root == place and loaded.fn(1) == 3 and Path(loaded.fn.__code__.co_filename) == place / name
    assert canonical_name(loaded.fn) == f"{module}:one" and module.count(":") == 0
    plain = name in ("my script-2.py", "3d.py", "训练.py")
    quoted = name.replace("%", "%25").replace(":", "%3A").replace(".", "%2E").replace("\udce9", "%E9")
    assert module == (name.removesuffix(".py") if plain else quoted.replace("\n", "%0A"))
    import queue
    import random

    assert hasattr(random, "randrange") and hasattr(queue, "Queue"), "Python's own are found as before"


def test_a_script_by_the_name_of_a_module_of_pythons_starts(place: Path) -> None:
    (place / "random.py").write_text(TWO)
    done = subprocess.run([sys.executable, place / "random.py", "--plan"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and "inner[0]/one[0]" in done.stdout, done.stderr


def test_names_in_packages(tmp_path: Path) -> None:
    for folder in ("pkg", "pkg/my-part", "v1.2", "v1.2/part"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    assert module_of_file(tmp_path / "pkg/my-part/random.py") == ("pkg.my-part.random", tmp_path)
    assert module_of_file(tmp_path / "pkg/__init__.py") == ("pkg", tmp_path)
    assert module_of_file(tmp_path / "pkg/llama3.1.py") == ("pkg.llama3%2E1%2Epy", tmp_path)
    assert module_of_file(tmp_path / "v1.2/part/x.py") == ("part.x", tmp_path / "v1.2")


@pytest.mark.parametrize("package", ["workflows", "infra", "data", "models", "test"])
def test_a_package_with_a_taken_name_is_refused(place: Path, recua: Recua, package: str) -> None:
    (place / package).mkdir()
    (place / package / "__init__.py").touch()
    (place / package / "train.py").write_text(TWO)
    code, _, err = recua("run", f"{package}/train.py:outer", "--plan")
    what = "has the name of a Python module" if package == "test" else f"has the name of recua's own package {package}"
    assert code == 2 and f"{place / package} {what}: rename it" in err and err.count("\n") == 1


def test_folders_beside_a_script_that_have_names_of_ours(place: Path) -> None:
    def plan(file: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "workflows.cli", "run", f"{place / file}:outer", "--plan"]
        return subprocess.run(command, capture_output=True, text=True, cwd="/")

    (place / "own.py").write_text(TWO)
    (place / "ours.py").write_text(
        TWO.replace("import helper", "import helper, workflows.recipes.settings, data.config")
    )
    (place / "theirs.py").write_text(TWO.replace("import helper", "import helper, models.net, workflows.mine"))
    (place / "data").mkdir()
    (place / "data" / "rows.jsonl").touch()
    started = subprocess.run([sys.executable, place / "ours.py", "--plan"], capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    (place / "workflows").mkdir()
    for file in ("own.py", "ours.py"):
        assert plan(file).returncode == 0, "a folder of data hides nothing"
    (place / "models").mkdir()
    (place / "models" / "net.py").touch()
    assert plan("own.py").returncode == 0, "whoever uses none of recua's steps may have such code"
    for file, package in (("ours.py", "models"), ("theirs.py", "workflows")):
        (place / "workflows" / "mine.py").write_text("x = 1\n") if package == "workflows" else None
        refused = plan(file)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert f"{place / package} has the name of recua's own package {package}: rename it" in refused.stderr


def test_the_public_surface(repository: Path) -> None:
    import workflows

    assert workflows.__all__ == sorted(workflows.__all__) and set(dir(workflows)) >= set(workflows.__all__)
    for name in workflows.__all__:
        thing = getattr(workflows, name)
        assert callable(thing) and thing.__doc__, name
        assert f"{thing.__module__}.{thing.__qualname__}".startswith(("workflows.", "infra.")), name
    [typed] = [each for each in ast.parse(Path(workflows.__file__).read_text()).body if isinstance(each, ast.If)]
    imports = [each for each in typed.body if isinstance(each, ast.ImportFrom)]
    homes = {each.module: tuple(alias.name for alias in each.names) for each in imports}
    assert homes == workflows._HOMES and sorted(each for names in homes.values() for each in names) == workflows.__all__
    with pytest.raises(AttributeError, match="no attribute 'stepp'"):
        workflows.stepp  # noqa: B018
    assert not _loaded("import workflows", repository) & {"pydantic", "click", "ray", "torch"}
    light = "import workflows.graph.context\nfrom workflows import *\nassert callable(context) and callable(step)"
    assert not _loaded(light, repository) & {"ray", "torch", "vllm", "numpy"}


def test_the_readmes_example_runs(place: Path, repository: Path, recua: Recua) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.S)
    (place / "scores.py").write_text(blocks[0])
    code, out, err = recua("run", "scores.py", "--plan", "--set", "count=20")
    assert code == 0 and "draw[0]" in out and "mean[0]" in out, err
    for block in blocks:
        for line in block.splitlines():
            if line.startswith("from workflows import "):
                exec(line)


@pytest.mark.parametrize("command", [["show"], ["logs"], ["report"], ["resume"], ["cancel"], ["serve"]])
def test_no_such_run(flow: Path, recua: Recua, command: list[str]) -> None:
    code, _, err = recua(*command, "toy-123")
    assert code == 2 and err == f"recua: error: no run 'toy-123' in {Path.home()}/.recua/store; known: none\n"


def test_a_script_is_the_same_command(flow: Path, home: Path) -> None:
    def script(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, flow, *arguments], capture_output=True, text=True, cwd="/")

    helped = script("--help")
    assert helped.returncode == 0 and "--rerun STEP" in helped.stdout
    assert helped.stdout.startswith(f"Usage: {flow.name} [OPTIONS]\n")
    refused = script("--set", "sed=1")
    assert refused.returncode == 2
    assert refused.stderr == "recua: error: --set: unknown setting sed; did you mean seed?\n"
    planned = script("--plan")
    named = subprocess.run(
        [sys.executable, "-m", "workflows.cli", "run", flow, "--plan"], capture_output=True, text=True
    )
    assert planned.returncode == named.returncode == 0, planned.stderr + named.stderr
    assert planned.stdout.splitlines()[:-1] == named.stdout.splitlines()[:-1]  # the last one has the free disk space
    assert len(planned.stdout.splitlines()) >= 4


def test_serve_finds_no_model_where_there_is_none(flow: Path, recua: Recua) -> None:
    code, _, err = recua("serve", "no/such/folder")
    assert code == 2 and "no/such/folder: no such folder" in err
    code, _, err = recua("serve", ".", "--set", "replicsa=2")
    assert code == 2 and "unknown setting replicsa; did you mean replicas?" in err


def test_a_folder_that_no_shell_has_expanded_is_in_the_home_folder() -> None:
    assert local_folder("~/runs", "--reports") == Path.home() / "runs"
