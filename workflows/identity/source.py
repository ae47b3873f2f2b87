"""The definitions of our modules, read from their source: the index that fingerprints walk.

No module is imported or run. "Ours" is every module whose file is under one of the given roots and outside
site-packages; all others count as libraries.
"""

import ast
import contextlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from workflows.identity.names import canonical_module, module_of_file

KNOWN_DECORATORS = {
    "abstractmethod", "cache", "cached_property", "classmethod", "contextmanager", "dataclass", "lru_cache", "overload",
    "override", "property", "remote", "staticmethod", "step", "total_ordering", "workflow", "wraps",
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """`from module import name` (name None: the module itself)."""

    module: str
    name: str | None


@dataclass
class Module:
    """One source file: statements that bind each top-level name, imports (several of one name where conditions choose
    among them), and statements with effects."""

    name: str
    file: Path
    tree: ast.Module
    bindings: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, list[Import]] = field(default_factory=dict)
    star_imports: list[str] = field(default_factory=list)
    imported_modules: list[str] = field(default_factory=list)
    effects: list[ast.stmt] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """One statement, stripped: its structure as text, the names that it reads with the attributes taken from them, its
    string constants, what it imports, modules that it imports or starts by a plain name, and whether it imports some by
    a computed one."""

    text: str
    chains: tuple[tuple[str, ...], ...]
    constants: tuple[str, ...]
    imports: dict[str, list[Import]]
    named_modules: tuple[str, ...]
    blind_imports: bool


class SourceIndex:
    """Parses our modules on demand, and every statement once."""

    def __init__(self, roots: list[Path]) -> None:
        self._roots = [root.resolve() for root in roots]
        self._modules: dict[str, Module | None] = {}
        self._readings: dict[ast.stmt, Reading] = {}

    def read(self, module: Module, statement: ast.stmt) -> Reading:
        """A parsed statement of `module`."""
        if statement not in self._readings:
            self._readings[statement] = _read(module, statement)
        return self._readings[statement]

    def module(self, name: str) -> Module | None:
        """The module of that canonical name; None if it is not ours."""
        if name not in self._modules:
            file = self._find(name)
            self._modules[name] = None if file is None else _parse(name, file)
        return self._modules[name]

    def root_of(self, file: Path) -> Path:
        """The root that a module's file lies under; of a link to another place, the folder to import it from there."""
        return next((root for root in self._roots if file.is_relative_to(root)), module_of_file(file)[1])

    def name_of(self, file: Path, module: Module) -> str:
        """What a data file that `module` names is called: where it lies under our roots, else the way to it from
        the module's root."""
        real = file.resolve()
        for root in self._roots:
            if real.is_relative_to(root):
                return real.relative_to(root).as_posix()
        return Path(os.path.relpath(file, self.root_of(module.file))).as_posix()

    def _find(self, name: str) -> Path | None:
        for root in self._roots:
            base = root.joinpath(*name.split("."))
            for file in (base / "__init__.py", base.with_suffix(".py")):
                if file.is_file():
                    return file.resolve()
        return self._loaded(name)

    def _loaded(self, name: str) -> Path | None:
        module = sys.modules.get(name)
        if module is None and canonical_name_of_main() == name:
            module = sys.modules["__main__"]
        file = getattr(module, "__file__", None)
        if file is None or not file.endswith(".py"):
            return None
        path = Path(file).resolve()
        ours = any(path.is_relative_to(root) for root in self._roots) and "site-packages" not in path.parts
        return path if ours else None


def canonical_name_of_main() -> str | None:
    main = sys.modules.get("__main__")
    return canonical_module("__main__") if getattr(main, "__file__", None) else None


def resolve_import(module: Module, node: ast.ImportFrom) -> str:
    """The absolute module of a `from X import` statement, relative ones included."""
    if not node.level:
        return node.module or ""
    package = module.name if module.file.name == "__init__.py" else module.name.rpartition(".")[0]
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


def local_imports(module: Module, node: ast.AST) -> dict[str, list[Import]]:
    """The bindings of import statements inside `node`: local name -> all its possible targets."""
    found: dict[str, list[Import]] = {}
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                name = alias.asname or alias.name.partition(".")[0]
                _add(found, name, Import(alias.name if alias.asname else name, None))
        elif isinstance(child, ast.ImportFrom):
            target = resolve_import(module, child)
            for alias in child.names:
                if alias.name != "*":
                    _add(found, alias.asname or alias.name, Import(target, alias.name))
    return found


def _add(found: dict[str, list[Import]], name: str, target: Import) -> None:
    if target not in found.setdefault(name, []):
        found[name].append(target)


def strip(node: ast.AST) -> ast.AST:
    """A copy of `node` with only the parts that can change its result."""
    stripped: ast.AST = _Strip().visit(ast.parse(ast.unparse(node)))
    return stripped


