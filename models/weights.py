"""Model folders in Hugging Face form <-> our network.

    config.json, generation_config.json, model.safetensors (or shards + model.safetensors.index.json), tokenizer files

Reading checks the headers of the weight files first: errors name missing, unexpected and misshapen tensors before any
big tensor is allocated. Writing puts config.json last, so that no library loads a half-written folder.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from infra.errors import CheckpointError, ConfigError
from infra.storage.files import write_text
from models.files import read_object, refuse_adapter, refuse_pointer, whole_folder
from models.hf_format import from_hf_name, hf_config, read_config, to_hf_name, token_ids
from models.llama import Llama, LlamaConfig, parameter_shapes
from models.tokenizers import Tokenizer

SHARD_BYTES = 5 * 10**9
"""The customary size of the largest weight file."""
ROWS_BYTES = 1 << 28
"""How much of a tensor is read at a time when values are only checked."""
FLOATS = ("F64", "F32", "BF16", "F16")
"""The dtypes that weights may have, by safetensors' names."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class TensorEntry:
    """A stored tensor: file, shape, and dtype as safetensors names it ("F32", "BF16")."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def tensor_index(folder: str | Path) -> dict[str, TensorEntry]:
    """Every tensor of a folder by its stored name; only headers are read.

    Raises:
        CheckpointError: no weights, or only an adapter's; a shard of the index is missing; a file is damaged, cut short
            or a Git LFS pointer; a tensor is in two files.
    """
    folder = Path(folder)
    entries: dict[str, TensorEntry] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    if name in entries:
                        raise CheckpointError(f"{folder}: {name} lies in {entries[name].file.name} and in {file.name}")
                    view = opened.get_slice(name)
                    entries[name] = TensorEntry(file, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read (cut short?): {error}") from None
    return entries


def check(folder: str | Path, config: LlamaConfig) -> dict[str, TensorEntry]:
    """Compare a folder's headers with the network of `config`; returns the tensors under our names.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors (the message names up to eight of each kind), or as
            `check_dtypes` and `check_tied`.
    """
    expected = parameter_shapes(config)
    found: dict[str, TensorEntry] = {}
    unexpected: list[str] = []
    index = tensor_index(folder)
    check_dtypes(folder, index)
    for name, entry in index.items():
        if name.endswith("rotary_emb.inv_freq"):  # old conversions stored this constant
            continue
        try:
            found[from_hf_name(name)] = entry
        except KeyError:
            unexpected.append(name)
    if config.tied:
        found.pop("output.weight", None)
    unexpected += [to_hf_name(name) for name in found if name not in expected]
    missing = [to_hf_name(name) for name in expected if name not in found]
    misshapen = [
        f"{to_hf_name(name)} is {list(found[name].shape)}, config.json says {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen)]
    if any(names for _, names in problems):
        text = "; ".join(f"{kind}: {some(names)}" for kind, names in problems if names)
        if prefix := _wrapper(unexpected):
            text = f"every name starts with {prefix!r}, as from a wrapped model: save the model inside the wrapper"
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {text}")
    check_tied(folder, index, {HEAD: EMBEDDING} if config.tied else {})
    return found


def check_dtypes(folder: str | Path, index: Mapping[str, TensorEntry]) -> None:
    """Check that training can start from the weights' dtypes. Raises CheckpointError naming quantized weights."""
    odd = [name for name, entry in index.items() if name.endswith("weight") and entry.dtype not in FLOATS]
    if odd:
        raise CheckpointError(
            f"{folder}: {some(odd)} is stored as {index[odd[0]].dtype}; training needs weights in float32, bfloat16 or "
            "float16: name a folder of the model before quantization"
        )


def check_tied(folder: str | Path, index: Mapping[str, TensorEntry], tied: Mapping[str, str]) -> None:
    """Check that tensors that config.json ties ({head: embedding}, by stored names) are equal in the files.

    Raises:
        CheckpointError: they differ; one runtime would drop the head and another would keep it.
    """
    for head, embedding in tied.items():
        if head in index and embedding in index and not _equal(head, embedding, index):
            raise CheckpointError(
                f"{folder}: config.json says tie_word_embeddings = true, but {head} differs from {embedding}: set "
                f"tie_word_embeddings to false to keep both, or remove {head}"
            )


def check_finite(folder: str | Path, index: Mapping[str, TensorEntry]) -> None:
    """Read every weight once. Raises CheckpointError naming tensors that contain NaN or infinity."""
    bad: list[str] = []
    for name, rows in _rows(index):
        if rows.is_floating_point() and not all(bool(end.isfinite()) for end in torch.aminmax(rows)):
            bad += [name] if name not in bad else []
    if bad:
        raise CheckpointError(f"{folder}: NaN or infinity in {some(bad)}: the model is damaged; name another folder")


