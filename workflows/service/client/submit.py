"""`recua run --detach`: sends everything that a run needs to the service."""

import tempfile
from pathlib import Path
from typing import Any

from infra.config import read_text
from infra.errors import ConfigError, UserError
from infra.storage import open_store
from workflows.identity.names import split_target
from workflows.service.client.http_client import Client
from workflows.service.drivers import packages

Json = dict[str, Any]


def check_store(client: Client, given: str | None) -> str:
    """The service's store. Raises ConfigError if --store or RECUA_STORE names another one."""
    store = str(client.get("/service")["store"])
    if given is not None and open_store(given).url != store:
        raise ConfigError(f"--store {given}: the service keeps its runs in {store}; leave --store out")
    return store


def submit(client: Client, target: Path, recipe: str | None, overrides: tuple[str, ...], **given: Any) -> Json:
    """Package the working folder, send it, submit the workflow of FILE or FILE:NAME.

    {"run_id", "status", "package"}; `given`: run_id, new, rerun, store.

    Raises:
        UserError: `recua run` would refuse it too.
        ConfigError: the folder is too large, the service uses another store, or there is no service.
    """
    file, name = split_target(target)
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"workflow {file}: no such Python file")
    text = None if recipe is None else read_text(recipe)
    store = check_store(client, given.pop("store"))
    root = packages.working_folder(file)
    with tempfile.TemporaryDirectory(prefix="recua-") as folder:
        package = packages.build(root, Path(folder) / "package.zip", without=[Path(store)])
        if file.resolve().relative_to(root).as_posix() in package.left_out:
            raise UserError(f"workflow {file}: a package cannot hold this name (not UTF-8, or a backslash); rename it")
        client.send_package(package.file, package.sha256)
    body = {
        "package": package.sha256,
        "workflow_file": file.resolve().relative_to(root).as_posix() + ("" if name is None else f":{name}"),
        "recipe": text,
        "recipe_name": recipe or "recipe",
        "overrides": list(overrides),
        **given,
    }
    answer: Json = client.post("/runs", body)
    return {**answer, "package": package}
