"""A learner's training state on disk, in one form for every world size and ZeRO stage.

state-00000.safetensors ... hold, per parameter, `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` as full fp32 tensors;
state.json, written last, holds the step and the names of the shards. Rank 0 writes; every rank reads.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from engines.deepspeed.zero import MOMENTS, ZeroModel
from infra.errors import CheckpointError

FORMAT = 1
SHARD_BYTES = 2**31


def save(model: ZeroModel, step: int, folder: Path) -> None:
    """(collective) See `DeepSpeedLearner.save_state`."""
    shard: dict[str, torch.Tensor] = {}
    names: list[str] = []

    def flush() -> None:
        if shard:
            names.append(f"state-{len(names):05d}.safetensors")
            save_file(shard, folder / names[-1])
            shard.clear()

    if model.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").unlink(missing_ok=True)
    for name, tensor in _read(model):
        if model.rank == 0:
            shard[name] = tensor.float().cpu().clone()
            if sum(value.numel() * 4 for value in shard.values()) > SHARD_BYTES:
                flush()
    if model.rank == 0:
        flush()
        meta = {"format": FORMAT, "step": step, "shards": names}
        partial = folder / ".state.json"
        partial.write_text(json.dumps(meta, indent=2))
        partial.replace(folder / "state.json")
    dist.barrier()


def load(model: ZeroModel, folder: Path) -> int:
    """(collective) Write the saved state into `model`; its step. See `DeepSpeedLearner.load_state`."""
    try:
        meta = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no complete training state: {error}") from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: training state of format {meta.get('format')}, this version reads {FORMAT}")
    saved = _index(folder, meta["shards"])
    wanted = {name: tuple(_full_shape(parameter)) for name, parameter in model.module.named_parameters()}
    for name, shape in wanted.items():
        for kind in ("weight", *MOMENTS):
            if saved.get(f"{kind}/{name}", (None, None))[1] != shape:
                found = saved.get(f"{kind}/{name}", (None, "missing"))[1]
                raise CheckpointError(f"{folder}: {kind} of {name} should be {shape}, is {found}")
    _write(model, {key: file for key, (file, _) in saved.items()})
    model.set_adam_step(meta["step"])
    dist.barrier()
    return int(meta["step"])


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


def _read(model: ZeroModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(collective) (kind/NAME, full tensor)."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    model.make_moments()
    plain = model.plain_state()
    for name, parameter in model.module.named_parameters():
        shape = _full_shape(parameter)
        weight = parameter.detach() if plain is not None else safe_get_full_fp32_param(parameter)
        yield f"weight/{name}", weight.reshape(shape)
        for kind in MOMENTS:
            moment = plain[parameter][kind] if plain is not None else safe_get_full_optimizer_state(parameter, kind)
            yield f"{kind}/{name}", moment.reshape(shape)


@torch.no_grad()
def _write(model: ZeroModel, files: dict[str, Path]) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    optimizer = model.optimizer
    model.make_moments()
    plain = model.plain_state()
    for name, parameter in model.module.named_parameters():
        weight = _tensor(files, f"weight/{name}")
        moments = {kind: _tensor(files, f"{kind}/{name}") for kind in MOMENTS}
        if hasattr(parameter, "ds_tensor"):
            _write_shard(parameter.ds_tensor, weight, model.rank)
            _write_shard(optimizer._get_fp32_opt_state_partition(parameter, False)[0], weight, model.rank)
            for kind, moment in moments.items():
                shard = optimizer._get_fp32_opt_state_partition(parameter, False, optim_state_key=kind)[0]
                _write_shard(shard, moment, model.rank)
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
