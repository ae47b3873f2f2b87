"""A model found by what a user calls it: a folder, a run, a run's step, or the start of a digest."""

from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.storage import Store, open_store
from workflows.driver.settings import RunSettings
from workflows.graph.artifacts import Artifact, ArtifactSource, read_manifest
from workflows.graph.values import artifact_records
from workflows.runs.catalog import artifacts_of, find_steps, load_run


def find_model(name: str, settings: RunSettings) -> tuple[Path, str | None]:
    """(folder, weight version) of a model folder, a RUN, RUN:STEP, or the first 8 or more digits of a digest.

    Raises:
        UserError: `name` matches no model, or several.
    """
    if Path(name).is_dir():
        return Path(name), None
    if "/" in name and not name.startswith("s3://") and ":" not in name:
        raise UserError(f"{name}: no such folder")
    store = open_store(settings.store)
    source = ArtifactSource(store.url, settings.cache)
    found = {record["digest"]: record for record in _records(store, name)}
    models = {
        digest: artifact
        for digest, record in found.items()
        if _is_model(store, artifact := Artifact.from_record(record, source))
    }
    if len(models) != 1:
        what = ", ".join(f"{artifact.name} {digest[:12]}" for digest, artifact in models.items()) or "none"
        raise UserError(f"{name} names no single model (found {what}); give RUN:STEP or the first digits of a digest")
    [(digest, artifact)] = models.items()
    return artifact.path(), digest


def _records(store: Store, name: str) -> list[dict[str, Any]]:
    run_id, _, step = name.partition(":")
    known = set(store.folders("runs"))
    if run_id not in known and len(name) >= 8 and all(letter in "0123456789abcdef" for letter in name):
        views = [load_run(store, each) for each in known if store.exists(f"runs/{each}/run.json")]
        records = [record for view in views for each in view.steps for record in artifacts_of(each)]
        return [record for record in records if record["digest"].startswith(name)]
    view = load_run(store, run_id)
    if step:
        return [record for each in find_steps(view, step) for record in artifacts_of(each)]
    if view.result is None:
        raise UserError(f"run {run_id} is {view.status} and has no result yet; name a step: {run_id}:STEP")
    return artifact_records(view.result)


def _is_model(store: Store, artifact: Artifact) -> bool:
    names = {entry.path for entry in read_manifest(store, artifact)}
    return "config.json" in names and any(name.endswith(".safetensors") for name in names)
