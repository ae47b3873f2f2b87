"""An environment for the programs that recua is measured against, apart from recua's own: their pins collide."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements" / "bench.txt"
FOLDER = ROOT / ".venv-peers"


def peers_python(say: str = "bench: making an environment for the peers, once (a few minutes of downloads)") -> Path:
    """The peers' Python, installed from requirements/bench.txt into .venv-peers when it is missing or out of date.

    Raises:
        RuntimeError: it cannot be installed; pip's last words are in the message.
    """
    python = FOLDER / "bin" / "python"
    stamp = FOLDER / ".installed"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(say, file=sys.stderr, flush=True)
    install = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-r", str(REQUIREMENTS)]
    for command in ([sys.executable, "-m", "venv", str(FOLDER)], install):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-500:]}")
    stamp.write_text(wanted)
    return python


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
