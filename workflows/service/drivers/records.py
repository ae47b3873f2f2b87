"""The service's own data, all of it in the store.

packages/<sha256>.zip         code packages
runs/<run>/submission.json    the submission: package, workflow file, recipe, overrides
runs/<run>/driver/<n>.log     the output of the run's drivers
service/active/<run>          marks a run that a service must drive to its end: written by a submission or a resume,
                              removed when the run ends or is cancelled. Any service that finds it resumes the run
"""

import json
from typing import Any

from infra.errors import UserError
from infra.storage import Store
from workflows.runs.catalog import active_key, submission_key

FORMAT = 1
Record = dict[str, Any]


def log_key(run_id: str, number: int) -> str:
    return f"runs/{run_id}/driver/{number:06d}.log"


def read_submission(store: Store, run_id: str) -> Record:
    """A run's submission.

    Raises:
        UserError: there is no such run, or it was not submitted.
    """
    raw = store.get(submission_key(run_id))
    if raw is None:
        if not store.exists(f"runs/{run_id}/run.json"):
            raise UserError(f"no run {run_id!r} in {store.url}")
        raise UserError(f"run {run_id} was not submitted to a service; resume it with `recua resume {run_id}`")
    record: Record = json.loads(raw)
    return record


def activate(store: Store, run_id: str, after: int) -> None:
    """Let a service drive the run to an end later than journal slot `after`."""
    store.put(active_key(run_id), json.dumps({"after": after}).encode())


def deactivate(store: Store, run_id: str) -> None:
    store.delete(active_key(run_id))


def active_runs(store: Store) -> list[str]:
    return [key.rpartition("/")[2] for key in store.list(active_key("").rstrip("/"))]


def active_after(store: Store, run_id: str) -> int | None:
    """The journal slot after which an active run must end; None if the run is not active."""
    raw = store.get(active_key(run_id))
    return None if raw is None else int(json.loads(raw)["after"])
