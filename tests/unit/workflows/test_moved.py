"""Modules that moved: what stores call them stays, and scripts of earlier versions still find them."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from actors.pretrain.config import PretrainSettings
from workflows.graph.values import decode, encode
from workflows.graph.waits import Approval
from workflows.identity.moved import MOVED, place_of, stored_name
from workflows.identity.names import canonical_name, load_name
from workflows.recipes.settings import Recipe
from workflows.recipes.text import Limits


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (Approval, "workflows.waits:Approval"),
        (Recipe, "workflows.recipe:Recipe"),
        (Limits, "workflows.steps.text:Limits"),
        (PretrainSettings, "actors.config:PretrainSettings"),
    ],
)
def test_what_a_store_holds_keeps_its_name(thing: type, name: str) -> None:
    assert canonical_name(thing) == name and load_name(name) is thing
    assert load_name(place_of(name)) is thing, "a name by its place is found too"


def test_every_moved_name_leads_somewhere_and_back() -> None:
    for before, now in MOVED.items():
        if ":" in before:
            assert stored_name(place_of(before)) == before and load_name(before).__module__ == now.partition(":")[0]
        else:
            assert import_module(before) is import_module(now)
            assert stored_name(place_of(f"{before}:anything")) == f"{before}:anything"


def test_settings_are_stored_as_earlier_versions_did() -> None:
    tree = encode(PretrainSettings(steps=70))
    assert tree["$settings"] == "actors.config:PretrainSettings" and decode(tree) == PretrainSettings(steps=70)


def test_a_script_of_an_earlier_version_imports_what_it_did(repository: Path) -> None:
    """Also first of all, and each module once."""
    script = (
        "from workflows.waits import approval\nimport workflows.steps.training\nfrom workflows.steps import text\n"
        "import workflows.recipes.text, workflows.graph.waits\n"
        "assert text is workflows.recipes.text and approval is workflows.graph.waits.approval"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=repository)
