"""The paths that code names literally: those that it reads, and those that it writes.

A path is followed through `__file__`, names that are bound once, `/`, `os.path.join`, f-strings, `Path` and its simple
methods, and through the parameters of our own functions. No code is run. Paths that cannot be followed are ignored.
"""

import ast
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from workflows.identity.source import Import, Module, SourceIndex

WRITING_MODES = frozenset("wax+")
OPENS = {"File", "GzipFile", "LZMAFile", "BZ2File", "TarFile", "ZipFile", "memmap", "open", "open_memmap"}
"""Calls whose first argument is a path and whose second is a mode."""
MADE = {"hardlink_to", "rmdir", "symlink_to", "touch", "unlink", "write_bytes", "write_text"}
"""Methods of a path that create or remove its target."""
MADE_FIRST = {
    "FileHandler", "RotatingFileHandler", "imsave", "imwrite", "remove", "rmtree", "to_csv", "to_disk", "to_excel",
    "to_feather", "to_hdf", "to_html", "to_json", "to_markdown", "to_netcdf", "to_orc", "to_parquet", "to_pickle",
    "to_stata", "to_xml", "to_zarr", "tofile", "unlink",
}  # fmt: skip
"""Calls whose first argument names a path that they create or remove."""
MADE_SECOND = {"copy", "copy2", "copyfile", "copytree", "link", "move", "rename", "symlink", "urlretrieve"}
"""Functions whose second argument names a path that they create."""
MOVES = {"rename", "replace"}
"""Methods of a path whose only argument is its new path."""
MADE_ANY = ("save", "write_", "dump")
"""Prefixes of library calls that write to a path among their arguments: `np.save`, `save_pretrained`, `joblib.dump`,
`write_parquet`."""
MADE_KEYWORDS = ("out", "save", "dst", "dest", "log")
"""Prefixes of library keywords that name an output path: `output_dir`, `save_path`."""
PATH_KEYWORDS = ("path", "file", "fname")
SQL_WRITES = ("alter ", "create ", "delete ", "drop ", "insert ", "replace ", "update ")
LISTS = {"iterdir", "listdir", "scandir", "walk"}
GLOBS = {"glob", "iglob", "rglob"}
SAME = {
    "PosixPath", "absolute", "abspath", "as_posix", "expanduser", "fspath", "normpath", "realpath", "resolve", "str",
}  # fmt: skip
JOINS = {"Path", "PurePath", "join", "joinpath"}
NEUTRAL = {*SAME, *JOINS, "exists", "is_dir", "is_file", "isfile", "makedirs", "mkdir", "with_name", "with_suffix"}
"""Calls that neither read nor write their paths."""
PACKAGE_DATA = {"get_data", "open_binary", "open_text", "read_binary", "read_text"}
"""Of `importlib.resources` and `pkgutil`: (package, name)."""
DEEPEST = 20
"""How deep names behind names, and calls inside calls, are followed."""
Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Paths:
    """The paths of a statement. Paths from `__file__` are absolute, others relative to the working folder; `<name>`
    stands for the value of a parameter. `read`: files, and patterns of files. `listed`: folders that are read as a
    whole. `written`: files and folders. `filled`: folders into which files with computed names are written."""

    read: frozenset[str] = frozenset()
    listed: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()
    filled: frozenset[str] = frozenset()


class PathReader:
    """Reads statements, each one once."""

    def __init__(self, index: SourceIndex) -> None:
        self.index = index
        self._codes: dict[ast.stmt, _Code] = {}

    def of(self, module: Module, statement: ast.stmt) -> Paths:
        """The paths that a top-level statement of `module` names."""
        return self.code(module, statement).paths()

    def code(self, module: Module, statement: ast.stmt) -> "_Code":
        if statement not in self._codes:
            self._codes[statement] = _Code(self, module, statement)
        return self._codes[statement]


