"""Environments for the programs that recua is compared with, apart from recua's own because their pins conflict."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
FOLDER = ROOT / ".venv-peers"
TORCHFT = FOLDER / "beside-recua"
PIP = ("-m", "pip", "install", "-qq", "--disable-pip-version-check")


def peers_python() -> Path:
    """The peers' Python, installed from requirements/bench.txt into .venv-peers if it is missing or out of date.

    Raises:
        RuntimeError: it cannot be installed; the message ends with pip's last output.
    """
    python, wanted = FOLDER / "bin" / "python", REQUIREMENTS / "bench.txt"
    make = [sys.executable, "-m", "venv", str(FOLDER)]
    say = "bench: creating an environment for the peers, once (a few minutes of downloads)"
    _install(FOLDER / ".installed", wanted, [make, [str(python), *PIP, "-r", str(wanted)]], say)
    return python


def torchft_folder() -> Path:
    """A folder for PYTHONPATH with torchft (requirements/torchft.txt), which uses recua's own Python and torch.

    Raises:
        RuntimeError: it cannot be installed; the message ends with pip's last output.
    """
    wanted = REQUIREMENTS / "torchft.txt"
    install = [sys.executable, *PIP, "--no-deps", "--upgrade", "--target", str(TORCHFT), "-r", str(wanted)]
    _install(TORCHFT / ".installed", wanted, [install], "bench: installing torchft into .venv-peers, once")
    return TORCHFT


def _install(stamp: Path, wanted: Path, commands: Sequence[Sequence[str]], say: str) -> None:
    """Run `commands` unless `stamp` shows that they were run for the same requirements."""
    digest = hashlib.sha256(wanted.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    print(say, file=sys.stderr, flush=True)
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-500:]}")
    stamp.write_text(digest)


def prefect_environment(folder: Path) -> dict[str, str]:
    """Environment variables for Prefect: an existing home, its own database, time to start, no telemetry."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    return {
        **kept,
        "HOME": str(folder),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "ERROR",
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
