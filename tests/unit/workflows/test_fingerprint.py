"""Fingerprints: what changes a step's key and what does not."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from workflows.identity.fingerprint import PLATFORM, Fingerprint, Fingerprinter

FILES = {
    "proj/__init__.py": "",
    "proj/steps.py": """
import json
from proj import middle
from proj.tables import WEIGHTS
from proj.actors import Trainer as T

def body(x: int) -> int:
    from proj.local import helper
    return middle.scale(helper(x)) * WEIGHTS["a"] + T().run()

def other():
    return 1
""",
    "proj/middle.py": """
from proj import deep

def scale(x):
    return deep.base(x)

def unused():
    return 0
""",
    "proj/deep.py": """
from .deeper import LIMIT

def base(x):
    return min(x, LIMIT)
""",
    "proj/deeper.py": "LIMIT = 10\nUNUSED = 1\n",
    "proj/local.py": "def helper(x):\n    return x + 1\n",
    "proj/tables.py": "WEIGHTS = {}\nWEIGHTS['a'] = 1\n",
    "proj/actors.py": """
import numpy as np

class Trainer:
    rate = 1

    def run(self):
        return self.step()

    def step(self):
        return float(np.zeros(1)[0])
""",
    "proj/registry.py": """
from proj.kinds import KINDS

def body(kind):
    from proj import plugins  # registers
    return KINDS[kind]()
""",
    "proj/kinds.py": """
KINDS = {}

def register(f):
    KINDS[f.__name__] = f
    return f
""",
    "proj/plugins.py": """
from proj.kinds import register

@register
def a():
    return 1
""",
    "proj/files.py": """
from pathlib import Path

def body():
    return (Path(__file__).parent / 'seeds.txt').read_text()

def folder():
    return sorted((Path(__file__).parent / 'texts').iterdir())
""",
    "proj/seeds.txt": "one",
    "proj/texts/a.txt": "a",
    "proj/blind.py": """
import proj.local
from proj.deeper import *

def star():
    return LIMIT

def passed():
    return vars(proj.local)

def text():
    return 'proj.local.helper'

def run():
    return exec('hidden()')

def hidden():
    return 1
""",
    "proj/dynamic.py": """
import importlib

def body(name):
    return importlib.import_module('proj.' + name)
