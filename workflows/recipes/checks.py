"""Checks before a run starts, and the clean-up after it ends."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infra.errors import CheckpointError, ConfigError, DataError, ResourceError, nearest
from infra.machine import parse_size, require_memory, require_port
from workflows.recipes.amounts import check_amounts, check_pretraining_amounts, require_held_out_problems
from workflows.recipes.settings import ModelSettings, PretrainRecipe, Recipe, TokenizerSettings

if TYPE_CHECKING:
    from actors.pretrain.config import PretrainSettings
    from data.formats import Summary
    from models.llama import LlamaConfig

PROCESS_BYTES = parse_size("700MiB")
"""Memory of a rank or an engine without a model: Python, torch, its runtime (measured on CPU)."""
Node = dict[str, float]
"""A node's total resources, by Ray's names: {"CPU": 2.0, "GPU": 0.0, ...}."""


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe that cannot run on this machine.

    Raises:
        ConfigError, DataError, CheckpointError, ResourceError: the message names the setting to change.
    """
    corpus = _check_files("corpus.files", recipe.corpus.files, "text")
    trained = _last_is_trained if recipe.sft.train_on == "last" else None
    instructions = _check_files("problems.instruction_files", recipe.problems.instruction_files, "messages", trained)
    _check_kinds(recipe)
    check_amounts(recipe, corpus, instructions)
    _check_lengths(recipe, _context(recipe.model, recipe.tokenizer))
    if recipe.model.init_from is None:
        _check_mesh("pretrain", recipe.pretrain, _sizes(recipe.model, recipe.tokenizer))
    _check_memory(recipe)
    serving = recipe.serving
    if serving.grpc_port and serving.grpc_port == serving.http_port:
        raise ConfigError(f"serving.grpc_port and serving.http_port are both {serving.grpc_port}: one port each")
    require_port(serving.grpc_port, "serving.grpc_port", serving.host)
    require_port(serving.http_port, "serving.http_port", serving.host)
    require_held_out_problems(recipe)


def check_capacity(recipe: Recipe, nodes: Sequence[Node]) -> None:
    """Refuse processes that these nodes can never hold: each group alone, then the groups that run at the same time.

    Raises:
        ResourceError: the message names the settings to lower, and the available resources.
    """
    pretrain, learners, generators = recipe.pretrain, recipe.pools.learners, recipe.pools.generators
    serving = recipe.serving
    together = [
        ("pools.learners", "workers", learners.workers, learners),
        ("pools.generators", "replicas", generators.replicas, generators),
        ("serving", "replicas", serving.replicas, serving),
    ]
    ranks = pretrain.workers + pretrain.elastic.spares
    alone = [] if recipe.model.init_from else [("pretrain", "workers", ranks, pretrain)]
    for kind, setting in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        there, shown = _offer(kind, nodes)
        for section, counted, count, group in [*alone, *together]:
            _require_room(section, counted, count, setting, float(getattr(group, setting)), kind, nodes)
        total = sum(count * float(getattr(group, setting)) for _, _, count, group in together)
        if total > sum(there) + 1e-9:
            parts = ", ".join(
                f"{section}.{counted} x {section}.{setting} = {count * float(getattr(group, setting)):g}"
                for section, counted, count, group in together
            )
            raise ResourceError(f"processes that run at the same time need {total:g} {kind} ({parts}); {shown}")


def check_pretraining(recipe: PretrainRecipe) -> None:
    """The same for pretraining alone."""
    corpora = {"corpus": _check_files("corpus.files", recipe.corpus.files, "text")}
    contexts: dict[str | None, tuple[int, str]] = {None: _context(recipe.model, recipe.tokenizer)}
    sizes = _sizes(recipe.model, recipe.tokenizer)
    for name in recipe.in_order():
        stage, section = recipe.stages[name], f"stages.{name}"
        if stage.corpus is not None:
            corpora[f"{section}.corpus"] = _check_files(f"{section}.corpus.files", stage.corpus.files, "text")
        own = (stage.context, f"{section}.context") if stage.context is not None else contexts[stage.after]
        contexts[name] = own
        _require_length(f"{section}.sequence_length", stage.sequence_length, own)
        _check_mesh(section, stage, sizes)
    check_pretraining_amounts(recipe, corpora)


