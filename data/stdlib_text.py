"""Text that every machine has: Python's own standard library, for pretraining and as simple instructions.

There are three kinds of documents: whole source files, single docstrings with their signature, and help texts (compiled
functions and the topics of `help()`). Nothing is downloaded, and source files are read, not run. Documents are ordered
by a hash of their names, so that a size cap takes an even sample that does not depend on the file system. The text is
that of the running Python version.
"""

import ast
import hashlib
import inspect
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.config import CorpusSettings
from data.permutation import key_of
from data.tasks.problem import Split, side_of
from data.tasks.stdlib import MODULES, public_names
from infra.errors import DataError
from infra.imports import import_standard

_SKIPPED_FOLDERS = (
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"),
    *("encodings", "pydoc_data", "turtledemo", "__pycache__"),
)
"""Tests, folders that do not belong to the library, and tables that are hardly text."""

_TOO_SHORT = 40  # characters; a shorter docstring teaches little


@dataclass(frozen=True)
class Document:
    """One piece of text, e.g. Document("json/decoder.py", "source", '"Implementation of JSONDecoder"...')."""

    name: str
    kind: str  # "source" | "docstring" | "help"
    text: str


def stdlib_documents(settings: CorpusSettings) -> list[Document]:
    """Documents of the wanted kinds, together at most `settings.stdlib_bytes` long, in a fixed mixed order.

    Each kind gets an equal part of the bytes if it has enough text, because source files alone would drown the rest. A
    document that no longer fits is left out; none is cut.

    Raises:
        DataError: this Python has no source files of its library.
    """
    parts = [part for part in ("help", "docstring", "source") if part in settings.stdlib_parts]
    chosen: list[Document] = []
    left = settings.stdlib_bytes
    readers = {"help": _help_documents, "docstring": _docstring_documents, "source": _source_documents}
    for waiting, part in zip(range(len(parts), 0, -1), parts, strict=True):
        budget = left // waiting  # bytes that a small part does not use go to the parts after it
        taken = _take(readers[part](), budget)
        chosen += taken
        left -= sum(len(document.text.encode()) for document in taken)
    return sorted(chosen, key=lambda document: key_of(f"{document.kind} {document.name}"))


def stdlib_instructions(split: Split, settings: CorpusSettings | None = None) -> list[dict[str, Any]]:
    """Instruction rows such as "What does os.path.basename do?" -> "Returns the final component of a pathname".

    One per public function or class of the modules in `data.tasks.stdlib.MODULES` whose docstring starts with a short
    sentence; task_type "stdlib/docstring". A hash of the name decides the split. Sorted by a hash, so that any prefix
    is a sample.
    """
    longest = (settings or CorpusSettings()).instruction_chars
    rows: list[tuple[str, dict[str, Any]]] = []
    for full_name, value in _public_objects():
        line = _first_line(value)
        if side_of("stdlib/docstring", full_name) != split or not 10 <= len(line) <= longest:
            continue
        question = {"role": "user", "content": f"What does {full_name} do?"}
        answer = {"role": "assistant", "content": line}
        rows.append((full_name, {"messages": [question, answer], "task_type": "stdlib/docstring"}))
    return [row for _, row in sorted(rows, key=lambda item: key_of(item[0]))]


def is_held_out(text: str, share: float) -> bool:
    """Whether a pretraining document is held out. Its text alone decides, so that copies stay together."""
    return held_out_rank(text) < share * 2**64


def held_out_rank(text: str) -> int:
    """A document's rank in [0, 2^64): documents of low rank are held out."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _take(documents: Iterator[Document], budget: int) -> list[Document]:
    """The documents that fit into `budget` bytes, in order."""
    taken: list[Document] = []
    for document in documents:
        if budget < _TOO_SHORT:
            break
        size = len(document.text.encode())
        if size <= budget:
            taken.append(document)
            budget -= size
    return taken


def _source_documents() -> Iterator[Document]:
    for name, text in _library_files():
        yield Document(name, "source", text)


def _library_files() -> Iterator[tuple[str, str]]:
    """(relative path, text) of every source file of the library, in hash order."""
    root = _library_folder()
    for relative in sorted(_source_files(root), key=key_of):
        try:
            with tokenize.open(root / relative) as file:
                yield relative, file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):  # skip an unreadable file
            continue


def _library_folder() -> Path:
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise DataError(f"{root}: this Python has no library sources; set corpus.stdlib_bytes=0 and corpus.files")
    return root


def _source_files(root: Path) -> Iterator[str]:
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        of_this_machine = path.name.startswith(("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize"))
        if not of_this_machine and not set(_SKIPPED_FOLDERS) & set(parts) and path.stat().st_size > 0:
            yield "/".join(parts)


def _docstring_documents() -> Iterator[Document]:
    for name, text in _library_files():
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # written for another Python version
            continue
        yield from _docstrings_of(name, tree)


def _docstrings_of(file_name: str, tree: ast.Module) -> list[Document]:
    found: list[Document] = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= _TOO_SHORT:
                found.append(Document(name, "docstring", f"{_heading(node, name)}\n{docstring.strip()}\n"))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}")

    visit(tree, file_name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    return found


def _heading(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{name}({ast.unparse(node.args)})"
    return name


def _help_documents() -> Iterator[Document]:
    """Signatures and docstrings of compiled functions (math.sin, ...), and the topics of Python's own `help()`."""
    documents = [*_compiled_help(), *_help_topics()]
    yield from sorted(documents, key=lambda document: key_of(document.name))


def _compiled_help() -> Iterator[Document]:
    for full_name, value in _public_objects():
        if inspect.isfunction(value) or (inspect.isclass(value) and not _is_compiled(value)):
            continue
        docstring = _own_docstring(value)
        if len(docstring) >= _TOO_SHORT:
            signature = getattr(value, "__text_signature__", None) or ""
            signature = signature.replace("($module, ", "(").replace("($module)", "()")
            yield Document(full_name, "help", f"{full_name}{signature}\n{docstring}\n")


def _help_topics() -> Iterator[Document]:
    """The language reference behind `help("if")`, one dictionary in Python's library; some installations lack it."""
    path = _library_folder() / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                yield Document(f"help {topic}", "help", f"{text.strip()}\n")


def _is_compiled(value: type) -> bool:
    try:
        return not inspect.getsourcefile(value)
    except (TypeError, OSError):
        return True


def _public_objects() -> Iterator[tuple[str, Any]]:
    for module_name in MODULES.split():
        try:
            module = import_standard(module_name)
        except ImportError:
            continue
        for name, _ in public_names(module):
            yield f"{module_name}.{name}", getattr(module, name)


def _own_docstring(value: Any) -> str:
    """The object's docstring, cleaned; "" if a class only inherits one."""
    docstring = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    return inspect.cleandoc(docstring).strip() if isinstance(docstring, str) else ""


def _first_line(value: Any) -> str:
    """The docstring's first sentence on one line; "" if it is a signature, is cut off or contains an address."""
    docstring = _own_docstring(value)
    line = " ".join(docstring.split("\n\n")[0].split())
    line = re.split(r"(?<=[a-z)])\.(?: |$)", line)[0].rstrip(".")
    if re.match(r"[\w.]+\(", line) or " at 0x" in line or line.endswith((":", ",", "...")):
        return ""
    return line
