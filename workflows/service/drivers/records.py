"""What the service keeps in the store, and nowhere else.

packages/<sha256>.zip         code packages
runs/<run>/submission.json    what was submitted: package, workflow file, recipe, overrides
runs/<run>/driver/<n>.log     what the run's drivers printed
service/active/<run>          the run is to be driven to its end: written by a submission or a resume, gone when the
                              run has ended or is cancelled. Whichever service finds it goes on with the run
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
    """What was submitted.

    Raises:
        UserError: there is no such run, or nobody submitted it.
    """
    raw = store.get(submission_key(run_id))
    if raw is None:
        if not store.exists(f"runs/{run_id}/run.json"):
            raise UserError(f"no run {run_id!r} in {store.url}")
        raise UserError(f"run {run_id} was not submitted to a service; go on with `recua resume {run_id}`")
    record: Record = json.loads(raw)
    return record


def activate(store: Store, run_id: str, after: int) -> None:
    """Have the run driven to an end later than journal slot `after`, by whichever service sees this first."""
    store.put(active_key(run_id), json.dumps({"after": after}).encode())


def deactivate(store: Store, run_id: str) -> None:
    store.delete(active_key(run_id))


def active_runs(store: Store) -> list[str]:
    return [key.rpartition("/")[2] for key in store.list(active_key("").rstrip("/"))]


def active_after(store: Store, run_id: str) -> int | None:
    """The journal slot after which the run is to end, None where it is not active."""
    raw = store.get(active_key(run_id))
    return None if raw is None else int(json.loads(raw)["after"])