""",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "proj"]:
        del sys.modules[name]


@pytest.fixture
def changed(project: Path) -> Callable[[str, str, str, str], bool]:
    """Whether replacing text in a file changes the fingerprint of `module:function`."""

    def check(where: str, file: str, before: str, after: str) -> bool:
        module, _, function = where.partition(":")
        body = getattr(importlib.import_module(module), function)
        first = Fingerprinter().of(body)
        path = project / file
        original = path.read_text()
        assert before in original
        path.write_text(original.replace(before, after))
        second = Fingerprinter().of(body)
        path.write_text(original)
        assert Fingerprinter().of(body) == first
        return first.code != second.code

    return check


def test_comments_docstrings_and_annotations_do_not_count(changed: Callable[..., bool]) -> None:
    body = "proj.steps:body"
    assert not changed(body, "proj/middle.py", "def scale(x):\n", "def scale(x):\n    # a comment\n")
    assert not changed(body, "proj/middle.py", "def scale(x):\n", 'def scale(x):\n    """Says what it does."""\n')
    assert not changed(body, "proj/steps.py", "def body(x: int) -> int:", "def body(x: float):")
    assert not changed(body, "proj/deep.py", "def base(x):\n", "\n\n\ndef base(x):\n")


def test_everything_that_a_body_reaches_counts(changed: Callable[..., bool]) -> None:
    body = "proj.steps:body"
    assert changed(body, "proj/steps.py", "* WEIGHTS", "+ WEIGHTS")
    assert changed(body, "proj/deeper.py", "LIMIT = 10", "LIMIT = 11"), "a global three modules away"
    assert changed(body, "proj/deep.py", "min(x", "max(x"), "a helper two modules away"
    assert changed(body, "proj/local.py", "x + 1", "x + 2"), "an import inside the function"
    assert changed(body, "proj/actors.py", "return self.step()", "return 2 * self.step()"), "a method of a class"
    assert changed(body, "proj/tables.py", "['a'] = 1", "['a'] = 2"), "a statement that fills a global"


def test_what_a_body_does_not_reach_does_not_count(changed: Callable[..., bool]) -> None:
    body = "proj.steps:body"
    assert not changed(body, "proj/middle.py", "return 0", "return 1")
    assert not changed(body, "proj/deeper.py", "UNUSED = 1", "UNUSED = 2")
    assert not changed(body, "proj/steps.py", "    return 1", "    return 2")


def test_registries_files_and_texts_count(changed: Callable[..., bool], project: Path) -> None:
    assert changed("proj.registry:body", "proj/plugins.py", "return 1", "return 2")
    assert changed("proj.files:body", "proj/seeds.txt", "one", "two")
    assert changed("proj.files:folder", "proj/texts/a.txt", "a", "b")
    assert changed("proj.blind:text", "proj/local.py", "x + 1", "x + 2"), "a text that names a module"


def test_where_it_cannot_see_it_takes_the_whole_module(changed: Callable[..., bool]) -> None:
    assert changed("proj.blind:star", "proj/deeper.py", "UNUSED = 1", "UNUSED = 2")
    assert changed("proj.blind:passed", "proj/local.py", "x + 1", "x + 2")
    assert changed("proj.blind:run", "proj/blind.py", "def hidden():\n    return 1", "def hidden():\n    return 2")
    assert changed("proj.dynamic:body", "proj/local.py", "x + 1", "x + 2"), "a computed import: the whole package"


def test_a_file_that_is_no_python_counts_by_its_text(changed: Callable[..., bool], project: Path) -> None:
    (project / "proj" / "draft.py").write_text("def {{ name }}(): one\n")
    assert changed("proj.dynamic:body", "proj/draft.py", "one", "two")


def test_libraries_count_by_version(project: Path) -> None:
    found: Fingerprint = Fingerprinter().of(importlib.import_module("proj.steps").body, libraries=("pydantic",))
    assert {"numpy", "pydantic", "python"} <= set(found.libraries)
    assert "pytest" not in found.libraries


PROGRAM = """
from workflows.graph import step
from workflows.identity.fingerprint import Fingerprinter
from helper import factor

@step(num_cpus={cpus})
def body(x: int) -> int:
    return x * factor()

def show():
    print(body.name, Fingerprinter().of(body.fn).code)

if __name__ == "__main__":
    show()
