"""A learner's training state on disk, in one form for every world size and ZeRO stage.

state-00000.safetensors ... hold, per parameter, `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` as full fp32 tensors;
state.json, written last, holds the step and the names of the shards. Rank 0 writes; every rank reads.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from infra.errors import CheckpointError

if TYPE_CHECKING:
    from engines.deepspeed_learner import DeepSpeedLearner

FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
SHARD_BYTES = 2**31


def save(learner: "DeepSpeedLearner", folder: Path) -> None:
    """(collective) See `DeepSpeedLearner.save_state`."""
    shard: dict[str, torch.Tensor] = {}
    names: list[str] = []

    def flush() -> None:
        if shard:
            names.append(f"state-{len(names):05d}.safetensors")
            save_file(shard, folder / names[-1])
            shard.clear()

    if learner.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").unlink(missing_ok=True)
    for name, tensor in _read(learner):
        if learner.rank == 0:
            shard[name] = tensor.float().cpu().clone()
            if sum(value.numel() * 4 for value in shard.values()) > SHARD_BYTES:
                flush()
    if learner.rank == 0:
        flush()
        meta = {"format": FORMAT, "step": learner.step, "shards": names}
        partial = folder / ".state.json"
        partial.write_text(json.dumps(meta, indent=2))
        partial.replace(folder / "state.json")
    dist.barrier()


def load(learner: "DeepSpeedLearner", folder: Path) -> None:
    """(collective) See `DeepSpeedLearner.load_state`."""
    try:
        meta = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no complete training state: {error}") from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: training state of format {meta.get('format')}, this version reads {FORMAT}")
    saved = _index(folder, meta["shards"])
    wanted = {name: tuple(_full_shape(parameter)) for name, parameter in learner._model.named_parameters()}
    for name, shape in wanted.items():
        for kind in ("weight", *MOMENTS):
            if saved.get(f"{kind}/{name}", (None, None))[1] != shape:
                found = saved.get(f"{kind}/{name}", (None, "missing"))[1]
                raise CheckpointError(f"{folder}: {kind} of {name} should be {shape}, is {found}")
    _write(learner, {key: file for key, (file, _) in saved.items()})
    _set_adam_step(learner._engine.optimizer, meta["step"])
    learner.step = meta["step"]
    dist.barrier()


def _index(folder: Path, shards: list[str]) -> dict[str, tuple[Path, tuple[int, ...]]]:
    index = {}
    for shard in shards:
        try:
            with safe_open(folder / shard, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118  (safe_open is no mapping)
                    index[name] = (folder / shard, tuple(reader.get_slice(name).get_shape()))
        except Exception as error:
            raise CheckpointError(f"{folder / shard}: not readable as safetensors: {error}") from error
    return index


def _full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _read(learner: "DeepSpeedLearner") -> Iterator[tuple[str, torch.Tensor]]:
    """(collective) (kind/NAME, full tensor)."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _make_moments(learner._engine.optimizer)
    plain = _plain_state(learner)
    for name, parameter in learner._model.named_parameters():
        shape = _full_shape(parameter)
        weight = parameter.detach() if plain is not None else safe_get_full_fp32_param(parameter)
        yield f"weight/{name}", weight.reshape(shape)
        for kind in MOMENTS:
            moment = plain[parameter][kind] if plain is not None else safe_get_full_optimizer_state(parameter, kind)
            yield f"{kind}/{name}", moment.reshape(shape)


@torch.no_grad()
def _write(learner: "DeepSpeedLearner", files: dict[str, Path]) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    optimizer = learner._engine.optimizer
    _make_moments(optimizer)
    plain = _plain_state(learner)
    for name, parameter in learner._model.named_parameters():
        weight = _tensor(files, f"weight/{name}")
        moments = {kind: _tensor(files, f"{kind}/{name}") for kind in MOMENTS}
        if hasattr(parameter, "ds_tensor"):
            _write_shard(parameter.ds_tensor, weight, learner.rank)
            _write_shard(optimizer._get_fp32_opt_state_partition(parameter, False)[0], weight, learner.rank)
            for kind, moment in moments.items():
                shard = optimizer._get_fp32_opt_state_partition(parameter, False, optim_state_key=kind)[0]
                _write_shard(shard, moment, learner.rank)
            continue
        parameter.copy_(weight)
        if plain is None:
            safe_set_full_fp32_param(parameter, weight)
        for kind, moment in moments.items():
            if plain is None:
                safe_set_full_optimizer_state(parameter, moment, kind)
            else:
                plain[parameter][kind].copy_(moment)


def _write_shard(shard: torch.Tensor, full: torch.Tensor, rank: int) -> None:
    """ZeRO-3 gives every rank an equal flat slice; the last ones are padded. (DeepSpeed's own setter forgets that.)"""
    piece = full.flatten()[shard.numel() * rank : shard.numel() * (rank + 1)]
    shard.data.view(-1)[: piece.numel()].copy_(piece)


def _tensor(files: dict[str, Path], key: str) -> torch.Tensor:
    with safe_open(files[key], framework="pt") as reader:
        return reader.get_tensor(key)


def _plain_state(learner: "DeepSpeedLearner") -> Any:
    """The per-parameter Adam state at stage 0 in fp32, where DeepSpeed puts nothing between; else None."""
    optimizer = learner._engine.optimizer
    return optimizer.state if isinstance(optimizer, torch.optim.AdamW) else None


def _base(optimizer: Any) -> Any:
    return optimizer if isinstance(optimizer, torch.optim.AdamW) else optimizer.optimizer


def _make_moments(optimizer: Any) -> None:
    """Adam makes its moments at the first step, and ZeRO links them to parameters in the middle of it; do both now."""
    base = _base(optimizer)
    flat = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # stage 3 empties its parameter groups
    for parameter in flat if flat is not None else [p for group in base.param_groups for p in group["params"]]:
        state = base.state[parameter]
        for kind in MOMENTS:
            if kind not in state:
                state[kind] = torch.zeros_like(parameter)
        state.setdefault("step", torch.zeros((), dtype=torch.float32))
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _set_adam_step(optimizer: Any, step: int) -> None:
    for state in _base(optimizer).state.values():
        state["step"] = torch.tensor(float(step), dtype=torch.float32)
