"""The weighted mean of model folders (a stage's models are averaged; Llama 3, section 4.1.5). Any architecture."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from infra.errors import CheckpointError
from models.files import whole_folder
from models.weights import TensorEntry, some, tensor_index, write_shards


def average(folders: Sequence[str | Path], weights: Sequence[float] | None, out: str | Path) -> None:
    """Write the weighted mean of several folders' tensors.

    `weights` sum to 1 (None: equal). Sums are in fp32 and stored in the first folder's dtypes; all other files are
    copied from the first folder. Memory holds one tensor of each model and one output shard.

    Raises:
        CheckpointError: the folders do not hold the same tensors.
        ValueError: no folders, or weights that do not match them or do not sum to 1.
    """
    weights = [1.0 / len(folders)] * len(folders) if weights is None and folders else list(weights or [])
    if not folders or len(weights) != len(folders) or abs(sum(weights) - 1.0) > 1e-6:
        raise ValueError(f"averaging {len(folders)} folders needs as many weights that sum to 1, got {weights}")
    indices = [tensor_index(folder) for folder in folders]
    first = indices[0]
    for folder, index in zip(folders[1:], indices[1:], strict=True):
        odd = [name for name in sorted(first.keys() | index.keys()) if _shape(first, name) != _shape(index, name)]
        if odd:
            raise CheckpointError(f"cannot average {folder} with {folders[0]}: they differ in {some(odd)}")

    def mean(name: str) -> Tensor:
        total: Tensor | None = None
        for index, weight in zip(indices, weights, strict=True):
            with safe_open(index[name].file, framework="pt") as opened:
                tensor = opened.get_tensor(name)
            term = tensor.float() * weight
            total = term if total is None else total.add_(term)
        assert total is not None
        with safe_open(first[name].file, framework="pt") as opened:
            return total.to(opened.get_tensor(name).dtype)

    with whole_folder(Path(out)) as filling:
        for file in Path(folders[0]).iterdir():
            if file.is_file() and not file.name.startswith(".") and "safetensors" not in file.name:
                shutil.copyfile(file, filling / file.name)
        write_shards(((name, mean(name)) for name in first), filling)


def _shape(index: Mapping[str, TensorEntry], name: str) -> tuple[int, ...] | None:
    return index[name].shape if name in index else None
