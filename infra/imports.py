"""Imports by computed names, limited to the standard library."""

import importlib
import sys
from types import ModuleType


def import_standard(name: str) -> ModuleType:
    """Import a module of Python's standard library by a name that is only known at run time.

    A step's fingerprint cannot see what `importlib.import_module` imports, so it must include every module beside it.
    This function never imports code of ours, so Python's version is enough.

    Raises:
        ValueError: the standard library has no module of that name.
        ImportError: this Python was built without the module.
    """
    if name.partition(".")[0] not in sys.stdlib_module_names:
        raise ValueError(f"{name} is not a module of Python's standard library")
    return importlib.import_module(name)