"""


def test_a_script_and_a_module_have_equal_names_and_fingerprints(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text("")
    program = tmp_path / "flows" / "program.py"
    (tmp_path / "helper.py").write_text("def factor():\n    return 2\n")

    def output(*command: str, cpus: int = 1) -> str:
        program.write_text(PROGRAM.format(cpus=cpus))
        environment = {"PYTHONPATH": f"{repository}:{tmp_path}", "PATH": "/usr/bin:/bin"}
        ran = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    script = output(str(program))
    assert script.startswith("flows.program:body ")
    assert script == output("-m", "flows.program")
    assert script == output("-c", "import flows.program; flows.program.show()")
    assert script == output(str(program), cpus=2), "resources are not part of the code"


@pytest.fixture(scope="module")
def real() -> dict[str, Fingerprint]:
    """Every step of the real recipe."""
    from workflows import llama3_posttrain
    from workflows.graph import Step

    fingerprinter = Fingerprinter()
    steps = {name: thing for name, thing in vars(llama3_posttrain).items() if isinstance(thing, Step)}
    return {name: fingerprinter.of(each.fn) for name, each in steps.items()}


def _packages(found: Fingerprint) -> set[str]:
    """Our packages that a fingerprint covers; those of `workflows` by their module."""
    modules = {name.partition(":")[0] for name in found.parts if not name.startswith("file ")}
    return {name if name.startswith("workflows.") else name.partition(".")[0] for name in modules}


def test_the_platform_is_part_of_no_real_step(real: dict[str, Fingerprint], repository: Path) -> None:
    packages = {file.parent.name for file in (repository / "workflows").glob("*/__init__.py")}
    assert packages - {"recipes"} == PLATFORM, "a new package of workflows/ is either the platform's or a recipe's"
    for name, found in real.items():
        packages = _packages(found)
        ours = {each.split(".")[1] for each in packages if each.startswith("workflows.")}
        assert not ours & PLATFORM, name
        assert "infra" not in packages, name


def test_real_steps_cover_what_they_reach_and_no_more(real: dict[str, Fingerprint]) -> None:
    covered = {name: _packages(found) for name, found in real.items()}
    for name in ("build_corpus", "build_problems", "train_tokenizer", "tokenize", "fit_texts", "import_model"):
        assert not covered[name] & {"actors", "algorithms", "cluster", "serving"}, name
    assert "engines" not in covered["build_corpus"] | covered["tokenize"] | covered["train_tokenizer"]
    assert {name for name in real if "serving" in covered[name]} == {"deploy"}
    ppo = {name for name, found in real.items() if any("actors.posttrain.ppo:" in part for part in found.parts)}
    assert ppo == {"optimise_policy"}


def test_a_change_reaches_only_the_steps_that_use_it(repository: Path, tmp_path: Path) -> None:
    """On a copy of the tree, in fresh processes: what an edit of one file does to every step's fingerprint."""
    copy = tmp_path / "copy"
    for package in ("actors", "algorithms", "cluster", "data", "engines", "infra", "models", "serving", "workflows"):
        shutil.copytree(repository / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import json; from workflows import llama3_posttrain as w; from workflows.graph import Step\n"
        "from workflows.identity.fingerprint import Fingerprinter\n"
        "f = Fingerprinter()\n"
        "print(json.dumps({n: f.of(s.fn).code for n, s in vars(w).items() if isinstance(s, Step)}))"
    )

    def codes() -> dict[str, str]:
        ran = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
        found: dict[str, str] = json.loads(ran.stdout)
        return found

    def append(file: str, line: str) -> None:
        with (copy / file).open("a") as source:
            source.write(line)

    before = codes()
    for file in (
        "workflows/driver/executor.py",
        "workflows/cli/main.py",
        "workflows/report/record.py",
        "infra/storage/open.py",
    ):
        append(file, "\nCHANGED = [2, 1]\nCHANGED.sort()\n")
    assert codes() == before, "the platform is part of no key"
    ppo = (copy / "actors/posttrain/ppo.py").read_text()
    assert "def optimise_policy(" in ppo
    (copy / "actors/posttrain/ppo.py").write_text(
        ppo.replace("def optimise_policy(", "def optimise_policy(unused=0, *, ", 1)
    )
    after = codes()
    assert {name for name in before if after[name] != before[name]} == {"optimise_policy"}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[], Fingerprint]]:
    """A module `lone` beside its files; what is returned takes the fingerprint of its `body` anew."""
    folder = tmp_path / "lone"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def make(source: str) -> Callable[[], Fingerprint]:
        (folder / "lone.py").write_text(source)
        monkeypatch.delitem(sys.modules, "lone", raising=False)
        importlib.invalidate_caches()
        body = importlib.import_module("lone").body
        monkeypatch.delitem(sys.modules, "lone")
        return lambda: Fingerprinter().of(body)

    return make


