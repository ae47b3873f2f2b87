"""The fingerprint of a step's code, on which reuse across runs depends.

Starting at the step's function it follows every name into our own sources: functions, whole classes (an actor's
methods with it), globals, function-local imports, imports with effects (registries), strings that name one of our
modules, and data files. Comments, docstrings and annotations do not count. If a name cannot be followed (star imports,
`getattr` on a module, `exec`, an import of a computed name), the whole module or package counts. Libraries count by
their installed version. recua's platform (the graph, the command line, `infra`) does not count, because it transports
results and does not compute them.

A data file of a step is an existing file that its code names: a text `"corpus.txt"`, or a path joined from such texts
and `__file__`, leads to it from the module's folder or from its package's root. A Python file that is named in this way
(`[sys.executable, "tool.py"]`) counts as code as a whole. A folder counts with all its files if the code lists it, or
names it in a statement with `__file__`. A link counts by its target. Files that the same code writes (`open(..., "w")`,
`write_text`, `save...`, `to_csv`, ...; see workflows.identity.code_paths) do not count: a step does not run again
because of its own output. Absolute paths and computed names do not count either: pass them as inputs.
"""

import ast
import contextlib
import functools
import glob
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from infra.code_root import code_root
from infra.errors import ConfigError
from infra.storage.files import remembered_sha256
from workflows.identity.code_paths import PathReader
from workflows.identity.names import canonical_module, module_of_file
from workflows.identity.source import Import, Module, SourceIndex, is_text

FORMAT = 1
FILE = "file "
PLATFORM = {"cli", "driver", "graph", "identity", "launch", "report", "runs", "service", "views", "worker"}
"""Packages of `workflows` that transport, show and store results. The others are recipes and their steps."""
BLINDING = {"exec", "eval", "globals", "__import__"}
NAMES_FILES = {"__file__", "resources", "files"}
LONGEST_PATH = 4096


@dataclass(frozen=True)
class Fingerprint:
    """`code`: sha256 of everything reachable. `parts`: name -> sha256 of each (a data file's is `file NAME`).
    `libraries`: name -> version. `products`: files that the code names and writes, which do not count."""

    code: str
    parts: dict[str, str]
    libraries: dict[str, str]
    products: tuple[str, ...] = ()

    @property
    def data_files(self) -> list[str]:
        """Names of the files that count."""
        return sorted(name.removeprefix(FILE) for name in self.parts if name.startswith(FILE))


class Fingerprinter:
    """Fingerprints of functions, each computed once. `roots`: folders whose code is ours (default: the function's own
    root and recua's)."""

    def __init__(self, roots: Iterable[Path] = ()) -> None:
        self._roots = [Path(root) for root in roots]
        self._done: dict[str, Fingerprint] = {}
        self._readers: dict[tuple[Path, ...], PathReader] = {}

    def of(self, function: object, libraries: Iterable[str] = ()) -> Fingerprint:
        """The fingerprint of a function defined at the top of a module; `libraries` are distributions to add."""
        module = canonical_module(function.__module__)
        qualname: str = function.__qualname__  # type: ignore[attr-defined]
        name = f"{module}:{qualname}"
        if name not in self._done:
            file = Path(function.__code__.co_filename)  # type: ignore[attr-defined]
            own = code_root()
            roots = tuple(self._roots or dict.fromkeys([module_of_file(file)[1], own]))
            roots = tuple(root for root in roots if root.name not in ("site-packages", "dist-packages"))
            if roots not in self._readers:
                self._readers[roots] = PathReader(SourceIndex(list(roots)))
            walk = _Walk(self._readers[roots])
            walk.reach(module, qualname.partition(".")[0])
            walk.follow_scripts()
            self._done[name] = self._finish(walk, libraries)
        return self._done[name]

    def _finish(self, walk: "_Walk", libraries: Iterable[str]) -> Fingerprint:
        parts = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in walk.parts.items()}
        files, products = walk.files()
        parts |= {f"{FILE}{name}": checksum for name, checksum in files.items()}
        lines = [f"{name} {parts[name]}" for name in sorted(parts)]
        code = hashlib.sha256("\n".join([f"format {FORMAT}", *lines]).encode()).hexdigest()
        names = {name for root in walk.libraries for name in _packages().get(root, ())}
        found = {name: metadata.version(name) for name in names}
        declared = {name: _declared(name) for name in libraries}
        python = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
        return Fingerprint(code, parts, dict(sorted((found | declared | python).items())), products)


