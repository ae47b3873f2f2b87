"""An environment for the programs that recua is measured against, apart from recua's own: their pins collide."""

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


def peers_python(say: str = "bench: making an environment for the peers, once (a few minutes of downloads)") -> Path:
    """The peers' Python, installed from requirements/bench.txt into .venv-peers when it is missing or out of date.

    Raises:
        RuntimeError: it cannot be installed; pip's last words are in the message.
    """
    python, wanted = FOLDER / "bin" / "python", REQUIREMENTS / "bench.txt"
    make = [sys.executable, "-m", "venv", str(FOLDER)]
    _install(FOLDER / ".installed", wanted, [make, [str(python), *PIP, "-r", str(wanted)]], say)
    return python


def torchft_folder(say: str = "bench: installing torchft into .venv-peers, once") -> Path:
    """A folder for PYTHONPATH that holds torchft (requirements/torchft.txt) for recua's own Python, torch and so on.

    Raises:
        RuntimeError: it cannot be installed; pip's last words are in the message.
    """
    wanted = REQUIREMENTS / "torchft.txt"
    install = [sys.executable, *PIP, "--no-deps", "--upgrade", "--target", str(TORCHFT), "-r", str(wanted)]
    _install(TORCHFT / ".installed", wanted, [install], say)
    return TORCHFT


def _install(stamp: Path, wanted: Path, commands: Sequence[Sequence[str]], say: str) -> None:
    """Run `commands` unless `stamp` says that this was done for the same requirements."""
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
    """What Prefect needs: a home that exists, its own database, time to start, nothing reported."""
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
