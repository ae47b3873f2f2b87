"""The present places of modules whose earlier names are in stores and in users' scripts.

Stored names do not change: `workflows.waits:approval` in a store stays valid, and new runs write the same name, so that
unfinished runs resume and equal calls are found by their keys. A script for an earlier version imports by the earlier
name.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "actors.config": "actors.posttrain.config",
    "actors.config:GeneratorPoolSettings": "actors.pools.config:GeneratorPoolSettings",
    "actors.config:LearnerPoolSettings": "actors.pools.config:LearnerPoolSettings",
    "actors.config:PretrainSettings": "actors.pretrain.config:PretrainSettings",
    "workflows.recipe": "workflows.recipes.settings",
    "workflows.steps": "workflows.recipes",
    **{
        f"workflows.steps.{name}": f"workflows.recipes.{name}"
        for name in ("amounts", "checks", "evaluation", "inputs", "sampling", "text", "training")
    },
    "workflows.waits": "workflows.graph.waits",
}
"""Name of a module, or of one definition in it, in stores and older scripts -> its present place."""
STORED_AS = {now: before for before, now in MOVED.items()}


def place_of(name: str) -> str:
    """The present place of a stored `module:qualname`."""
    return _renamed(name, MOVED)


def stored_name(name: str) -> str:
    """The name of a `module:qualname` in stores."""
    return _renamed(name, STORED_AS)


def _renamed(name: str, names: dict[str, str]) -> str:
    module, _, qualname = name.partition(":")
    return names.get(name) or f"{names.get(module, module)}:{qualname}"


class MovedFinder:
    """Imports a moved module by its earlier name: the same module, not a second one."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, cls()) if name in MOVED else None  # type: ignore[arg-type]  # importlib.abc is dear

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


if MovedFinder not in sys.meta_path:
    sys.meta_path.insert(0, MovedFinder)  # first: a package by its earlier name must not find its modules itself