def _declared(library: str) -> str:
    try:
        return metadata.version(library)
    except (metadata.PackageNotFoundError, ValueError):  # ValueError: no name at all
        raise ConfigError(f"libraries: {library!r} is not installed: name distributions, as pip does") from None


@functools.cache
def _packages() -> Mapping[str, list[str]]:
    """Import root -> distributions that provide it. Cached, because it reads every installed distribution."""
    return metadata.packages_distributions()


class _Walk:
    """One traversal. `parts`: canonical name -> stripped source; `libraries`: import roots."""

    def __init__(self, paths: PathReader) -> None:
        self.parts: dict[str, str] = {}
        self.libraries: set[str] = set()
        self._index = paths.index
        self._paths = paths
        self._named: dict[Path, Module] = {}
        self._listed: dict[Path, Module] = {}
        self._scripts: dict[Path, Module] = {}
        self._written: set[Path] = set()
        self._filled: set[Path] = set()
        self._entered: set[str] = set()

    def files(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """Name -> sha256 of the data files, and the names of those that the code itself writes."""
        found: dict[str, str] = {}
        products: set[str] = set()
        for path, module in (self._listed | self._named).items():
            real = path.resolve()
            among = {real, *real.parents}
            name = self._index.name_of(path, module)
            if among & self._written or (path not in self._named and among & self._filled):
                products.add(name)
                continue
            with contextlib.suppress(OSError):  # a file that is gone or unreadable counts as none
                found[name] = remembered_sha256(path)
        return found, tuple(sorted(products))

    def reach(self, module_name: str, name: str) -> None:
        """Follow one top-level name of one module."""
        module = self._enter(module_name)
        key = f"{module_name}:{name}"
        if module is None or key in self.parts:
            return
        if name in module.bindings:
            statements = module.bindings[name]
            self.parts[key] = self._text_of(module, statements)
            for statement in statements:
                self._follow(module, statement)
            for target in module.imports.get(name, ()):  # try: import it; except ImportError: define it
                self._target(target, [])
        elif name in module.imports:
            targets = module.imports[name]
            self.parts[key] = repr(targets[0] if len(targets) == 1 else targets)
            for target in targets:
                self._target(target, [])
        elif self._index.module(f"{module_name}.{name}") is not None:
            self.whole(f"{module_name}.{name}")
        elif any(self._index.module(star) is not None for star in module.star_imports):
            for star in module.star_imports:
                self.whole(star)
        elif "__getattr__" in module.bindings:
            self.whole(module_name)

    def whole(self, module_name: str) -> None:
        """The fallback: all code of a module, and everything that it names."""
        module = self._enter(module_name)
        key = f"{module_name}:*"
        if module is None or key in self.parts:
            return
        self.parts[key] = self._text_of(module, module.tree.body)
        for statement in module.tree.body:
            self._follow(module, statement)

    def _enter(self, name: str) -> Module | None:
        """A module of ours whose import is part of the run: the effects of importing it count."""
        if _is_platform(name):
            return None
        module = self._index.module(name)
        if module is None:
            if name.partition(".")[0] not in sys.stdlib_module_names:
                self.libraries.add(name.partition(".")[0])
            return None
        if name not in self._entered:
            self._entered.add(name)
            parent = name.rpartition(".")[0]
            if parent:
                self._enter(parent)
            if module.effects:
                self.parts[f"{name}:import"] = self._text_of(module, module.effects)
                for statement in module.effects:
                    self._follow(module, statement)
            for target in module.imported_modules:
                if self._index.module(target) is not None:
                    self._enter(target)
            for alias in (each for targets in module.imports.values() for each in targets):
                if alias.name and self._index.module(f"{alias.module}.{alias.name}") is not None:
                    self._enter(f"{alias.module}.{alias.name}")
        return module

    def _text_of(self, module: Module, statements: list[ast.stmt]) -> str:
        readable = [statement for statement in statements if not is_text(statement)]
        return "\n".join(self._index.read(module, statement).text for statement in readable)

    def _follow(self, module: Module, statement: ast.stmt) -> None:
        reading = self._index.read(module, statement)
        imports = reading.imports
        for head, *rest in reading.chains:
            if head in BLINDING:
                self.whole(module.name)
            elif head in imports:
                for target in imports[head]:
                    self._target(target, rest)
            elif head in module.imports and head not in module.bindings:
                for target in module.imports[head]:
                    self._target(target, rest)
            elif head in module.bindings or module.star_imports:
                self.reach(module.name, head)
        for name in reading.named_modules:
            if self._index.module(name) is not None:
                self.whole(name)
        if reading.blind_imports:
            self._whole_package(module)
        for target in (each for targets in imports.values() for each in targets):
            self._enter(target.module)
            if target.name and self._index.module(f"{target.module}.{target.name}") is not None:
                self._enter(f"{target.module}.{target.name}")
        named = {name for chain in reading.chains for name in chain}
        for text in reading.constants:
            self._text(module, text, names_files=bool(named & NAMES_FILES))
        self._follow_paths(module, statement)

    def _follow_paths(self, module: Module, statement: ast.stmt) -> None:
        paths = self._paths.of(module, statement)
        self._written.update(place.resolve() for path in paths.written for place in self._places(module, path))
        self._filled.update(place.resolve() for path in paths.filled for place in self._places(module, path))
        for place in (place for path in paths.read for place in self._places(module, path)):
            pattern = any(letter in place.name for letter in "*?[")
            found = glob.glob(str(place), recursive=True, include_hidden=True) if pattern else [place]
            for file in map(Path, found):
                self._file(module, file, folders_too=False)
        for place in (place for path in paths.listed for place in self._places(module, path)):
            self._file(module, place, folders_too=True)

    def _places(self, module: Module, path: str) -> set[Path]:
        """The files that a path in code may mean."""
        if not path or path.startswith("<") or len(path) > LONGEST_PATH or "\0" in path:
            return set()
        folders = {module.file.parent, self._index.root_of(module.file)}
        return {Path(os.path.normpath(folder / path)) for folder in folders}

    def _target(self, target: Import, rest: list[str]) -> None:
        """Follow an imported name with the attributes that are read from it."""
        parts = [*([target.name] if target.name else []), *rest]
        name = target.module
        while parts and self._index.module(f"{name}.{parts[0]}") is not None and not self._binds(name, parts[0]):
            name, parts = f"{name}.{parts[0]}", parts[1:]
        if self._index.module(name) is None:
            self._enter(name)
        elif parts:
            self.reach(name, parts[0])
        else:
            self.whole(name)  # the module itself is passed around

    def _binds(self, module_name: str, name: str) -> bool:
        module = self._index.module(module_name)
        return module is not None and name in module.bindings

    def _whole_package(self, module: Module) -> None:
        """Follow an import of a computed name, which may be any module beside this one."""
        self.whole(module.name)
        folder = module.file.parent
        if (folder / "__init__.py").exists():
            package = module_of_file(folder / "__init__.py")[0]
            for file in sorted(folder.glob("*.py")):
                self.whole(package if file.stem == "__init__" else f"{package}.{file.stem}")

    def _text(self, module: Module, text: str, names_files: bool) -> None:
        """A string may name one of our modules (`"engines.worker.Extension"`) or a data file."""
        if not text or len(text) > LONGEST_PATH or "\n" in text or text.startswith("/"):
            return
        dotted = text.replace(":", ".").split(".")
        if len(dotted) > 1 and all(part.isidentifier() for part in dotted):
            for end in range(len(dotted), 0, -1):
                if self._index.module(".".join(dotted[:end])) is not None:
                    if end < len(dotted):
                        self.reach(".".join(dotted[:end]), dotted[end])
                    elif end > 1:
                        self.whole(".".join(dotted))
                    break
        for place in self._places(module, text):
            self._file(module, place, folders_too=names_files and len(text) > 2)

    def _file(self, module: Module, path: Path, folders_too: bool) -> None:
        try:
            if path.is_file() and path.suffix == ".py" and path.resolve() != module.file:
                self._scripts.setdefault(path.resolve(), module)
            elif path.is_file() and path.suffix != ".py":
                self._named[path] = module
            elif folders_too and path.is_dir():
                self._listed |= dict.fromkeys(_files_in(path), module)
        except (OSError, ValueError):
            return

    def follow_scripts(self) -> None:
        """All Python files that the code names, to start or to read them, and does not write."""
        followed: set[Path] = set()
        while left := [file for file in self._scripts if file not in followed | self._written]:
            followed.update(left)
            for file in left:
                name = module_of_file(file)[0]
                found = self._index.module(name)
                if found is not None and found.file == file:
                    self.whole(name)
                else:
                    self._named[file] = self._scripts[file]


def _files_in(folder: Path) -> Iterator[Path]:
    """All files under a folder, links followed, each folder once."""
    seen: set[Path] = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        if (real := Path(path).resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(path, name) for name in sorted(files) if Path(path, name).is_file())


def _is_platform(name: str) -> bool:
    package, _, rest = name.partition(".")
    return package == "infra" or (package == "workflows" and (not rest or rest.partition(".")[0] in PLATFORM))