def check_pretraining_capacity(recipe: PretrainRecipe, nodes: Sequence[Node]) -> None:
    """Refuse stages whose ranks these nodes can never hold. Raises ResourceError."""
    for name, stage in recipe.stages.items():
        for kind, setting in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
            ranks = stage.workers + stage.elastic.spares
            _require_room(f"stages.{name}", "workers", ranks, setting, getattr(stage, setting), kind, nodes)


def check_start_model(folder: Path) -> int:
    """Check that a run can start from an HF folder: config, every tensor and its shape, tokenizer, chat template.

    Reads every weight once, because training from a NaN is useless. Returns the number of context tokens that are all
    attended to. Raises CheckpointError.
    """
    from engines.chat import check_chat
    from engines.fitting import check_fits
    from engines.hf_folder import check_configs
    from models.hf_format import config_from_hf, read_tree
    from models.weights import check, check_finite, tensor_index

    tree = read_tree(folder)
    index = tensor_index(folder)
    if tree.get("model_type") == "llama":
        check(folder, config_from_hf(tree, str(folder / "config.json")))
    model = check_configs(folder)
    check_fits(folder, model, index)
    config = model.config.get_text_config(decoder=True)
    ids, vocab_size = check_chat(folder), getattr(config, "vocab_size", 0)
    if vocab_size and ids > vocab_size:
        raise CheckpointError(f"{folder}: the tokenizer has {ids} ids, the model only {vocab_size}")
    check_finite(folder, index)
    context, window = getattr(config, "max_position_embeddings", 0), getattr(config, "sliding_window", None)
    return min(context, window) if window and getattr(config, "use_sliding_window", True) else context


def close_pools(run_id: str) -> None:
    """End the run's learners and generators."""
    from actors.pools.keeper import Pools

    Pools(run_id).close()


def _offer(kind: str, nodes: Sequence[Node]) -> tuple[list[float], str]:
    """Each node's amount of a resource, and the same in words."""
    there = [node.get(kind, 0.0) for node in nodes]
    shown = f"this cluster has {sum(there):g} {kind}"
    return there, shown + (f", at most {max(there):g} on one node" if len(nodes) > 1 else "")


def _require_room(
    section: str, counted: str, count: int, setting: str, need: float, kind: str, nodes: Sequence[Node]
) -> None:
    there, shown = _offer(kind, nodes)
    room = sum(int(amount / need + 1e-9) if amount != float("inf") else count for amount in there) if need else count
    if room < count:
        raise ResourceError(
            f"{section}.{counted} = {count} with {section}.{setting} = {need:g} each can never start: {shown}; lower "
            f"one of them"
        )


def _check_files(
    setting: str, sources: Sequence[str], shape: Literal["text", "messages"],
    also: Callable[[dict[str, Any]], None] | None = None,
) -> "Summary":  # fmt: skip
    """The summary of all sources together; `also` checks each row."""
    from data.formats import Summary, validate

    rows, text_bytes = 0, 0
    for source in sources:
        try:
            summary = validate(source, shape, also)
        except DataError as error:
            raise DataError("\n".join(f"{setting}: {line}" for line in str(error).splitlines())) from None
        rows, text_bytes = rows + summary.rows, text_bytes + summary.text_bytes
    return Summary(rows, text_bytes=text_bytes)


def _last_is_trained(row: dict[str, Any]) -> None:
    from data.shapes import is_trained

    last = [message for message in row["messages"] if message["role"] == "assistant"][-1]
    if not is_trained(last):
        raise ValueError('the last assistant turn has weight 0 and sft.train_on is "last": nothing to train on')


def _check_kinds(recipe: Recipe) -> None:
    from data.tasks import kind_names

    known = kind_names()
    for kind, weight in recipe.tasks.kinds.items():
        if kind not in known:
            raise ConfigError(f"tasks.kinds: unknown kind {kind!r}{nearest(kind, known)}")
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"tasks.kinds: the weight of {kind} is {weight}, it must be 0 or more, and finite")


