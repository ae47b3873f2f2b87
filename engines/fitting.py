"""Do a folder's tensors fit the network that transformers builds from its config.json? Asked without reading one.

transformers loads them as it will later, by its own rules of names, merges and ties, but as tensors that have a shape
and no memory.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from engines.quiet import one_line, quiet_transformers
from infra.errors import CheckpointError
from models.weights import HEAD, TensorEntry, check_dtypes, check_tied, some

_IN_ONE_THREAD = "HF_DEACTIVATE_ASYNC_LOAD"
"""transformers' switch: shapes without memory are known to one thread only."""
REPORTED = ("missing_keys", "mismatched_keys", "unexpected_keys")
NEOX_HEAD = "embed_out.weight"
log = logging.getLogger(__name__)


def check_fits(folder: Path, model: Any, index: Mapping[str, TensorEntry]) -> None:
    """Whether `index` holds every tensor of `model` (as `check_configs` builds it), each in its shape.

    What else it holds is named in a warning: it is neither trained nor saved.

    Raises:
        CheckpointError: tensors that are missing, misshapen or quantized, or a tied head that differs; they are named.
    """
    check_dtypes(folder, index)
    names = model.all_tied_weights_keys.items()
    tied = {_stored(head, model, index): _stored(kept, model, index) for head, kept in names}
    check_tied(folder, index, tied)
    doubled = {head for head, kept in tied.items() if head in index and kept in index}
    shapes = {name: entry.shape for name, entry in index.items() if name not in doubled}
    report = _loaded(folder, model, shapes)
    misshapen = [
        f"{name} is {list(found)}, config.json says {list(wanted)}"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    problems = [("missing", sorted(report["missing_keys"])), ("wrong shape", misshapen)]
    if any(names for _, names in problems):
        text = "; ".join(f"{kind}: {some(names)}" for kind, names in problems if names)
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {text}")
    if unused := sorted(report["unexpected_keys"]):
        log.warning("%s: its network has no such tensors, they are left out: %s", folder, some(unused))


def _stored(name: str, model: Any, index: Mapping[str, TensorEntry]) -> str:
    """How the files call a tensor of the model: older ones leave out what stands before the decoder's names, and
    GPT-NeoX had its own name for the head."""
    others = (name, name.removeprefix(f"{model.base_model_prefix}."), *((NEOX_HEAD,) if name == HEAD else ()))
    return next((other for other in others if other in index), name)


def _loaded(folder: Path, model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """transformers' report of loading tensors of these shapes."""
    with _shapes_only():
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        try:
            _, report = type(model).from_pretrained(
                None, config=model.config, state_dict=tensors, dtype=torch.float32, local_files_only=True,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
        except (
            DataDependentOutputException
        ):  # a head and its twin by names unknown here: compared once they have values
            return dict.fromkeys(REPORTED, ())
        except Exception as error:  # merging what does not fit together
            raise CheckpointError(f"{folder}: the weights do not fit config.json: {one_line(error)}") from error
    return dict(report)


@contextmanager
def _shapes_only() -> Iterator[None]:
    told, before = logging.getLogger(FakeTensorMode.__module__), os.environ.get(_IN_ONE_THREAD)
    disabled, told.disabled = told.disabled, True  # the error says it
    os.environ[_IN_ONE_THREAD] = "1"
    try:
        with quiet_transformers(), FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        told.disabled = disabled
        if before is None:
            del os.environ[_IN_ONE_THREAD]
        else:
            os.environ[_IN_ONE_THREAD] = before
