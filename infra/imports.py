"""Imports of computed names, kept to what they may mean."""

import importlib
import sys
from types import ModuleType


def import_standard(name: str) -> ModuleType:
    """Import a module of Python's standard library by a name that is only known at run time.

    Fingerprints of steps cannot see what `importlib.import_module` brings in and must count every neighbour as reached;
    what this function brings in is never ours, and counts by Python's version.

    Raises:
        ValueError: the name is not the standard library's.
        ImportError: this Python was built without it.
    """
    if name.partition(".")[0] not in sys.stdlib_module_names:
        raise ValueError(f"{name} is no module of Python's standard library")
    return importlib.import_module(name)