HEAD = """
import csv, gzip, json, os, shutil
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUT = HERE / "out.json"
NAME = "out.json"

def keep(path, data):
    Path(path).write_text(data)

def keep_in(folder, name):
    (folder / f"{name}.json").write_text("")

def keep_here(name="out.json"):
    with (HERE / name).open("w") as out:
        out.write("x")

class Names:
    OUT = "out.json"
    SOURCE = "in.txt"

    def keep(self):
        open(self.OUT, "w")

class Book:
    def __init__(self, path):
        self.path = Path(path)

    def keep(self):
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text("x")

class Table:
    def __init__(self, path):
        self.path = Path(path)

    def load(self):
        return self.path.read_text()

    def keep(self, text):
        self.path.write_text(text)

"""
WRITES = [
    "open('out.json', 'w').write('x')",
    "open('./out.json', mode='a').write('x')",
    "open(NAME, 'wb').write(b'x')",
    "open(file=OUT, mode='x')",
    "with open(Path(__file__).parent / 'out.json', 'w') as out: json.dump(1, out)",
    "with OUT.open('w', newline='') as out: csv.writer(out).writerow([1])",
    "OUT.write_text('x')",
    "(HERE / 'out.json').write_bytes(b'x')",
    "Path('out.json').touch()",
    "OUT.with_suffix('.json').write_text('x')",
    "Path(__file__).with_name('out.json').write_text('x')",
    "os.path.join(HERE, 'out.json'); open(os.path.join(os.path.dirname(__file__), 'out.json'), 'w')",
    "open(f'{HERE}/out.json', 'w')",
    "open(str(HERE) + '/out.json', 'w')",
    "path = HERE / 'out.json'; path.write_text('x')",
    "target = str(OUT); open(target, 'w')",
    "gzip.open('out.json', 'wt')",
    "import numpy as np; np.savez('out.json', a=1)",
    "import torch; torch.save({}, OUT)",
    "import pandas as pd; pd.DataFrame().to_csv('out.json')",
    "import joblib; joblib.dump({}, 'out.json')",
    "shutil.copy('in.txt', 'out.json')",
    "import pandas as pd; pd.DataFrame().to_csv(path_or_buf='out.json', index=False)",
    "import soundfile; soundfile.write('out.json', [], 8000)",
    "os.open('out.json', os.O_CREAT | os.O_WRONLY)",
    "os.replace('part', NAME)",
    "Path('part').rename(OUT)",
    "import logging; logging.basicConfig(filename='out.json')",
    "keep('out.json', 'x')",
    "keep_here()",
    "keep_here('out.json')",
    "Book(OUT).keep()",
    "book = Book(path='out.json'); book.keep()",
    "def put(path): path.write_text('x')\n    put(OUT)",
    "import sqlite3; sqlite3.connect('out.json').execute('CREATE TABLE IF NOT EXISTS seen (x)')",
    "keep(OUT, data='x')",
    "keep(data='x', path=HERE / 'out.json')",
    "[open(name, 'w') for name in ('out.json', 'other.json')]",
    "open('out.json', 'w' if NAME else 'a')",
    "mode = 'w'; open('out.json', mode)",
    "(out := Path('out.json')).write_text('x')",
    "open(Names.OUT, 'w')",
    "Names().keep()",
    "[Path(name).write_text(text) for name, text in [('out.json', 'x'), ('other.json', 'y')]]",
    "import numpy; numpy.memmap('out.json', 'f4', 'w+', shape=(1,))",
    "import subprocess; subprocess.run(['curl', '-o', 'out.json', 'http://localhost'])",
    "import subprocess; subprocess.run(['tee', 'out.json'])",
    "n = json.loads(OUT.read_text()) if OUT.exists() else 0; OUT.write_text(json.dumps(n + 1))",
]
READS = [
    "mode = 'r'; open('in.txt', mode)",
    "open(Names.SOURCE)",
    "import subprocess; subprocess.run(['sort', 'in.txt', '-o', 'out.json'])",
    "open('in.txt').read()",
    "open('in.txt', 'rb').read()",
    "Path('in.txt').read_text()",
    "(HERE / 'in.txt').read_text()",
    "(HERE / 'deep' / 'far.txt').read_text()",
    "open(os.path.join(HERE, 'deep', 'far.txt'))",
    "open(f'{HERE}/deep/far.txt')",
    "[file.read_text() for file in (HERE / 'deep').iterdir()]",
    "[open(os.path.join('deep', name)) for name in os.listdir('deep')]",
    "[file.read_text() for file in HERE.glob('deep/*.txt')]",
    "from importlib import resources; (resources.files('deep') / 'far.txt').read_text()",
    "from importlib import resources; resources.files('deep').joinpath('far.txt').read_text()",
    "import pkgutil; pkgutil.get_data('deep', 'far.txt')",
    "Table('in.txt').load(); Table('out.json').keep('x')",
    "import sqlite3; sqlite3.connect('in.txt').execute('SELECT x FROM seen')",
    "import sqlite3; a = sqlite3.connect('in.txt'); sqlite3.connect('out.json').execute('INSERT INTO seen VALUES (1)')",
    "import zipfile; zipfile.ZipFile('out.json', 'w').write('in.txt', 'name')",
    "open('out.json', 'w').write('in.txt'); open('in.txt')",
    "import glob; [open(name) for name in glob.glob('deep/*.txt')]",
    "shutil.copy('in.txt', 'out.json')",
    "import pandas; pandas.read_csv('in.txt').to_csv('out.json')",
    "source = HERE / 'in.txt'; text = source.read_text(); (HERE / 'out.json').write_text(text)",
    "path = HERE / 'in.txt'; text = path.read_text(); path = OUT; path.write_text(text)",
    "text = (HERE / 'deep' / 'far.txt').read_text(); (HERE / 'deep' / 'out.json').write_text(text)",
    "text = (HERE / 'deep' / 'far.txt').read_text(); keep_in(HERE / 'deep', text)",
    "json.dump(open('in.txt').read(), open('out.json', 'w'))",
    "print('x'.replace('x', 'in.txt'), open('in.txt'))",
    "scratch = Path(os.environ['HOME']); (scratch / 'in.txt').write_text(open('in.txt').read())",
]


