"""Models from and to Hugging Face folders: config.json, safetensors, and the files that travel with them."""

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engines.forward import ScalarModel
from infra.errors import CheckpointError

Head = Literal["lm", "scalar"]

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files of a model folder that training does not change."""


def load_model(folder: Path, head: Head, dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
    """The folder's causal LM, or its decoder under a scalar head (a new one if the folder holds none).

    A new head is drawn from N(0, 1/(hidden+1)) with `seed`, the same on every rank.

    Raises:
        CheckpointError: no model there, or tensors that are missing or of the wrong shape.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; a model folder in Hugging Face form is needed")
    if head == "lm":
        return _from_pretrained("AutoModelForCausalLM", folder, dtype)
    model = _from_pretrained("AutoModel", folder, dtype)
    scalar = ScalarModel(model, model.config.hidden_size, dtype)
    saved = _read_tensor(folder, "score.weight")
    with torch.no_grad():
        if saved is not None:
            scalar.score.weight.copy_(saved)
        else:
            generator = torch.Generator().manual_seed(seed)
            draw = torch.randn(scalar.score.weight.shape, generator=generator)
            scalar.score.weight.copy_(draw / (model.config.hidden_size + 1) ** 0.5)
    return scalar


def _from_pretrained(kind: str, folder: Path, dtype: torch.dtype) -> Any:
    import transformers

    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of tensors goes into our errors instead
    logging.disable_progress_bar()
    loader = getattr(transformers, kind)
    try:
        model, report = loader.from_pretrained(
            folder, dtype=dtype, local_files_only=True, attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    if report["missing_keys"]:
        raise CheckpointError(f"{folder}: missing tensors: {', '.join(sorted(report['missing_keys'])[:5])}")
    return model


def _read_tensor(folder: Path, name: str) -> torch.Tensor | None:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            if name in reader.keys():  # noqa: SIM118  (safe_open is no mapping)
                return reader.get_tensor(name)
    return None


def save_model(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: Path | None, folder: Path) -> None:
    """Write `tensors` (full, HF names) and `model`'s config into `folder`; `source` lends tokenizer and templates.

    Everything is written beside `folder` first and moved in last, config.json at the very end: a crash leaves no
    folder that looks like a model.
    """
    draft = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    draft.mkdir(parents=True)
    try:
        if isinstance(model, ScalarModel):
            _write_scalar(model, tensors, draft)
        else:
            saver: Any = model
            saver.save_pretrained(draft, state_dict=dict(tensors))
        for name in COMPANIONS if source is not None else ():
            assert source is not None
            if (source / name).is_file():
                shutil.copyfile(source / name, draft / name)
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(draft.iterdir(), key=lambda file: file.name == "config.json"):
            _sync(file)
            file.replace(folder / file.name)
        _sync(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_scalar(model: ScalarModel, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    backbone: Any = model.model
    config = backbone.config.to_dict()
    config.pop("_name_or_path", None)  # where this copy came from: equal models must have equal files
    family = type(backbone).__name__.removesuffix("Model")
    config |= {
        "architectures": [f"{family}ForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "dtype": str(model.score.weight.dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
