"""Stores written by the real Journal, for the tests of the page and its data."""

import json
import time
from typing import Any

from infra.storage import Store
from tests.helpers.stored_records import Json, append
from workflows.runs.journal import Journal

ZERO = 1_700_000_000.0
"""When a synthetic run was created, in seconds since the epoch."""
CODE = "c0de" * 16


def artifact(digest: str, name: str, location: str = "") -> Json:
    """An artifact's record in a result; `digest` is padded to 64 letters."""
    return {
        "$artifact": {"digest": full(digest), "name": name, "location": location or f"somewhere/{digest}", "meta": {}}
    }


def full(digest: str) -> str:
    return digest.ljust(64, "0")


def open_run(store: Store, run_id: str, recipe: Any = None, created: float = ZERO) -> Journal:
    """A run's metadata and its journal, the lease taken by this process."""
    tree = {"args": [] if recipe is None else [recipe], "kwargs": {}}
    metadata = {"format": 1, "run_id": run_id, "workflow": "recipes.demo:demo", "recipe": tree, "recipe_hash": "x"}
    metadata |= {"created": created, "reuse": True, "rerun": []}
    assert store.put_if_absent(f"runs/{run_id}/run.json", json.dumps(metadata).encode())
    return Journal.acquire(store, run_id)


def start(call: str, step: str = "recipes.demo:train", attempt: int = 1, at: float = ZERO, **more: Any) -> Json:
    head = {"type": "start", "call": call, "step": step, "attempt": attempt, "attempt_id": f"{call}-{attempt}"}
    return {**head, "time": at, **more}


def commit(
    call: str, step: str = "recipes.demo:train", at: float = ZERO, seconds: float = 1.0, result: Any = None, **more: Any
) -> Json:
    head = {"type": "commit", "call": call, "step": step, "key": f"key of {call}", "code": CODE, "inputs": "i" * 64}
    times = {"started": at, "ended": at + seconds, "seconds": seconds, "node": "node-a", "attempt": 1}
    given = {"args": [1], "kwargs": {}}
    return {**head, "arguments": given, "result": result, **times, "attempt_id": f"{call}-1", **more}


def failure(call: str, message: str, final: bool, attempt: int = 1, at: float = ZERO, trace: str = "") -> Json:
    error = {"kind": "user", "type": "ValueError", "message": message, "traceback": trace}
    head = {"type": "attempt-failed", "call": call, "step": "recipes.demo:train", "attempt": attempt}
    return {**head, "attempt_id": f"{call}-{attempt}", "error": error, "final": final, "time": at}


def end(status: str = "finished", at: float = ZERO, **more: Any) -> Json:
    return {"type": "end", "status": status, "time": at, **more}


def chains(store: Store, run_id: str, chains: int = 100, length: int = 100, finished: bool = True) -> Journal:
    """A run of `chains` x `length` committed calls, each needing the one before it in its chain; two nodes. A slot has
    the commits of one link of all chains, and the starts of the next."""
    journal = open_run(store, run_id, created=time.time() - length - 60)
    began = time.time() - length - 60
    for link in range(length):
        at = began + link
        records = []
        for chain in range(chains):
            call = f"chain[{chain}]/link[{link}]"
            needs = {"needs": [f"chain[{chain}]/link[{link - 1}]"]} if link else {}
            node = {"node": f"node-{chain % 2}"}
            records.append(start(call, "recipes.demo:link", at=at + chain / 200, **needs))
            records.append(commit(call, "recipes.demo:link", at + chain / 200, 0.5, link, **needs, **node))
        append(journal, records)
    if finished:
        append(journal, [end(at=began + length, result=None)])
    return journal