@pytest.mark.parametrize("line", WRITES)
def test_what_a_step_writes_is_no_data_of_it(line: str, script: Callable[..., Any], tmp_path: Path) -> None:
    fingerprint = script(f"{HEAD}def body():\n    {line}\n")
    first = fingerprint()
    for content in ("[1]", "[2]"):
        (tmp_path / "lone" / "out.json").write_text(content)
        assert fingerprint().code == first.code
    assert fingerprint().products == ("out.json",) and "out.json" not in fingerprint().data_files


@pytest.mark.parametrize("line", READS)
def test_what_a_step_reads_is_data_of_it(line: str, script: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "lone" / "deep").mkdir()
    (tmp_path / "lone" / "deep" / "__init__.py").touch()
    files = [tmp_path / "lone" / name for name in ("in.txt", "deep/far.txt")]
    for file in files:
        file.write_text("one")
    fingerprint = script(f"{HEAD}def body():\n    {line}\n")
    first = fingerprint()
    assert [name for name in first.data_files if name != "deep/__init__.py"] in (["in.txt"], ["deep/far.txt"])
    for file in files:
        file.write_text("two")
    assert fingerprint().code != first.code


@pytest.mark.parametrize(
    "line",
    [
        "import subprocess, sys; subprocess.run([sys.executable, 'tool.py'])",
        "import subprocess, sys; subprocess.run([sys.executable, str(HERE / 'tool.py')])",
        "import subprocess, sys; subprocess.run([sys.executable, '-m', 'tool'])",
        "import runpy; runpy.run_path('tool.py')",
        "import importlib; importlib.import_module('tool').main()",
        "exec(open('tool.py').read(), {})",
    ],
)
def test_a_file_of_pythons_that_a_step_starts_or_reads_counts_with_what_it_uses(
    line: str, script: Callable[..., Any], tmp_path: Path
) -> None:
    tool, used = tmp_path / "lone" / "tool.py", tmp_path / "lone" / "used.py"
    tool.write_text("from used import f\ndef main(): print(f())\nif __name__ == '__main__': main()\n")
    used.write_text("def f(): return 1\n")
    fingerprint = script(f"{HEAD}def body():\n    {line}\n")
    first = fingerprint()
    used.write_text("def f(): return 2\n")
    second = fingerprint()
    tool.write_text("from used import f\ndef main(): print(-f())\nif __name__ == '__main__': main()\n")
    assert len({first.code, second.code, fingerprint().code}) == 3


