"""Checks of an endpoint before its model is loaded."""

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path

import psutil
import ray

from engines.chat import own_template
from engines.hf_folder import refuse_parts
from infra.errors import CheckpointError, ResourceError
from infra.machine import hold_port
from serving.config import ServingSettings

PROCESS_OVERHEAD_GIB = 1.0
"""Memory of a CPU replica's two processes beside weights and cache."""


def check_model_folder(folder: Path) -> None:
    """Raises CheckpointError unless `folder` has a config, all its weight files and a tokenizer."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a model folder or an artifact of a run")
    refuse_parts(folder)
    try:
        json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no config.json: not a Hugging Face model folder") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: not valid JSON: {error}") from None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{index}: does not say which file holds each tensor: {error!r}") from None
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder}: weight files are missing: {', '.join(missing)}")
    elif not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: no *.safetensors file")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise CheckpointError(f"{folder}: no tokenizer files")


def without_chat(folder: Path, settings: ServingSettings) -> str:
    """Why this endpoint will refuse chats, in one line that names the file to add; "" if it will not."""
    if any(argument.startswith("--chat-template") for argument in settings.engine.extra_args):
        return ""
    try:
        reason = "" if own_template(folder) else f"{folder}: no chat template"
    except CheckpointError as error:
        reason = str(error)
    return reason and (
        f"{reason}: chats will be refused with 400, completions work; add {folder / 'chat_template.jinja'}, or serve a "
        "folder that recua trained on conversations"
    )


def folder_digest(folder: Path) -> str:
    """A weight version for a folder that is not an artifact: sha256 over the names and contents of its files."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as content:
            content_digest = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder)} {content_digest}\n".encode())
    return digest.hexdigest()


def check_capacity(folder: Path, settings: ServingSettings) -> None:
    """Raises ResourceError if this cluster can never hold the replicas."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind, setting, need in (("CPU", "num_cpus", settings.num_cpus), ("GPU", "num_gpus", settings.num_gpus)):
        room = sum(int(node.get(kind, 0) / need) for node in nodes) if need else settings.replicas
        if room < settings.replicas:
            have = ", ".join(f"{node.get(kind, 0):g}" for node in nodes)
            raise ResourceError(
                f"serving.{setting}: {settings.replicas} replicas with {need:g} {kind} each fit {room} times "
                f"on this cluster's nodes ({kind} per node: {have}); lower serving.{setting} or serving.replicas"
            )
    if settings.num_gpus == 0 and len(nodes) == 1:
        _check_memory(folder, settings)


def _check_memory(folder: Path, settings: ServingSettings) -> None:
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30
    need = settings.replicas * (weights + settings.engine.kv_cache_gib + PROCESS_OVERHEAD_GIB)
    free = psutil.virtual_memory().available / 2**30
    if need > free:
        raise ResourceError(
            f"serving.engine.kv_cache_gib: {settings.replicas} replica(s) need about {need:.1f} GiB "
            f"({weights:.1f} weights + {settings.engine.kv_cache_gib:g} cache + {PROCESS_OVERHEAD_GIB:g} each), "
            f"{free:.1f} GiB are available"
        )


def pick_ports(host: str, grpc_port: int | None, http_port: int | None) -> tuple[int, int]:
    """Check or choose (0) both ports on this node; a port that is None is not checked and returned as 0.

    Raises:
        ResourceError: a port is taken; the message names its setting.
    """
    with ExitStack() as held:

        def pick(port: int | None, setting: str) -> int:
            return 0 if port is None else held.enter_context(hold_port(port, setting, host)).getsockname()[1]

        return pick(grpc_port, "serving.grpc_port"), pick(http_port, "serving.http_port")
