"""ray_cluster.yaml passes Ray's own checks, and its set-up commands work on a copy of this tree."""

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture(scope="module")
def cluster(repository: Path) -> dict[str, Any]:
    """The file as Ray sees it: defaults filled in."""
    from ray.autoscaler._private.util import prepare_config

    config: dict[str, Any] = prepare_config(yaml.safe_load((repository / "ray_cluster.yaml").read_text()))
    return config


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(cluster)
    broken = {**cluster, "max_workers": "many"}
    with pytest.raises(Exception, match="many"):
        validate_config(broken)


def test_the_head_is_on_demand_and_runs_no_steps_and_workers_are_spot(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert types["head"]["resources"]["CPU"] == 0
    workers = [types[name]["node_config"] for name in types if name != "head"]
    assert all(worker["InstanceMarketOptions"]["MarketType"] == "spot" for worker in workers)
    assert len({worker["InstanceType"] for worker in workers}) == len(workers) >= 3
    assert len(cluster["provider"]["availability_zone"].split(",")) >= 3
    for node_type in types.values():
        packages = yaml.safe_load(node_type["node_config"]["UserData"])["bootcmd"]
        assert any("rsync" in command and "python3-venv" in command for command in packages)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_set_up_commands_run(cluster: dict[str, Any], repository: Path, tmp_path: Path) -> None:
    """Twice, as Ray does after a restart, with bash and a HOME of its own, on the tracked files at ~/recua.

    The virtual environment there is new and the Makefile fills it; what is installed in this Python is visible in it,
    so that pip finds every pin satisfied and only recua itself is built and installed.
    """
    home = tmp_path / "home"
    copy = home / "recua"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=repository, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if (repository / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repository / name, copy / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", copy / ".venv"], check=True)
    [inside] = copy.glob(".venv/lib/python*/site-packages")
    (inside / "shared.pth").write_text(site.getsitepackages()[0] + "\n")
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "PYTHON": sys.executable, **kept}
    for _ in range(2):
        for command in cluster["setup_commands"]:
            done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=100)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "recua 0." in done.stdout
    assert (home / ".profile").read_text().count("recua/.venv/bin") == 1
    found = subprocess.run(["bash", "-lc", "command -v recua"], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == str(copy / ".venv/bin/recua")
    where = "import workflows; print(workflows.__file__)"
    loaded = subprocess.run([copy / ".venv/bin/python", "-c", where], capture_output=True, text=True, cwd=tmp_path)
    assert loaded.stdout.strip() == str(copy / "workflows/__init__.py")
    again = subprocess.run(["make", "-C", copy, "venv"], env=environment, capture_output=True, text=True)
    assert "==>" not in again.stdout  # nothing left to do
