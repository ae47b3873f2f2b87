"""Questions about Python's standard library, answered by introspection of a fixed list of modules.

All listed modules exist in Python 3.11 to 3.13. A name's split depends on the name alone, so that a name that only one
version has changes no other name's split.
"""

import inspect
from random import Random
from types import ModuleType

from data.config import TaskSettings
from data.tasks.problem import Draw, TaskKind
from infra.imports import import_standard

MODULES = """
ast base64 bisect calendar cmath codecs collections configparser contextlib copy csv datetime decimal difflib dis
email.utils enum fileinput fnmatch fractions functools getopt getpass gettext glob gzip hashlib heapq html
http.client imaplib inspect io ipaddress itertools json keyword linecache locale logging math mimetypes netrc
operator os os.path pathlib pickle pkgutil platform plistlib pprint queue random re reprlib sched secrets select
selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 statistics string struct subprocess
sysconfig tarfile tempfile textwrap threading time timeit token tokenize traceback types unicodedata unittest
urllib.parse urllib.request uuid warnings wave weakref webbrowser zipfile zlib
"""


def kinds(settings: TaskSettings) -> list[TaskKind]:
    """The stdlib/* kinds. Names are looked up once per call of this function, at the first draw."""
    names: dict[str, list[str]] = {}

    def pool(kind: str) -> list[str]:
        if not names:
            names.update(_sorted_names())
        return names[kind]

    def module_of(rng: Random) -> Draw:
        module, name = rng.choice(pool("function")).split(":")
        return Draw(name, f"Which module has {name}?", module)

    def kind_of(rng: Random) -> Draw:
        kind = rng.choice(("class", "function"))
        name = rng.choice(pool(kind)).split(":")[1]
        return Draw(name, f"Is {name} a class or a function?", kind)

    return [TaskKind("stdlib/module_of", module_of), TaskKind("stdlib/kind_of", kind_of)]


def _sorted_names() -> dict[str, list[str]]:
    """ "module:name" of every public function and class that exactly one listed module exports, sorted."""
    owners: dict[str, list[tuple[str, str]]] = {}
    for module_name in MODULES.split():
        try:
            module = import_standard(module_name)
        except ImportError:  # this Python was built without it (sqlite3 on some machines)
            continue
        for name, kind in public_names(module):
            owners.setdefault(name, []).append((module_name, kind))
    found: dict[str, list[str]] = {"class": [], "function": []}
    for name, places in sorted(owners.items()):
        if len(places) == 1:
            module_name, kind = places[0]
            found[kind].append(f"{module_name}:{name}")
    return found


def public_names(module: ModuleType) -> list[tuple[str, str]]:
    """(name, "function" | "class") of what the module exports: its `__all__`, or what it defines itself."""
    exported = getattr(module, "__all__", None)
    found = []
    for name in sorted(exported if exported is not None else dir(module)):
        value = getattr(module, name, None)
        if name.startswith("_") or (exported is None and not _is_own(module, value)):
            continue
        if inspect.isclass(value):
            found.append((name, "class"))
        elif inspect.isroutine(value):
            found.append((name, "function"))
    return found


def _is_own(module: ModuleType, value: object) -> bool:
    home = getattr(value, "__module__", None) or ""
    return home.lstrip("_").split(".")[0] == module.__name__.split(".")[0]
