"""Canonical names: a function has the same name however its file was started.

`python workflows/x.py` runs the module as `__main__`; `recua run` and a job import it as `workflows.x`. The canonical
name is always `workflows.x:function`, from the file's place in its packages. A script whose name cannot be a module's
(`llama3.1.py`), or belongs to another module (`random.py`), gets its whole file name with dots written as %2E:
`llama3%2E1%2Epy:function`.
"""

import functools
import importlib
import os
import sys
import sysconfig
from collections.abc import Sequence
from importlib.machinery import PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

from infra.code_root import code_root
from infra.errors import UserError
from workflows.identity.moved import place_of, stored_name

OURS = ("actors", "algorithms", "bench", "cluster", "data", "engines", "infra", "models", "serving", "workflows")
"""recua's own packages: no other one of such a name can be imported beside it."""

OUR_ROOT = code_root()


@functools.cache
def module_of_file(file: Path) -> tuple[str, Path]:
    """(dotted module name, folder that must be on sys.path) of a Python file, by walking up its packages."""
    file = file.resolve()
    packages: list[str] = []
    folder = file.parent
    while (folder / "__init__.py").exists() and "." not in folder.name:
        packages.insert(0, folder.name)
        folder = folder.parent
    if file.stem == "__init__" and packages:
        return ".".join(packages), folder
    own = _quoted(file.stem) == file.stem and (packages or not is_taken(file))
    return ".".join([*packages, file.stem if own else _quoted(file.name)]), folder


def is_taken(script: Path) -> bool:
    """Whether the import of a script's own name finds another module: Python's, recua's, a library's, or the package in
    a folder beside it."""
    name, (_, *libraries) = script.stem, _libraries()
    if is_pythons(name) or name in OURS or (script.parent / name / "__init__.py").exists():
        return True
    return str(script.parent) not in libraries and _lies_in(libraries, name)


def is_pythons(name: str) -> bool:
    """Whether a module of that name comes with Python."""
    return name in sys.stdlib_module_names or name in ("__main__", "__init__") or _lies_in(_libraries()[:1], name)


def _libraries() -> list[str]:
    """The folders of Python's own modules and of installed packages."""
    return [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]


def _lies_in(folders: list[str], name: str) -> bool:
    spec = PathFinder.find_spec(name, folders)
    return spec is not None and spec.origin is not None


def _quoted(file_name: str) -> str:
    """A name without what has a meaning in canonical names, and what is no text (bytes of another encoding)."""
    return "".join(
        letter if letter.isprintable() and letter not in ".:%" else "".join(f"%{b:02X}" for b in os.fsencode(letter))
        for letter in file_name
    )


class ScriptFinder:
    """Finds scripts that are named by their file names, for Python's import."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        last = name.rpartition(".")[2]
        if not last.endswith("%2Epy"):
            return None
        libraries = _libraries()  # they may have a file of that name, and are no place for scripts
        for folder in [each for each in (sys.path if path is None else path) if each not in libraries]:
            if (file := Path(folder or ".", unquote(last, errors="surrogateescape"))).is_file():
                return spec_from_file_location(name, file)
        return None


def import_name(name: str) -> ModuleType:
    """Import a module by its canonical name."""
    if ScriptFinder not in sys.meta_path:
        sys.meta_path.append(ScriptFinder)
    return importlib.import_module(name)


def split_target(target: Path) -> tuple[Path, str | None]:
    """FILE and NAME of FILE:NAME, which names one of several workflows in a file; None if only a file is named."""
    file, colon, name = str(target).rpartition(":")
    return (Path(file), name) if colon and file and not target.is_file() else (target, None)


def is_recua(root: Path) -> bool:
    """Whether a folder is this recua's, or another copy's."""
    return root == OUR_ROOT or any((root / "workflows" / name).exists() for name in ("graph", "graph.py"))


def neighbours(root: Path) -> list[Path]:
    """A user's code under `root` that has the name of one of recua's own packages."""
    if is_recua(root):
        return []
    files = [path for package in OURS if (path := root / f"{package}.py").is_file()]
    return files + [path for package in OURS if next((path := root / package).glob("*.py"), None)]


def make_way() -> None:
    """Undo what Python does for a script by putting its folder first on sys.path: a script by the name of a module of
    Python's (`python random.py`) hides that from every library, and a mere folder of data (`data/`) beside one hides
    recua's own package of that name where recua is installed from its sources."""
    script = Path(os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or ""))
    folder = script.parent
    if sys.path[:1] != [str(folder)]:
        return
    if script.stem in sys.stdlib_module_names:
        sys.path.append(sys.path.pop(0))
    if str(OUR_ROOT) not in sys.path and any((folder / name).is_dir() for name in OURS) and not neighbours(folder):
        sys.path.append(str(OUR_ROOT))


def canonical_module(name: str) -> str:
    """The importable name of a loaded module; resolves `__main__`."""
    if name != "__main__":
        return name
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:  # python -m package.module
        return str(spec.name).removesuffix(".__main__")
    file = getattr(main, "__file__", None)
    if file is None:
        raise UserError("steps and workflows must live in a file: an interactive session cannot be resumed")
    return module_of_file(Path(file))[0]


def canonical_name(thing: Any) -> str:
    """`module:qualname` of a class or function defined at the top of a module."""
    qualname = thing.__qualname__
    if "<" in qualname:
        raise UserError(
            f"{thing.__module__}.{qualname} must be defined at the top of a module, so that workers find it"
        )
    return stored_name(f"{canonical_module(thing.__module__)}:{qualname}")


def load_module(name: str) -> ModuleType:
    """Import by canonical name; the running script is never imported a second time."""
    main = sys.modules.get("__main__")
    if main is not None and getattr(main, "__file__", None) and name != "__main__":
        try:
            if canonical_module("__main__") == name:
                return main
        except UserError:
            pass
    return import_name(name)


def load_name(name: str) -> Any:
    """The object behind `module:qualname`.

    Raises:
        UserError: there is no such module or name (any more).
    """
    module_name, _, qualname = place_of(name).partition(":")
    try:
        found: Any = load_module(module_name)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot find {name}: {error}") from error
    return found


def import_roots() -> list[str]:
    """The folders that a worker must import from: this process's sys.path, with the script's package root."""
    roots = [str(Path(entry or ".").resolve()) for entry in sys.path]
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is not None:
        root = str(module_of_file(Path(file))[1])
        if root not in roots:
            roots.insert(0, root)
    return roots
