"""Canonical names: the same function has one name however its file was started.

`python workflows/x.py` runs the module as `__main__`, `recua run` and a job import it as `workflows.x`. A canonical
name is always `workflows.x:function`, found from where the file lies in its packages.
"""

import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from infra.errors import UserError


@functools.cache
def module_of_file(file: Path) -> tuple[str, Path]:
    """(dotted module name, folder that must be on sys.path) of a Python file, by walking up its packages."""
    file = file.resolve()
    parts = [] if file.stem == "__init__" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").exists():
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts), folder


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
    return f"{canonical_module(thing.__module__)}:{qualname}"


def load_module(name: str) -> ModuleType:
    """Import by canonical name; the running script is never imported a second time."""
    main = sys.modules.get("__main__")
    if main is not None and getattr(main, "__file__", None) and name != "__main__":
        try:
            if canonical_module("__main__") == name:
                return main
        except UserError:
            pass
    return importlib.import_module(name)


def load_name(name: str) -> Any:
    """The object behind `module:qualname`.

    Raises:
        UserError: there is no such module or name (any more).
    """
    module_name, _, qualname = name.partition(":")
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
