"""Driver processes: they outlive the service, which finds them again by process id and start time.

Each run has a folder on the head node: `package.zip`, `code/` (unpacked), `task.json`, `driver.json` (the process) and
`outcome.json` (written by the driver at its end). All of it can be recreated from the store.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra.code_root import code_root
from infra.processes import process_start
from infra.storage import Store
from infra.storage.files import write_text
from workflows.service.drivers.packages import package_key, unpack

Record = dict[str, Any]
SET_BY_RAY = (
    "RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_NODE_ID", "RAY_WORKER_ID", "RAY_LD_PRELOAD", "RAY_CLIENT_MODE", "RAY_ADDRESS",
    "RAY_JOB_CONFIG_JSON_ENV_VAR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONBREAKPOINT", "SPT_NOENV",
    "RECUA_TOKEN", "RECUA_STORE",
)  # fmt: skip
"""Environment variables of the service's own worker process that a driver must not inherit."""
BACKGROUND = 'log=$1; shift; "$@" >>"$log" 2>&1 & echo $!'
"""Detaches the driver from its parent, because Ray kills the children of a worker process that it ends."""


@dataclass(frozen=True)
class Process:
    """A process of this machine."""

    pid: int
    start: str

    def alive(self) -> bool:
        return process_start(self.pid) == self.start

    def kill(self) -> None:
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def fill(folder: Path, store: Store, sha256: str, task: Record) -> None:
    """Create a new folder with the code and the task, without files of an earlier driver."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store.download_file(package_key(sha256), folder / "package.zip", sha256)
    unpack(folder / "package.zip", folder / "code")
    write_text(folder / "task.json", json.dumps(task))


def environment(folder: Path) -> dict[str, str]:
    """The driver's environment: the package's code comes first; this recua's own is used if the package has none."""
    kept = {name: value for name, value in os.environ.items() if name not in SET_BY_RAY}
    own = code_root()
    paths = [str(folder / "code"), *([] if "-packages" in own.name else [str(own)])]
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in paths]
    return {**kept, "PYTHONPATH": os.pathsep.join([*paths, *inherited]), "PYTHONUNBUFFERED": "1"}


def check(folder: Path, timeout_s: float = 300.0) -> Record:
    """Run the check of a submission in its folder; its outcome.

    Raises:
        subprocess.TimeoutExpired: it took too long (it is killed).
    """
    command = [sys.executable, "-m", "workflows.service.drivers.driver_process", "check", str(folder)]
    with (folder / "check.log").open("wb") as log:
        subprocess.run(
            command,
            cwd=folder / "code",
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )
    outcome = read(folder / "outcome.json")
    if outcome is None:
        tail = (folder / "check.log").read_text(errors="replace").strip().splitlines()[-1:]
        return {"error": f"the check of the submission ended without an outcome: {' '.join(tail)}", "kind": "fault"}
    return outcome


def start(folder: Path, log: Path, number: int) -> Process:
    """Start a driver in a session of its own, its output appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    (folder / "outcome.json").unlink(missing_ok=True)
    driver = [sys.executable, "-m", "workflows.service.drivers.driver_process", "run", str(folder)]
    shell = subprocess.run(
        ["/bin/sh", "-c", BACKGROUND, "sh", str(log), *driver],
        cwd=folder / "code",
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
        check=True,
    )
    pid = int(shell.stdout)
    process = Process(pid, process_start(pid) or "")
    write_text(folder / "driver.json", json.dumps({**asdict(process), "number": number}))
    return process


def started(folder: Path) -> tuple[Process, int] | None:
    """The driver that a service on this machine last started in this folder, and its number."""
    found = read(folder / "driver.json")
    return None if found is None else (Process(found["pid"], found["start"]), int(found["number"]))


def read(file: Path) -> Record | None:
    """A JSON object that a process wrote; None if it did not."""
    try:
        tree: Record = json.loads(file.read_text())
        return tree
    except (OSError, ValueError):
        return None