def test_a_file_of_pythons_that_a_step_writes_is_its_product(script: Callable[..., Any], tmp_path: Path) -> None:
    line = "Path('made.py').write_text('x = 1'); import subprocess, sys; subprocess.run([sys.executable, 'made.py'])"
    fingerprint = script(f"{HEAD}def body():\n    {line}\n")
    first = fingerprint()
    (tmp_path / "lone" / "made.py").write_text("x = 1")
    assert fingerprint().code == first.code


def test_files_of_computed_names_in_a_folder_of_its_own_are_products(
    script: Callable[..., Any], tmp_path: Path
) -> None:
    body = """def body(n):
    out = Path(__file__).parent / "made"
    out.mkdir(exist_ok=True)
    for i in range(n):
        (out / f"{i}.txt").write_text("x")
    keep_in(out, n)
"""
    fingerprint = script(HEAD + body)
    first = fingerprint()
    (tmp_path / "lone" / "made").mkdir()
    (tmp_path / "lone" / "made" / "1.txt").write_text("x")
    assert fingerprint().code == first.code and fingerprint().products == ("made/1.txt",)


def test_a_link_counts_by_what_it_leads_to(script: Callable[..., Any], tmp_path: Path) -> None:
    folder, disk = tmp_path / "lone", tmp_path / "disk"
    (disk / "texts").mkdir(parents=True)
    (disk / "corpus.txt").write_text("one")
    (disk / "texts" / "a.txt").write_text("one")
    (folder / "corpus.txt").symlink_to(disk / "corpus.txt")
    (folder / "texts").symlink_to(disk / "texts")
    (disk / "texts" / "round").symlink_to(disk / "texts")
    (folder / "nowhere.txt").symlink_to(disk / "nothing")
    (folder / "loop.txt").symlink_to("loop.txt")
    body = """def body():
    names = ["corpus.txt", "nowhere.txt", "loop.txt", "../disk/corpus.txt"]
    return names, list((HERE / "texts").iterdir())
"""
    fingerprint = script(HEAD + body)
    first = fingerprint()
    assert first.data_files == ["../disk/corpus.txt", "corpus.txt", "texts/a.txt"]
    (disk / "corpus.txt").write_text("two")
    changed = {name for name, part in fingerprint().parts.items() if part != first.parts[name]}
    assert changed == {"file ../disk/corpus.txt", "file corpus.txt"}
    (disk / "texts" / "a.txt").write_text("two")
    assert fingerprint().parts["file texts/a.txt"] != first.parts["file texts/a.txt"]


def test_a_module_that_is_a_link_names_files_beside_its_source(script: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "texts.py").write_text("def load():\n    return open('words.txt').read()\n")
    (tmp_path / "shared" / "words.txt").write_text("one")
    (tmp_path / "lone" / "texts.py").symlink_to(tmp_path / "shared" / "texts.py")
    fingerprint = script("from texts import load\n\ndef body():\n    return load()\n")
    assert fingerprint().data_files == ["words.txt"]


def test_a_large_data_file_is_read_in_pieces_and_once(script: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "lone" / "large.bin"
    with file.open("wb") as stream:
        stream.truncate(256 << 20)
    os.utime(file, (1, 1))
    fingerprint = script("def body():\n    return open('large.bin')\n")
    tracemalloc.start()
    first = fingerprint()
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    with file.open("r+b") as stream:  # in its middle, its size and time as they were
        stream.seek(128 << 20)
        stream.write(b"x")
    os.utime(file, (1, 1))
    assert fingerprint().code != first.code


def test_every_file_of_a_folder_counts(script: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "lone" / "texts"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number:03}.txt").write_text("one")
    fingerprint = script("from pathlib import Path\n\ndef body():\n    return Path(__file__).parent / 'texts'\n")
    first = fingerprint()
    (folder / "299.txt").write_text("two")
    assert fingerprint().code != first.code