class _Strip(ast.NodeTransformer):
    def _definition(self, node: ast.AST) -> ast.AST:
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module))
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        node.body = [stmt for stmt in node.body if not is_text(stmt)] or [ast.Pass()]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
            node.decorator_list = [item for item in node.decorator_list if decorator_name(item) not in SHELLS]
            for argument in [*node.args.args, *node.args.posonlyargs, *node.args.kwonlyargs]:
                argument.annotation = None
        return self.generic_visit(node)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = visit_Module = _definition


SHELLS = {"step", "workflow"}
DYNAMIC_IMPORT = {"import_module", "__import__"}


def _read(module: Module, statement: ast.stmt) -> Reading:
    stripped = strip(statement)
    nodes = list(ast.walk(stripped))
    constants = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    dynamic = [node for node in nodes if isinstance(node, ast.Call) and _last_name(node.func) in DYNAMIC_IMPORT]
    blind = any(not node.args or not isinstance(node.args[0], ast.Constant) for node in dynamic)
    imports = local_imports(module, stripped)
    named = [name for node in nodes for name in _named_modules(module, node)]
    return Reading(
        ast.dump(stripped), tuple(_chains(nodes)), tuple(dict.fromkeys(constants)), imports, tuple(named), blind
    )


def _named_modules(module: Module, node: ast.AST) -> Iterator[str]:
    """Of `import_module("name")`, `import_module(".name", __package__)` and [python, "-m", "name"]."""
    if isinstance(node, ast.Call) and _last_name(node.func) in DYNAMIC_IMPORT and node.args:
        if isinstance(name := getattr(node.args[0], "value", None), str):
            package = module.name if module.file.name == "__init__.py" else module.name.rpartition(".")[0]
            with contextlib.suppress(ImportError):  # it goes beyond the package: no import that could work
                yield importlib.util.resolve_name(name, package)
    elif isinstance(node, (ast.List, ast.Tuple)):
        words = [getattr(each, "value", None) for each in node.elts]
        yield from (name for flag, name in itertools.pairwise(words) if flag == "-m" and isinstance(name, str))


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _chains(nodes: list[ast.AST]) -> list[tuple[str, ...]]:
    """`a.b.c` -> (a, b, c) once, not also as `a` and `a.b`: a bare name means the thing itself is handed on."""
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    found: list[tuple[str, ...]] = []
    for node in nodes:
        if id(node) in inner:
            continue
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            found.append((node.id, *parts))
    return list(dict.fromkeys(found))


def is_text(statement: ast.stmt) -> bool:
    """A bare string: a docstring, or the documentation under a field."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def decorator_name(node: ast.expr) -> str:
    while isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _parse(name: str, file: Path) -> Module:
    source = file.read_bytes()
    try:
        tree = ast.parse(source, filename=str(file))
    except (SyntaxError, ValueError):  # a draft or a template, which is never imported
        tree = ast.parse(repr(source))
    module = Module(name, file, tree)
    for statement in module.tree.body:
        _index(module, statement)
    return module


def _index(module: Module, statement: ast.stmt) -> None:
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        module.imports.update(local_imports(module, statement))
        if isinstance(statement, ast.Import):
            module.imported_modules += [alias.name for alias in statement.names]
        else:
            target = resolve_import(module, statement)
            module.imported_modules.append(target)
            if any(alias.name == "*" for alias in statement.names):
                module.star_imports.append(target)
    elif isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        module.bindings.setdefault(statement.name, []).append(statement)
        if any(decorator_name(item) not in KNOWN_DECORATORS for item in statement.decorator_list):
            module.effects.append(statement)  # a registry may hold it
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = [child.id for target in targets for child in ast.walk(target) if isinstance(child, ast.Name)]
        for bound in names:
            module.bindings.setdefault(bound, []).append(statement)
        if any(not isinstance(child, (ast.Name, ast.Tuple, ast.List)) for child in targets):
            module.effects.append(statement)  # TABLE["x"] = y
    elif not is_text(statement) and not _never_imported(statement):
        module.effects.append(statement)
        for child in ast.walk(statement):  # names bound under if/try/with/for
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                module.bindings.setdefault(child.name, []).append(statement)
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                module.bindings.setdefault(child.id, []).append(statement)
        for name, found in local_imports(module, statement).items():
            for imported in found:
                _add(module.imports, name, imported)


def _never_imported(statement: ast.stmt) -> bool:
    """`if __name__ == "__main__":` and `if TYPE_CHECKING:`."""
    if not isinstance(statement, ast.If) or statement.orelse:
        return False
    test = ast.unparse(statement.test)
    return "__name__" in test or test.rpartition(".")[2] == "TYPE_CHECKING"