def read_tensors(
    folder: str | Path, config: LlamaConfig, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Checked (our name, tensor) pairs one at a time, so that a sharding caller never holds the whole model.

    A tied model's shared matrix comes once, as tok_embeddings.weight. Raises as `check`, before the first tensor.
    """
    found = check(folder, config)
    return _stream(found, dtype)


def load_llama(folder: str | Path, dtype: torch.dtype | None = None) -> Llama:
    """The network of a folder, in `dtype` or as stored. Raises CheckpointError as `read_config` and `check`."""
    config = read_config(folder)
    tensors = dict(read_tensors(folder, config, dtype))
    with torch.device("meta"):
        model = Llama(config)
    if config.tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    model.load_state_dict(tensors, assign=True)
    model.tie()
    return model


def _stream(entries: Mapping[str, TensorEntry], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for name, entry in entries.items():
        by_file.setdefault(entry.file, []).append((name, to_hf_name(name)))
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name, stored in names:
                tensor = opened.get_tensor(stored)
                yield name, tensor if dtype is None else tensor.to(dtype)


def _weight_files(folder: Path) -> list[Path]:
    refuse_adapter(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    refuse_pointer(index)
    refuse_pointer(single)
    if index.is_file():
        names = _shards(index)
        for name in names:
            refuse_pointer(folder / name)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder}: {index.name} names files that are missing: {some(missing)}")
        if single.is_file() and single.name not in names:
            raise CheckpointError(
                f"{folder}: {index.name} does not name {single.name}: remove the stale one of the two"
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    others = [file.name for pattern in ("pytorch_model*.bin", "*.pth", "*.gguf") for file in folder.glob(pattern)]
    other = f" ({some(sorted(others))} must be converted to safetensors)" if others else ""
    raise CheckpointError(f"no weights in {folder}: expected model.safetensors or its index{other}")


def _shards(index: Path) -> list[str]:
    """The file names of an index. They must not be paths, because a model is one folder."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is damaged: weight_map must say which file each tensor lies in")
    names = list(weight_map.values())
    outside = [repr(name) for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index}: weight_map names {some(outside)}, which is not a file of this folder")
    return sorted(set(names))


def _rows(index: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """(name, some of its rows) pairs that cover every tensor; about `ROWS_BYTES` at a time."""
    by_file: dict[Path, list[str]] = {}
    for name, entry in index.items():
        by_file.setdefault(entry.file, []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name in names:
                if 0 in (shape := index[name].shape):
                    continue
                if not shape:
                    yield name, opened.get_tensor(name)
                    continue
                view, step = opened.get_slice(name), max(1, ROWS_BYTES // (8 * math.prod(shape[1:])))
                for start in range(0, shape[0], step):
                    yield name, view[start : start + step]


def _equal(one: str, other: str, index: Mapping[str, TensorEntry]) -> bool:
    if index[one].shape != index[other].shape:
        return False
    pairs = zip(_rows({one: index[one]}), _rows({other: index[other]}), strict=True)
    return all(
        torch.allclose(rows.double(), others.double(), rtol=0, atol=0, equal_nan=True)
        for (_, rows), (_, others) in pairs
    )


def _wrapper(unexpected: Sequence[str]) -> str | None:
    """The common prefix ("_orig_mod.", "module.") before a known name in all these names; None if there is none."""
    parts = unexpected[0].split(".") if unexpected else []
    for cut in range(1, len(parts)):
        prefix = ".".join(parts[:cut]) + "."
        if all(name.startswith(prefix) and _is_known(name.removeprefix(prefix)) for name in unexpected):
            return prefix
    return None


def _is_known(name: str) -> bool:
    try:
        from_hf_name(name)
    except KeyError:
        return False
    return True


def some(names: Sequence[str]) -> str:
    """Up to eight names, for a message."""
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + rest


def save_hf(
    model: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: LlamaConfig,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that plain transformers and vLLM load; with a tokenizer, they can also chat with it.

    `model` may be our network, a state dict, or a stream of (name, full tensor) pairs, in our names or Hugging Face's.
    A stream needs memory for one shard only. `dtype` converts the tensors.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen for `config`.
        ConfigError: the tokenizer has more ids than the embedding has rows.
    """
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size} (vocab_size)"
        )
    with whole_folder(Path(folder)) as filling:
        dtypes: set[str] = set()
        write_shards(_fitting(model, config, dtype, dtypes), filling, shard_bytes)
        tree = hf_config(config, tokenizer, dtype="/".join(sorted(dtypes)) if len(dtypes) == 1 else "float32")
        if tokenizer is not None:
            tokenizer.save(filling)
            write_text(filling / "generation_config.json", json.dumps(token_ids(tokenizer), indent=2))
        write_text(filling / "config.json", json.dumps(tree, indent=2, sort_keys=True))


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write (name, tensor) pairs as model.safetensors, or as shards with an index if they exceed `shard_bytes`."""
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        bytes_here = tensor.numel() * tensor.element_size()
        if shard and size + bytes_here > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.detach().to("cpu").contiguous()
        size += bytes_here
        total += bytes_here
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2))


def _fitting(
    model: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: LlamaConfig,
    dtype: torch.dtype | None,
    dtypes: set[str],
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) pairs of exactly the tensors of `config`; adds their dtypes to `dtypes`."""
    expected = {to_hf_name(name): shape for name, shape in parameter_shapes(config).items()}
    source = model.state_dict() if isinstance(model, nn.Module) else model
    for name, tensor in source.items() if isinstance(source, Mapping) else source:
        hf_name = name if name.startswith(("model.", "lm_head.")) else _our_name_to_hf(name)
        if config.tied and hf_name == "lm_head.weight":
            continue
        shape = expected.pop(hf_name, None)
        if shape != tuple(tensor.shape):
            wanted = "unexpected or repeated" if shape is None else f"expected {list(shape)}"
            raise CheckpointError(f"cannot save {name} {list(tensor.shape)}: {wanted}")
        tensor = tensor if dtype is None else tensor.to(dtype)
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        yield hf_name, tensor
    if expected:
        raise CheckpointError(f"cannot save the model: tensors are missing: {some(list(expected))}")


def _our_name_to_hf(name: str) -> str:
    try:
        return to_hf_name(name)
    except KeyError:
        raise CheckpointError(f"cannot save {name}: no tensor of a Llama has this name") from None