@dataclass
class _Code:
    """One top-level statement. `bound`: the values that each of its names (`x`, `self.x`) is bound to."""

    reader: PathReader
    module: Module
    statement: ast.stmt
    bound: dict[str, list[ast.expr]] = field(default_factory=dict)
    parameters: frozenset[str] = frozenset()
    nodes: list[ast.AST] = field(default_factory=list)
    found: Paths | None = None

    def __post_init__(self) -> None:
        own = _entry(self.statement)
        fields = _fields(self.statement)
        if own is not None:
            self.parameters = frozenset(parameter.arg for parameter in _parameters(own))
        elif fields:
            self.parameters = frozenset(fields)
            self.bound |= {f"self.{name}": [ast.Name(name)] for name in fields}
        for name, value in _constants(self.statement).items():
            for owner in ("self", "cls"):
                self.bound.setdefault(f"{owner}.{name}", [value])
        self.nodes = list(ast.walk(self.statement))
        for node in self.nodes:
            if isinstance(node, (*FUNCTIONS, ast.Lambda)) and node is not own:
                for parameter in _parameters(node):
                    self.bound.setdefault(parameter.arg, []).append(_unknown())
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    self._bind(target, node.value)
            elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
                self._bind(node.target, node.value)
            elif isinstance(node, (ast.For, ast.comprehension)):
                self._bind_each(node.target, node.iter)
            elif isinstance(node, ast.AugAssign):
                self._bind(node.target, _unknown())
            elif isinstance(node, ast.withitem) and node.optional_vars is not None:
                self._bind(node.optional_vars, _unknown())

    def _bind_each(self, target: ast.expr, items: ast.expr) -> None:
        """Bind a loop's name to each item; for rows, each name to its column."""
        rows = items.elts if isinstance(items, (ast.List, ast.Tuple)) else []
        if not isinstance(target, (ast.Tuple, ast.List)):
            self._bind(target, items if rows else _unknown())
            return
        width = len(target.elts)
        alike = all(isinstance(row, (ast.Tuple, ast.List)) and len(row.elts) == width for row in rows)
        for column, element in enumerate(target.elts):
            cells = [row.elts[column] for row in rows if isinstance(row, (ast.Tuple, ast.List))] if alike else []
            self._bind(element, ast.List(cells) if cells else _unknown())

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for element in target.elts:
                self._bind(element, _unknown())
        elif isinstance(target, (ast.Name, ast.Attribute)):
            self.bound.setdefault(ast.unparse(target), []).append(value)

    # --- what is done with paths ---

    def paths(self) -> Paths:
        if self.found is None:
            self.found = Paths()  # a function that calls itself adds nothing to what it names
            self.found = self._paths()
        return self.found

    def _paths(self) -> Paths:
        read, listed, written, filled = set[str](), set[str](), set[str](), set[str]()
        for call in (node for node in self.nodes if isinstance(node, ast.Call)):
            for target in self._made(call):
                written.update(found := self.value(target))
                if not found:
                    filled.update(self._folder(target))
            passed = self._passed(call)
            written |= passed.written
            filled |= passed.filled
            listed.update(self._listed(call))
            read.update(self._globbed(call))
        for given in (
            each for node in self.nodes if isinstance(node, (ast.List, ast.Tuple)) for each in _outputs(node)
        ):
            written.update(self.value(given))
        read.update(self._joined())
        if isinstance(self.statement, ast.ClassDef):  # it is unknown which of its methods are called
            written -= (used := self._used())
            filled -= used
        written |= self._with_defaults(written)
        filled |= self._with_defaults(filled)
        return Paths(frozenset(read), frozenset(listed), frozenset(written), frozenset(filled))

    def _used(self) -> set[str]:
        """Paths that are used in any way except writing."""
        used: set[str] = set()
        for call in (node for node in self.nodes if isinstance(node, ast.Call)):
            if _last_name(call.func) not in NEUTRAL:
                taken = [getattr(call.func, "value", None), *call.args, *(each.value for each in call.keywords)]
                made = list(self._made(call))
                used.update(value for each in taken if each not in made for value in self.value(each))
        return used

    def _made(self, call: ast.Call) -> Iterator[ast.expr]:
        """The paths that a library call creates or removes."""
        name, receiver = _last_name(call.func), getattr(call.func, "value", None)
        keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        if name in OPENS:
            of_path = receiver is not None and bool(self.value(receiver) or self._folder(receiver))
            rest = call.args if of_path else call.args[2 if name == "memmap" else 1 :]
            mode = keywords.get("mode", rest[0] if rest else None)
            if mode is not None and self._writes(mode):
                yield from [receiver] if of_path and receiver else [*call.args[:1], *_named(keywords, "file")]
            return
        if self._own(call) is not None:
            return
        if name in MADE and receiver is not None:
            yield receiver
        if name in MADE_FIRST or (name == "write" and len(call.args) > 2):  # soundfile.write(path, data, rate)
            yield from call.args[:1] or [value for key, value in keywords.items() if key.startswith(PATH_KEYWORDS)]
        if name in MADE_SECOND or (name == "replace" and _dotted(call.func) == ["os", "replace"]):
            yield from call.args[1:2]
        if name in MOVES and len(call.args) == 1:
            yield from call.args
        if name.startswith(MADE_ANY):
            yield from call.args
            yield from (value for value in keywords.values())
        yield from (value for keyword, value in keywords.items() if keyword.startswith(MADE_KEYWORDS))
        if name == "connect" and any(map(_changes_tables, self.nodes)) and self._calls("connect") == 1:
            yield from call.args[:1]
        if name == "basicConfig":
            yield from _named(keywords, "filename")

    def _writes(self, mode: ast.expr) -> bool:
        """`"w"`, a name or a choice that may be that, or the flags of `os.open`."""
        plain = any(WRITING_MODES & set(each) for each in self.value(mode) if not each.startswith("<"))
        return plain or any(flag in ast.unparse(mode) for flag in ("os.O_WRONLY", "os.O_RDWR"))

    def _calls(self, name: str) -> int:
        return sum(isinstance(node, ast.Call) and _last_name(node.func) == name for node in self.nodes)

    def _passed(self, call: ast.Call) -> Paths:
        """The paths of a call's arguments that one of our own functions writes."""
        own = self._own(call)
        given = {} if own is None else self._arguments(call, own[1])
        if own is None or not any(given.values()):
            return Paths()
        paths = self.reader.of(*own)
        return Paths(written=_put_in(paths.written, given), filled=_put_in(paths.filled, given))

    def _with_defaults(self, paths: Iterable[str]) -> frozenset[str]:
        """Paths of parameters, where those are not given."""
        function = _entry(self.statement)
        if function is None:
            return frozenset()
        arguments = function.args
        by_place = [*arguments.posonlyargs, *arguments.args]
        pairs = [*zip(by_place[::-1], arguments.defaults[::-1], strict=False)]
        pairs += [
            (name, value) for name, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value
        ]
        return _put_in(paths, {parameter.arg: self.value(default) for parameter, default in pairs})

    def _arguments(self, call: ast.Call, called: ast.stmt) -> dict[str, list[str]]:
        """Parameter -> the paths that a call gives it."""
        function = _entry(called)
        names = _fields(called)
        if function is not None:
            names = [parameter.arg for parameter in (*function.args.posonlyargs, *function.args.args)]
            names = names[1:] if function is not called else names  # __init__ has self
        given = dict(zip(names, call.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        return {name: self.value(argument) for name, argument in given.items()}

    def _own(self, call: ast.Call) -> tuple[Module, ast.stmt] | None:
        """The function or class of ours that a call calls."""
        parts = _dotted(call.func)
        if not parts or parts[0] in self.bound or parts[0] in self.parameters:
            return None
        inner = [node for node in self.nodes if isinstance(node, FUNCTIONS) and parts == [node.name]]
        if len(inner) == 1 and inner[0] is not self.statement:
            return self.module, inner[0]
        found = self._find(parts)
        return found if found is not None and isinstance(found[1], (*FUNCTIONS, ast.ClassDef)) else None

    def _listed(self, call: ast.Call) -> list[str]:
        """Folders: `folder.iterdir()`, `os.listdir(folder)`."""
        if _last_name(call.func) not in LISTS:
            return []
        return self.value(call.args[0] if call.args and _is_from(call, "os") else getattr(call.func, "value", None))

    def _globbed(self, call: ast.Call) -> list[str]:
        """Patterns: `folder.glob(pattern)`, `glob.glob(pattern)`."""
        name = _last_name(call.func)
        if name not in GLOBS or not call.args:
            return []
        patterns = self.value(call.args[0])
        if _is_from(call, "glob"):
            return patterns
        folders = self.value(getattr(call.func, "value", None))
        between = "**" if name == "rglob" else ""
        return [os.path.join(folder, between, pattern) for folder in folders for pattern in patterns]

    def _joined(self) -> Iterator[str]:
        """Paths that are joined from parts; of nested ones, only the longest."""
        parts: set[ast.AST] = set()
        for node in self.nodes:  # outer ones first
            whole = isinstance(node, (ast.BinOp, ast.Call, ast.JoinedStr)) and node not in parts
            if whole and (found := self.value(node)):
                parts.update(ast.walk(node))
                yield from found

    # --- what a path is ---

    def _folder(self, node: ast.expr | None) -> list[str]:
        """The folder of a path whose end is not plain."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            return self.value(node.left) or self._folder(node.left)
        if isinstance(node, ast.Call) and _last_name(node.func) in JOINS | SAME:
            receiver = getattr(node.func, "value", None)
            starts = [receiver, *node.args] if _last_name(node.func) in {"joinpath", *SAME} else node.args
            return next((found for each in starts[:2] if (found := self.value(each) or self._folder(each))), [])
        if isinstance(node, ast.Name) and len(self.bound.get(node.id, ())) == 1:
            return self._folder(self.bound[node.id][0])
        if isinstance(node, ast.JoinedStr):
            first = node.values[0] if node.values else None
            if isinstance(first, ast.FormattedValue):
                return self.value(first.value)
            return [os.path.dirname(text) for text in self.value(first) if "/" in text]
        return []

    def value(self, node: ast.AST | None, depth: int = 0) -> list[str]:
        """The possible paths (or texts) of an expression; empty if they cannot be followed."""
        if depth > DEEPEST:
            return []
        match node:
            case ast.Constant(value=str(text)):
                return [] if text.startswith("/") else [text]
            case ast.Name(id="__file__"):
                return [str(self.module.file)]
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return [value for element in elements for value in self.value(element, depth + 1)]
            case ast.Name(id=name) if name in self.parameters and name not in self.bound:
                return [f"<{name}>"]
            case ast.Name() | ast.Attribute() if (name := ast.unparse(node)) in self.bound:
                return self._bound(name, depth)
            case ast.Attribute(value=inner, attr="parent"):
                return [os.path.dirname(value) for value in self.value(inner, depth + 1) if value[-1:] != ">"]
            case ast.Subscript(value=ast.Attribute(value=inner, attr="parents"), slice=ast.Constant(value=int(up))):
                values = [value for value in self.value(inner, depth + 1) if value.startswith("/")]
                return [_up(value, up + 1) for value in values]
            case ast.Name() | ast.Attribute() if parts := _dotted(node):
                return self._global(parts, depth)
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                return _each(os.path.join, self.value(left, depth + 1), self.value(right, depth + 1))
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._folded(str.__add__, [left, right], depth)
            case ast.JoinedStr(values=pieces):
                whole = [piece.value if isinstance(piece, ast.FormattedValue) else piece for piece in pieces]
                return self._folded(str.__add__, whole, depth)
            case ast.IfExp(body=one, orelse=other) | ast.BoolOp(values=[one, other]):
                return [*self.value(one, depth + 1), *self.value(other, depth + 1)]
            case ast.NamedExpr(value=inner):
                return self.value(inner, depth + 1)
            case ast.Call():
                return self._called(node, depth)
        return []

    def _bound(self, name: str, depth: int) -> list[str]:
        if len(self.bound[name]) != 1:
            return []
        bound = self.bound.pop(name)  # `path = Path(path)`
        try:
            found = self.value(bound[0], depth + 1)
        finally:
            self.bound[name] = bound
        return found if name not in self.parameters else [value for value in found if value.startswith(f"<{name}>")]

    def _called(self, node: ast.Call, depth: int) -> list[str]:
        name, receiver = _last_name(node.func), getattr(node.func, "value", None)
        if name in {"with_name", "with_suffix"} and receiver is not None and len(node.args) == 1:
            change = _renamed if name == "with_name" else _suffixed
            return _each(change, self.value(receiver, depth + 1), self.value(node.args[0], depth + 1))
        if name == "dirname" and node.args:
            return [os.path.dirname(value) for value in self.value(node.args[0], depth + 1) if value[-1:] != ">"]
        if name == "files" and len(node.args) == 1:
            return self._package(node.args[0])
        if name in PACKAGE_DATA and len(node.args) == 2:
            return _each(os.path.join, self._package(node.args[0]), self.value(node.args[1], depth + 1))
        if name in SAME:
            return self.value(node.args[0] if node.args else receiver, depth + 1)
        if name in JOINS and not node.keywords:
            before = [receiver] if name == "joinpath" and receiver is not None else []
            if name == "join" and (receiver is None or ast.unparse(receiver) not in {"os.path", "path"}):
                return []  # of texts
            return self._folded(os.path.join, [*before, *node.args], depth)
        return []

    def _package(self, node: ast.expr) -> list[str]:
        """The folder of a package that is named: `importlib.resources.files("package.data")`."""
        if isinstance(node, ast.Name) and node.id in {"__package__", "__name__"}:
            return [str(self.module.file.parent)]
        name = node.value if isinstance(node, ast.Constant) else ".".join(_dotted(node))
        module = self.reader.index.module(name) if isinstance(name, str) and name else None
        return [] if module is None else [str(module.file.parent)]

    def _folded(self, join: Callable[[str, str], str], nodes: list[ast.expr], depth: int) -> list[str]:
        found = self.value(nodes[0], depth + 1) if nodes else []
        for node in nodes[1:]:
            if join is str.__add__ and isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = [value + node.value for value in found]  # f"{folder}/name"
            else:
                found = _each(join, found, self.value(node, depth + 1))
        return found

    def _global(self, parts: list[str], depth: int) -> list[str]:
        """The value of a name at the top of this module or, imported, of another."""
        found = self._find(parts)
        if found is None and len(parts) > 1 and (owner := self._find(parts[:-1])) is not None:
            value = _constants(owner[1]).get(parts[-1])
            return self.reader.code(*owner).value(value, depth + 1)
        if found is None or found[1] is self.statement:
            return []
        module, statement = found
        value = statement.value if isinstance(statement, (ast.Assign, ast.AnnAssign)) else None
        return self.reader.code(module, statement).value(value, depth + 1) if value is not None else []

    def _find(self, parts: list[str]) -> tuple[Module, ast.stmt] | None:
        """The statement that binds a dotted name at the top of a module of ours; None unless there is exactly one."""
        module: Module | None = self.module
        for _ in range(DEEPEST):
            assert module is not None
            statements = module.bindings.get(parts[0], []) if len(parts) == 1 else []
            targets: list[Import] = module.imports.get(parts[0], [])
            if statements or len(targets) != 1:
                return (module, statements[0]) if len(statements) == 1 and not targets else None
            target, rest = targets[0], parts[1:]
            name = f"{target.module}.{target.name}" if target.name else target.module
            while (
                self.reader.index.module(name) is not None
                and len(rest) > 1
                and self.reader.index.module(f"{name}.{rest[0]}")
            ):
                name, rest = f"{name}.{rest[0]}", rest[1:]
            if self.reader.index.module(name) is not None and rest:
                module, parts = self.reader.index.module(name), rest
            elif target.name and (module := self.reader.index.module(target.module)) is not None:
                parts = [target.name, *rest]
            else:
                return None
        return None


def _entry(statement: ast.stmt) -> Function | None:
    """The function that runs when `statement`'s definition is called: itself, or a class's `__init__`."""
    if isinstance(statement, FUNCTIONS):
        return statement
    body = statement.body if isinstance(statement, ast.ClassDef) else []
    return next((each for each in body if isinstance(each, FUNCTIONS) and each.name == "__init__"), None)


def _fields(statement: ast.stmt) -> list[str]:
    """The fields of a dataclass (or of a NamedTuple) in order, which are its call's arguments."""
    body = statement.body if isinstance(statement, ast.ClassDef) and _entry(statement) is None else []
    return [each.target.id for each in body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)]


def _constants(statement: ast.stmt) -> dict[str, ast.expr]:
    """A class's attributes, and the defaults of its fields, by name."""
    found: dict[str, ast.expr] = {}
    for each in statement.body if isinstance(statement, ast.ClassDef) else []:
        if isinstance(each, ast.Assign):
            found |= {target.id: each.value for target in each.targets if isinstance(target, ast.Name)}
        elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.value is not None:
            found[each.target.id] = each.value
    return found


def _outputs(command: ast.List | ast.Tuple) -> Iterator[ast.expr]:
    """The arguments after `-o`, `--output` and similar options of a command, and the files of `tee`."""
    words = [each.value if isinstance(each, ast.Constant) else None for each in command.elts]
    for word, given in zip(words, command.elts[1:], strict=False):
        flag = word if isinstance(word, str) else ""
        if flag == "-o" or (flag.startswith("--") and flag[2:].startswith(MADE_KEYWORDS)):
            yield given
    if words[:1] == ["tee"]:
        yield from command.elts[1:]


def _parameters(function: Function | ast.Lambda) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def _changes_tables(node: ast.AST) -> bool:
    """Whether it is a text of SQL that does."""
    text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
    return text.lstrip().lower().startswith(SQL_WRITES)


def _put_in(paths: Iterable[str], given: dict[str, list[str]]) -> frozenset[str]:
    """Paths with a parameter's `<name>` replaced by its values."""
    return frozenset(
        os.path.normpath(path.replace(f"<{name}>", value))
        for path in paths
        for name, values in given.items()
        if f"<{name}>" in path
        for value in values
    )


def _named(keywords: dict[str, ast.expr], name: str) -> list[ast.expr]:
    return [keywords[name]] if name in keywords else []


def _unknown() -> ast.expr:
    return ast.Constant(None)


def _dotted(node: ast.AST) -> list[str]:
    """`a.b.c` -> [a, b, c]; empty for other expressions."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []


def _is_from(call: ast.Call, module: str) -> bool:
    """Whether it reads `module.function(...)`, or `function(...)` of an import."""
    parts = _dotted(call.func)
    return bool(parts) and parts[:-1] in ([], [module])


def _each(join: Callable[[str, str], str], left: list[str], right: list[str]) -> list[str]:
    return [join(one, other) for one in left for other in right]


def _renamed(path: str, name: str) -> str:
    return os.path.join(os.path.dirname(path), name)


def _suffixed(path: str, suffix: str) -> str:
    return os.path.splitext(path)[0] + suffix


def _up(path: str, folders: int) -> str:
    for _ in range(folders):
        path = os.path.dirname(path)
    return path


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