def _sizes(model: ModelSettings, tokenizer: TokenizerSettings) -> "LlamaConfig":
    """The network's dimensions."""
    if model.init_from is not None:
        from models.hf_format import read_config

        try:
            return read_config(Path(model.init_from).expanduser())
        except CheckpointError as error:
            raise CheckpointError(f"model.init_from: {error}; only Llamas can be pretrained further") from None
    return model.to_llama(tokenizer.vocab_size)


def _check_mesh(section: str, pretrain: "PretrainSettings", sizes: "LlamaConfig") -> None:
    """Check that the section's parallelism divides the network."""
    split, stages = pretrain.tensor_parallel, pretrain.pipeline_parallel
    for name in ("heads", "kv_heads", "ffn_dim"):
        if (count := getattr(sizes, name)) % split:
            raise ConfigError(f"{section}.tensor_parallel = {split} does not divide the model's {name} = {count}")
    if stages > sizes.layers:
        raise ConfigError(f"{section}.pipeline_parallel = {stages} is above the model's layers = {sizes.layers}")


def _context(model: ModelSettings, tokenizer: TokenizerSettings) -> tuple[int, str]:
    """The model's context in tokens (0: unknown), and the setting that it comes from."""
    if model.init_from is not None:
        folder = Path(model.init_from).expanduser()
        try:
            return check_start_model(folder), f"the context of {folder}"
        except CheckpointError as error:
            raise CheckpointError(f"model.init_from: {error}") from None
    vocab_size = tokenizer.vocab_size
    if tokenizer.folder is not None:
        vocab_size = _check_tokenizer(Path(tokenizer.folder).expanduser())
    if model.preset is None:
        return model.context, "model.context"
    try:
        config = model.to_llama(vocab_size)
    except ConfigError as error:
        raise ConfigError(f"model.preset: {error}") from None
    if vocab_size > config.vocab_size:
        raise ConfigError(
            f"model.preset {model.preset} has {config.vocab_size} ids, the tokenizer {vocab_size}: change "
            f"{'tokenizer.folder' if tokenizer.folder else 'tokenizer.vocab_size'} or the preset"
        )
    return config.context, f"the context of preset {model.preset}"


def _check_tokenizer(folder: Path) -> int:
    """The number of ids that a model needs for the tokenizer."""
    from engines.chat import check_chat

    if not folder.is_dir():
        raise ConfigError(f"tokenizer.folder {folder}: no such folder")
    try:
        return check_chat(folder)
    except CheckpointError as error:
        raise CheckpointError(f"tokenizer.folder: {error}") from None


def _check_lengths(recipe: Recipe, context: tuple[int, str]) -> None:
    lengths = [
        ("sft.max_length", recipe.sft.max_length),
        ("rejection_sft.max_length", recipe.rejection_sft.max_length),
        ("pools.engine.max_model_len", recipe.pools.engine.max_model_len),
        ("serving.engine.max_model_len", recipe.serving.engine.max_model_len or 0),
    ]
    if recipe.model.init_from is None:
        lengths.append(("pretrain.sequence_length", recipe.pretrain.sequence_length))
    for setting, length in lengths:
        _require_length(setting, length, context)
    for name in ("preferences", "rejection", "ppo", "eval"):
        _require_room_for_prompts(
            "pools.engine.max_model_len", recipe.pools.engine.max_model_len, f"{name}.max_tokens",
            getattr(recipe, name).max_tokens,
        )  # fmt: skip
    _require_room_for_prompts(
        "rejection_sft.max_length", recipe.rejection_sft.max_length, "rejection.max_tokens", recipe.rejection.max_tokens
    )


def _require_length(setting: str, length: int, context: tuple[int, str]) -> None:
    most, name = context
    if most and length > most:
        raise ConfigError(f"{setting} = {length} is above {name} = {most}")


def _require_room_for_prompts(setting: str, most: int, answers: str, max_tokens: int) -> None:
    if most <= max_tokens:
        raise ConfigError(f"{setting} = {most} leaves no token for a prompt: {answers} = {max_tokens}; raise it")


def _check_memory(recipe: Recipe) -> None:
    """Check memory for a run on CPUs, whose processes share this machine's memory."""
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
