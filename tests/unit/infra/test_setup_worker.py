"""Worker processes start in their runtime environment as Ray's own script starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from infra import setup_worker
from infra.ray_internals import quick_starts

OWN = Path(ray.__file__).parent / "_private" / "workers" / "setup_worker.py"
PLAIN = {
    "command_prefix": [],
    "env_vars": {"GREETING": "${WHO} and ${NOBODY_IS_CALLED_SO}", "EMPTY": ""},
    "py_executable": sys.executable,
    "override_worker_entrypoint": None,
    "java_jars": [],
}
WORKER = """
import json, os, sys
print(json.dumps([sys.argv, os.environ["GREETING"], os.environ["EMPTY"], os.environ.get("CONTAINER"), sys.executable]))
"""


def started(script: Path, context: dict[str, Any], folder: Path) -> list[Any]:
    """What a worker sees of its start. Ray's own script lies beside the worker's."""
    (folder / "default_worker.py").write_text(WORKER)
    (folder / "setup_worker.py").write_text(OWN.read_text())
    told = ["--language=PYTHON", f"--serialized-runtime-env-context={json.dumps(context)}"]
    command = [sys.executable, str(script), "-s", str(folder / "default_worker.py"), "--node-ip-address=::1", *told]
    done = subprocess.run(command, env={**os.environ, "WHO": "ann"}, capture_output=True, text=True, check=True)
    seen: list[Any] = json.loads(done.stdout)
    return seen


@pytest.mark.parametrize(
    "more", [{}, {"command_prefix": ["export", "CONTAINER=yes", "&&"]}], ids=["plain", "container"]
)
def test_a_worker_starts_as_with_rays_own_script(more: dict[str, Any], tmp_path: Path) -> None:
    context = {**PLAIN, **more}
    found = started(Path(setup_worker.__file__), context, tmp_path)
    assert found == started(OWN, context, tmp_path)
    assert (
        found[0][1:] == ["--node-ip-address=::1"] and found[1] == "ann and " and found[3] == ("yes" if more else None)
    )
    assert setup_worker.is_plain(context) == (not more)


def test_a_ray_that_starts_within_gets_the_script_and_a_later_one_rays_own() -> None:
    constants = ray._private.ray_constants
    with quick_starts(ray):
        folder = Path("/somewhere") / constants.SETUP_WORKER_FILENAME
        assert folder == Path(setup_worker.__file__) and folder.name == OWN.name, "a raylet leaves it out by that name"
    assert OWN.name == constants.SETUP_WORKER_FILENAME
