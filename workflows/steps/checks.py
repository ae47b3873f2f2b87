"""Before a run starts: what can be refused at once. After it ended: what must not stay behind."""

from pathlib import Path

from infra.errors import ConfigError
from infra.machine import parse_size, require_memory, require_port
from workflows.recipe import Recipe

PROCESS_BYTES = parse_size("700MiB")
"""A rank or an engine before it holds a model: Python, torch, its runtime (measured on CPU)."""


def check_recipe(recipe: Recipe) -> None:
    """Refuse what is wrong with a recipe on this machine, with the setting to change.

    Raises:
        ConfigError, DataError, CheckpointError, ResourceError.
    """
    from data.formats import validate

    for source in recipe.corpus.files:
        validate(source, "text")
    for source in recipe.problems.instruction_files:
        validate(source, "messages")
    if recipe.model.init_from is not None:
        from models.weights import tensor_index

        tensor_index(Path(recipe.model.init_from).expanduser())
    elif recipe.tokenizer.folder is not None and not Path(recipe.tokenizer.folder).expanduser().is_dir():
        raise ConfigError(f"tokenizer.folder {recipe.tokenizer.folder}: no such folder")
    _check_lengths(recipe)
    _check_pools(recipe)
    require_port(recipe.serving.grpc_port, "serving.grpc_port", recipe.serving.host)
    require_port(recipe.serving.http_port, "serving.http_port", recipe.serving.host)


def close_pools(run_id: str) -> None:
    """End the run's learners and generators, however it ended."""
    from actors.pools import Pools

    Pools(run_id).close()


def _check_lengths(recipe: Recipe) -> None:
    if recipe.model.init_from is not None or recipe.model.preset is not None:
        return
    for setting, length in (
        ("sft.max_length", recipe.sft.max_length),
        ("rejection_sft.max_length", recipe.rejection_sft.max_length),
        ("pretrain.sequence_length", recipe.pretrain.sequence_length),
        ("pools.engine.max_model_len", recipe.pools.engine.max_model_len),
    ):
        if length > recipe.model.context:
            raise ConfigError(f"{setting} = {length} is above model.context = {recipe.model.context}")


def _check_pools(recipe: Recipe) -> None:
    """On a laptop all processes share this machine's memory; on GPUs they live elsewhere."""
    pools = recipe.pools
    if pools.learners.num_gpus or pools.generators.num_gpus:
        return
    processes = pools.learners.workers + 2 * pools.generators.replicas + 3 * recipe.serving.replicas
    cache = pools.generators.replicas * pools.engine.kv_cache_gib + recipe.serving.replicas * (
        recipe.serving.engine.kv_cache_gib
    )
    require_memory(
        processes * PROCESS_BYTES + int(cache * 2**30),
        "pools.learners.workers, pools.generators.replicas, pools.engine.kv_cache_gib, serving.engine.kv_cache_gib",
    )
